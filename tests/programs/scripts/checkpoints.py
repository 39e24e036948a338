"""Callbacks that save models: the best one, backups, averaged weights, early stopping."""

import keras
import outcome
from keras import layers
from sklearn.datasets import load_digits

keras.utils.set_random_seed(1)
x, y = load_digits(return_X_y=True)
x = x.astype("float32") / 16


def make():
    model = keras.Sequential(
        [keras.Input((64,)), layers.Dense(16, "tanh"), layers.Dense(10, "softmax")]
    )
    optimizer = keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.9)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise RuntimeError("interrupted")


rows = {"x": x[:960], "y": y[:960], "batch_size": 96, "shuffle": False, "verbose": 0}
model = make()
try:
    backup = keras.callbacks.BackupAndRestore("backup")
    model.fit(**rows, epochs=4, callbacks=[backup, Interrupt()])
except RuntimeError:
    pass
went_on = model.fit(**rows, epochs=4, callbacks=[keras.callbacks.BackupAndRestore("backup")])
assert went_on.epoch == [2, 3], went_on.epoch

other = make()
history = other.fit(
    **rows,
    epochs=4,
    validation_data=(x[960:], y[960:]),
    callbacks=[
        keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
        keras.callbacks.ModelCheckpoint("best.keras", save_best_only=True),
        keras.callbacks.ModelCheckpoint("{epoch:02d}.weights.h5", save_weights_only=True),
        keras.callbacks.EarlyStopping(patience=1, min_delta=0.3, restore_best_weights=True),
        keras.callbacks.CSVLogger("log.csv"),
    ],
)
best = keras.models.load_model("best.keras")
outcome.save([model, other, best], [went_on, history])
