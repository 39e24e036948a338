"""Texts of unequal length: ragged tensors in a dataset, padded for each batch."""

import keras
import numpy as np
import outcome
import tensorflow as tf
from keras import layers

keras.utils.set_random_seed(1)
rng = np.random.default_rng(6)
words = [rng.integers(1, 30, rng.integers(1, 15)) for _ in range(150)]
labels = np.array([(text > 15).mean() > 0.5 for text in words], "float32")
ragged = tf.ragged.constant([list(text) for text in words], dtype=tf.int32)

dataset = tf.data.Dataset.from_tensor_slices((ragged, labels)).batch(32)
dataset = dataset.map(lambda text, label: (text.to_tensor(0), label))
inputs = keras.Input((None,), dtype="int32")
x = layers.Embedding(30, 8, mask_zero=True)(inputs)
x = layers.GRU(6)(x)
model = keras.Model(inputs, layers.Dense(1, activation="sigmoid")(x))
model.compile("adam", "binary_crossentropy", metrics=["accuracy", "auc"])
history = model.fit(dataset, epochs=2, verbose=0)
predicted = model.predict(dataset.take(2).map(lambda text, _: text), verbose=0)
outcome.save(model, history, predicted=predicted)
