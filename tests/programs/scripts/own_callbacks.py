"""Custom callbacks: they predict, evaluate, record, and stop the training."""

import keras
import numpy as np
import outcome
from keras import layers
from sklearn.datasets import load_digits

keras.utils.set_random_seed(1)
x, y = load_digits(return_X_y=True)
x = x.astype("float32") / 16
seen = {"predicted": [], "evaluated": [], "batch losses": [], "calls": []}


class Watch(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        seen["calls"].append(0)

    def on_train_batch_end(self, batch, logs=None):
        seen["batch losses"].append(logs["loss"])

    def on_epoch_end(self, epoch, logs=None):
        seen["predicted"].append(self.model.predict(x[-5:], verbose=0))
        seen["evaluated"].append(self.model.evaluate(x[-99:], y[-99:], verbose=0))
        logs["own"] = float(np.max(seen["predicted"][-1]))

    def on_test_end(self, logs=None):
        seen["calls"].append(1)

    def on_predict_end(self, logs=None):
        seen["calls"].append(2)


class EarlyStoppingAtMinLoss(keras.callbacks.Callback):
    """Stops where the loss no longer falls by enough, with the best weights."""

    def on_train_begin(self, logs=None):
        self.best = np.inf
        self.best_weights = None

    def on_epoch_end(self, epoch, logs=None):
        if logs["loss"] < self.best - 0.02:
            self.best = logs["loss"]
            self.best_weights = self.model.get_weights()
        else:
            self.model.stop_training = True
            self.model.set_weights(self.best_weights)


model = keras.Sequential(
    [keras.Input((64,)), layers.Dense(16, "tanh"), layers.Dense(10, "softmax")]
)
model.compile(keras.optimizers.Adam(0.02), "sparse_categorical_crossentropy")
told = []
history = model.fit(
    x[:960],
    y[:960],
    batch_size=96,
    epochs=8,
    shuffle=False,
    callbacks=[
        Watch(),
        keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: told.append(epoch)),
        EarlyStoppingAtMinLoss(),
        keras.callbacks.TerminateOnNaN(),
    ],
    verbose=0,
)

broken = keras.Sequential([keras.Input((64,)), layers.Dense(1)])
broken.compile("sgd", "mse")
targets = np.where(np.arange(640) == 500, np.nan, 0.0)[:, None]
stopped = broken.fit(
    x[:640],
    targets,
    epochs=3,
    shuffle=False,
    callbacks=[keras.callbacks.TerminateOnNaN()],
    verbose=0,
)
outcome.save(model, history, told=told, epochs_with_nan=len(stopped.epoch), **seen)
