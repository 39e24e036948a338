"""Sparse features: sparse tensors in a dataset, and a sparse input."""

import keras
import numpy as np
import outcome
import scipy.sparse
import tensorflow as tf

keras.utils.set_random_seed(1)
matrix = scipy.sparse.random(400, 50, density=0.1, random_state=7, dtype="float32").tocoo()
totals = matrix.tocsr()
y = np.asarray(totals[:, :25].sum(1) > totals[:, 25:].sum(1)).astype("float32")

indices = np.stack([matrix.row, matrix.col], axis=1).astype("int64")
tensor = tf.sparse.reorder(tf.sparse.SparseTensor(indices, matrix.data, matrix.shape))
dataset = tf.data.Dataset.from_tensor_slices((tensor, y)).batch(32)

inputs = keras.Input((50,), sparse=True)
hidden = keras.layers.Dense(16, activation="tanh")(inputs)
model = keras.Model(inputs, keras.layers.Dense(1, activation="sigmoid")(hidden))
model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy", metrics=["accuracy"])
history = model.fit(dataset, epochs=2, verbose=0)
outcome.save(model, history)
