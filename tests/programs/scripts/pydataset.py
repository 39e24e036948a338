"""Batches made in Python: a `PyDataset` whose order changes, with class weights."""

import keras
import numpy as np
import outcome
from keras import layers
from sklearn.datasets import load_breast_cancer

keras.utils.set_random_seed(1)
x, y = load_breast_cancer(return_X_y=True)
x = ((x - x.mean(0)) / x.std(0)).astype("float32")


class Sequence(keras.utils.PyDataset):
    def __init__(self, batch_size, **kwargs):
        super().__init__(**kwargs)
        self.batch_size = batch_size
        self.order = np.arange(len(x))

    def __len__(self):
        return -(-len(x) // self.batch_size)

    def __getitem__(self, index):
        rows = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        return x[rows], y[rows]

    def on_epoch_end(self):
        self.order = self.order[::-1]


model = keras.Sequential(
    [keras.Input((30,)), layers.Dense(8, "tanh"), layers.Dense(1, "sigmoid")]
)
model.compile(
    keras.optimizers.SGD(0.05),
    "binary_crossentropy",
    weighted_metrics=["accuracy"],
    metrics=[keras.metrics.Precision(name="precision")],
)
history = model.fit(
    Sequence(32, workers=2), class_weight={0: 2.0, 1: 0.7}, epochs=2, shuffle=False, verbose=0
)
outcome.save(model, history)
