"""Two hospitals train one model. The records of a hospital do not leave it.

The first hospital has twenty times as many records as the second, mostly of healthy patients.
The results are those of one process that has all records:

    python examples/own_records.py
    tfdist run -n 2 examples/own_records.py
"""

import keras
import numpy as np
from sklearn.datasets import load_breast_cancer

import tfdist

SEED = 1


def records_of(hospital):
    """Returns the training records of a hospital: measurements and diagnoses."""
    x, y = load_breast_cancer(return_X_y=True)
    x = ((x - x.mean(0)) / x.std(0)).astype("float32")
    x, y = x[:480], 1 - y[:480]  # 1 is malignant
    second = np.flatnonzero(y == 1)[:22]
    rows = second if hospital == 1 else np.setdiff1d(np.arange(len(y)), second)
    return x[rows], y[rows]


session = tfdist.init(seed=SEED)
place = session.strategy.place

if place.num_workers == 1:
    x, y = (np.concatenate(parts) for parts in zip(records_of(0), records_of(1), strict=True))
elif place.num_workers == 2:
    x, y = records_of(place.worker_index)
else:
    raise SystemExit("There are two hospitals: start this script with `tfdist run -n 2`.")

model = keras.Sequential(
    [
        keras.Input((30,)),
        keras.layers.Dense(16, activation="relu"),
        keras.layers.Dense(1),
    ]
)
model.compile(
    optimizer=keras.optimizers.Adam(0.01),
    loss=keras.losses.BinaryCrossentropy(from_logits=True),
)
tfdist.fit(
    model,
    x,
    y,
    batch_size=32,
    epochs=5,
    class_weight="balanced",  # counted over both hospitals
    shard="local",
    verbose=2,
)

if session.is_chief:
    measurements, diagnoses = load_breast_cancer(return_X_y=True)
    held_out = ((measurements - measurements.mean(0)) / measurements.std(0))[480:].astype(
        "float32"
    )
    malignant = model.predict(held_out, verbose=0)[:, 0] > 0
    right = int((malignant == (diagnoses[480:] == 0)).sum())
    print(f"held out: {right} of {len(held_out)} right")
