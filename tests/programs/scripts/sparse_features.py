"""Sparse features: a SciPy matrix as `x`, and sparse tensors in a dataset."""

import keras
import numpy as np
import outcome
import scipy.sparse
import tensorflow as tf

keras.utils.set_random_seed(1)
rng = np.random.default_rng(7)
matrix = scipy.sparse.random(400, 50, density=0.1, random_state=7, dtype="float32").tocsr()
y = np.asarray(matrix[:, :25].sum(1) > matrix[:, 25:].sum(1)).astype("float32")


def make():
    inputs = keras.Input((50,), sparse=True)
    hidden = keras.layers.Dense(16, activation="tanh")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1, activation="sigmoid")(hidden))
    model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy", metrics=["accuracy"])
    return model


first, second = make(), make()
from_scipy = first.fit(matrix, y, batch_size=32, epochs=2, shuffle=False, verbose=0)

entries = matrix.tocoo()
indices = np.stack([entries.row, entries.col], axis=1).astype("int64")
tensor = tf.sparse.SparseTensor(indices, entries.data, entries.shape)
dataset = tf.data.Dataset.from_tensor_slices((tf.sparse.reorder(tensor), y)).batch(32)
from_dataset = second.fit(dataset, epochs=2, verbose=0)
outcome.save([first, second], [from_scipy, from_dataset])
