"""Ragged tensors as the input of the model."""

import keras
import numpy as np
import outcome
import tensorflow as tf
from keras import layers

keras.utils.set_random_seed(1)
rng = np.random.default_rng(6)
words = [list(rng.integers(1, 30, rng.integers(1, 15))) for _ in range(300)]
labels = np.array([np.mean(text) > 15 for text in words], "float32")
dataset = tf.data.Dataset.from_tensor_slices(
    (tf.ragged.constant(words, dtype=tf.int32), labels)
).batch(32)


class BagOfWords(keras.Model):
    def __init__(self):
        super().__init__()
        self.embedding = layers.Embedding(30, 8)
        self.dense = layers.Dense(1, activation="sigmoid")

    def call(self, words):
        vectors = tf.ragged.map_flat_values(self.embedding, words)
        return self.dense(tf.reduce_mean(vectors, axis=1))


model = BagOfWords()
model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
history = model.fit(dataset, epochs=2, verbose=0)
outcome.save(model, history)
