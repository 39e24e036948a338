"""A thousand people train one model of handwritten digits, which hardly depends on any of them.

Each client has one or two images. A round draws every client with probability 0.1, clips what
it has learned, and adds noise to the sum: differential privacy of whole clients. Needs the
package dp-accounting (pip install "tfdist[privacy]"). Run it in any number of processes:

    python examples/federated_clients.py
    tfdist run -n 2 examples/federated_clients.py
"""

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tfdist

CLIENTS, ROUNDS = 1000, 60

session = tfdist.init(seed=1)
images, labels = load_digits(return_X_y=True)
x_train, x_test, y_train, y_test = train_test_split(
    (images / 16).astype("float32"), labels, test_size=0.25, stratify=labels, random_state=1
)
client = np.random.default_rng(1).permutation(np.arange(len(x_train)) % CLIENTS)

model = keras.Sequential(
    [keras.Input((64,)), keras.layers.Dense(10, kernel_initializer="zeros")]
)
model.compile(
    optimizer=keras.optimizers.SGD(0.5),  # of the clients
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
history = tfdist.fit(
    model,
    x_train,
    y_train,
    batch_size=2,
    epochs=ROUNDS,
    verbose=2,
    federated=tfdist.FedAvg(
        local_steps=2,
        clients=client,
        weighting="uniform",
        server_optimizer=keras.optimizers.SGD(1.0, momentum=0.9),
        privacy=tfdist.ClientDP(
            l2_norm_clip=0.5, target_epsilon=4.0, delta=1e-4, sampling_probability=0.1
        ),
    ),
)
tested = tfdist.evaluate(model, x_test, y_test, verbose=0, return_dict=True)
if session.is_chief:
    print(f"epsilon, of whole clients: {history.privacy.epsilon:.2f}")
    print(f"held-out accuracy: {tested['accuracy']:.1%}")
    print(history.privacy.statement())
