"""Loops of `train_on_batch`, `test_on_batch` and `predict_on_batch`."""

import keras
import numpy as np
import outcome
from sklearn.datasets import load_iris

keras.utils.set_random_seed(1)
x, y = load_iris(return_X_y=True)
order = np.random.permutation(len(x))
x, y = x[order].astype("float32"), y[order]

model = keras.Sequential(
    [keras.Input((4,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(3, "softmax")]
)
model.compile(
    optimizer=keras.optimizers.Adam(0.02),
    loss="sparse_categorical_crossentropy",
    metrics=["accuracy"],
)
losses = []
for _ in range(3):
    model.reset_metrics()
    for start in range(0, 120, 25):  # the last batch has 20 rows
        rows = slice(start, min(start + 25, 120))
        logs = model.train_on_batch(x[rows], y[rows], return_dict=True)
    losses.append(logs["loss"])
    weighted = model.train_on_batch(x[:7], y[:7], class_weight={0: 2.0, 1: 1.0, 2: 0.5})
model.reset_metrics()
tested = model.test_on_batch(x[120:], y[120:], return_dict=True)
predicted = model.predict_on_batch(x[120:])
outcome.save(
    model, losses=losses, weighted=weighted, tested=tested["loss"], predicted=predicted
)
