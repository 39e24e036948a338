"""A stateful LSTM: each batch continues the sequences of the batch before."""

import keras
import numpy as np
import outcome
from keras import layers

keras.utils.set_random_seed(1)
BATCH = 8
series = np.sin(np.arange(BATCH * 240).reshape(BATCH, 240) / 7.0).astype("float32")
pieces = series.reshape(BATCH, 24, 10).transpose(1, 0, 2).reshape(-1, 10, 1)
x, y = pieces[:-BATCH], pieces[BATCH:, 0]

model = keras.Sequential(
    [keras.Input(batch_shape=(BATCH, 10, 1)), layers.LSTM(8, stateful=True), layers.Dense(1)]
)
model.compile(optimizer="adam", loss="mse")
histories = []
for _ in range(2):
    histories.append(model.fit(x, y, batch_size=BATCH, epochs=1, shuffle=False, verbose=0))
    model.layers[0].reset_states()
outcome.save(model, histories)
