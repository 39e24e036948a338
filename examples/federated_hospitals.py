"""Three hospitals train one model of breast tumours, each on the records that it has.

A hospital's records never leave it. In each round a hospital trains alone, and what it sends
is masked: the others see the sum of all three updates, and nothing of a single one. Needs the
package cryptography (pip install "tfdist[secure]"):

    tfdist run -n 3 examples/federated_hospitals.py
    tfdist run -n 3 --strategy horovod examples/federated_hospitals.py
"""

import keras
import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

import tfdist

ROUNDS = 15


def records_of(hospital, x, y):
    """Reads a hospital's records. They differ: the first one sees most malignant tumours."""
    random = np.random.default_rng(1)
    shares = np.where(y[:, None] == 0, [0.6, 0.3, 0.1], [0.2, 0.3, 0.5])
    of_record = (random.random(len(y))[:, None] > shares.cumsum(1)).sum(1)
    return x[of_record == hospital], y[of_record == hospital]


session = tfdist.init(seed=1)
hospital = session.strategy.place.worker_index
measures, benign = load_breast_cancer(return_X_y=True)
# The range of a measure is common knowledge. Hospitals tell each other no statistics.
measures = (np.log1p(measures) - np.log1p(measures).mean(0)) / np.log1p(measures).std(0)
x_train, x_test, y_train, y_test = train_test_split(
    measures.astype("float32"), benign, test_size=0.3, stratify=benign, random_state=1
)
x, y = records_of(hospital, x_train, y_train)

model = keras.Sequential([keras.Input((30,)), keras.layers.Dense(1)])
model.compile(
    optimizer=keras.optimizers.SGD(0.1),
    loss=keras.losses.BinaryCrossentropy(from_logits=True),
    metrics=[keras.metrics.BinaryAccuracy(threshold=0.0)],
)
history = tfdist.fit(
    model,
    x,
    y,
    batch_size=16,
    epochs=ROUNDS,
    verbose=2,
    shard="local",
    federated=tfdist.FedAvg(local_epochs=1, secure=tfdist.SecureSum()),
)
tested = tfdist.evaluate(model, x_test, y_test, verbose=0, return_dict=True)
if session.is_chief:
    print(f"records of this hospital: {len(x)}")
    print(f"clipped values: {history.history['secure_sum_clipped'][-1]:.1%}")
    print(f"held-out accuracy: {tested['binary_accuracy']:.1%}")
