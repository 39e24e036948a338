"""A forecast: windows of `timeseries_dataset_from_array`, an LSTM, early stopping."""

import keras
import numpy as np
import outcome

keras.utils.set_random_seed(1)
time = np.arange(1500)
noise = np.random.default_rng(8).normal(0, 0.1, (1500, 2))
values = np.stack([np.sin(time / 20), np.cos(time / 35)], 1) + noise
values = values.astype("float32")


def windows(begin, end):
    return keras.utils.timeseries_dataset_from_array(
        values[begin:end],
        targets=values[begin + 24 : end, 0],
        sequence_length=12,
        sampling_rate=2,
        sequence_stride=2,
        batch_size=64,
    )


train, validation = windows(0, 1100), windows(1100, 1500)
inputs = keras.Input((12, 2))
model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.LSTM(8)(inputs)))
model.compile(optimizer=keras.optimizers.Adam(0.001), loss="mse")
checkpoint = keras.callbacks.ModelCheckpoint(
    "model_checkpoint.weights.h5", monitor="val_loss", save_weights_only=True,
    save_best_only=True,
)  # fmt: skip
history = model.fit(
    train,
    epochs=3,
    validation_data=validation,
    callbacks=[keras.callbacks.EarlyStopping(patience=5), checkpoint],
    verbose=0,
)
model.load_weights("model_checkpoint.weights.h5")
for x, _ in validation.take(1):
    predicted = model.predict(x, verbose=0)
outcome.save(model, history, predicted=predicted)
