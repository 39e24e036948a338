"""Metric learning: a batch is an anchor and a positive of each class, all compared."""

import keras
import numpy as np
import outcome
import tensorflow as tf
from keras import layers
from sklearn.datasets import load_digits

keras.utils.set_random_seed(1)
x, y = load_digits(return_X_y=True)
x = x.astype("float32") / 16
rows_of = [np.flatnonzero(y == label) for label in range(10)]


class AnchorPositivePairs(keras.utils.PyDataset):
    def __init__(self, length):
        super().__init__()
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        pairs = np.stack([rng.choice(rows, 2, replace=False) for rows in rows_of], axis=1)
        return x[pairs]  # (2, 10, 64)


class EmbeddingModel(keras.Model):
    def train_step(self, data):
        if isinstance(data, tuple):
            data = data[0]
        anchors, positives = data[0], data[1]
        with tf.GradientTape() as tape:
            anchors = self(anchors, training=True)
            positives = self(positives, training=True)
            similarities = keras.ops.einsum("ae,pe->ap", anchors, positives) / 0.2
            labels = keras.ops.arange(10)
            loss = self.compute_loss(y=labels, y_pred=similarities)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(labels, similarities)
        return {metric.name: metric.result() for metric in self.metrics}


inputs = keras.Input((64,))
hidden = layers.Dense(32, activation="tanh")(inputs)
model = EmbeddingModel(inputs, layers.UnitNormalization()(layers.Dense(8)(hidden)))
model.compile(
    optimizer=keras.optimizers.Adam(1e-3),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
history = model.fit(AnchorPositivePairs(length=30), epochs=2, shuffle=False, verbose=0)
outcome.save(model, history)
