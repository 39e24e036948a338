"""Fifty clients train one model of scikit-learn's handwritten digits, each on its own images.

A client has images of few digits only. In each round ten clients train alone, and a server
averages what they have learned. The result does not depend on the number of processes:

    python examples/federated_digits.py
    tfdist run -n 2 examples/federated_digits.py
"""

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tfdist

CLIENTS, ROUNDS = 50, 40


def clients_of(labels):
    """Gives each image to a client, so that clients differ: Dirichlet(0.1) by digit."""
    random = np.random.default_rng(1)
    client = np.zeros(len(labels), int)
    for digit in range(10):
        rows = np.flatnonzero(labels == digit)
        client[rows] = random.choice(
            CLIENTS, size=len(rows), p=random.dirichlet(np.full(CLIENTS, 0.1))
        )
    return client


session = tfdist.init(seed=1)
images, labels = load_digits(return_X_y=True)
x_train, x_test, y_train, y_test = train_test_split(
    (images / 16).astype("float32"), labels, test_size=0.25, stratify=labels, random_state=1
)

model = keras.Sequential(
    [
        keras.Input((64,)),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(10),
    ]
)
model.compile(
    optimizer=keras.optimizers.SGD(0.1),  # of the clients
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
tfdist.fit(
    model,
    x_train,
    y_train,
    batch_size=16,
    epochs=ROUNDS,
    validation_data=(x_test, y_test),
    validation_freq=10,
    verbose=2,
    federated=tfdist.FedAvg(
        local_steps=8,
        clients=clients_of(y_train),
        clients_per_round=10,
        server_optimizer=keras.optimizers.Adam(0.01),  # FedAdam
    ),
)
accuracy = tfdist.evaluate(model, x_test, y_test, verbose=0, return_dict=True)["accuracy"]
if session.is_chief:
    print(f"held-out accuracy: {accuracy:.1%}")
