"""A sparse matrix of SciPy given to `fit`."""

import keras
import numpy as np
import outcome
import scipy.sparse

keras.utils.set_random_seed(1)
x = scipy.sparse.random(400, 50, density=0.1, random_state=7, dtype="float32").tocsr()
y = np.asarray(x[:, :25].sum(1) > x[:, 25:].sum(1)).astype("float32")

inputs = keras.Input((50,), sparse=True)
hidden = keras.layers.Dense(16, activation="tanh")(inputs)
model = keras.Model(inputs, keras.layers.Dense(1, activation="sigmoid")(hidden))
model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy", metrics=["accuracy"])
history = model.fit(x, y, batch_size=32, epochs=2, shuffle=False, verbose=0)
outcome.save(model, history)
