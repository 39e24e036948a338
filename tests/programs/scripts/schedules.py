"""Learning rates: schedules, callbacks, and rates that a custom callback assigns."""

import keras
import outcome
from keras import layers
from sklearn.datasets import load_digits

keras.utils.set_random_seed(1)
x, y = load_digits(return_X_y=True)
x = x[:960].astype("float32") / 16
y = y[:960]


class Warmup(keras.callbacks.Callback):
    """Assigns the rate before each batch."""

    def on_train_batch_begin(self, batch, logs=None):
        if self.model.optimizer.iterations < 10:
            self.model.optimizer.learning_rate = 0.002 * (batch + 1)


class Cut(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.optimizer.learning_rate.assign(self.model.optimizer.learning_rate * 0.5)


def train(rate, callbacks, epochs=2):
    model = keras.Sequential(
        [keras.Input((64,)), layers.Dense(16, "tanh"), layers.Dense(10, "softmax")]
    )
    model.compile(keras.optimizers.SGD(rate, momentum=0.9), "sparse_categorical_crossentropy")
    history = model.fit(
        x, y, epochs=epochs, callbacks=callbacks, shuffle=False, validation_split=0.2, verbose=0
    )
    return model, history


decay = keras.optimizers.schedules.CosineDecay(0.0, 40, warmup_target=0.1, warmup_steps=8)
halved = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5**epoch)
plateau = keras.callbacks.ReduceLROnPlateau(factor=0.1, patience=1, min_delta=10.0)
runs = [
    train(decay, []),
    train(0.1, [halved, plateau], epochs=4),
    train(0.01, [Warmup(), Cut()]),
]
outcome.save([model for model, _ in runs], [history for _, history in runs])
