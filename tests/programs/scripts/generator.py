"""Endless generators: `steps_per_epoch`, and one for validation with `validation_steps`."""

import keras
import numpy as np
import outcome
from keras import layers
from sklearn.datasets import load_breast_cancer

keras.utils.set_random_seed(1)
x, y = load_breast_cancer(return_X_y=True)
x = ((x - x.mean(0)) / x.std(0)).astype("float32")


def batches(seed):
    rng = np.random.default_rng(seed)
    while True:
        rows = rng.integers(0, len(x), 33)
        yield x[rows], y[rows]


model = keras.Sequential(
    [keras.Input((30,)), layers.Dense(8, "tanh"), layers.Dense(1, "sigmoid")]
)
model.compile(keras.optimizers.SGD(0.05), "binary_crossentropy", metrics=["accuracy"])
history = model.fit(
    batches(1),
    steps_per_epoch=10,
    epochs=2,
    validation_data=batches(2),
    validation_steps=2,
    verbose=0,
)
outcome.save(model, history)
