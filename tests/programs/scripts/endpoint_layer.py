"""An endpoint layer: targets are inputs, the loss is added by `add_loss`."""

import keras
import outcome
from keras import layers
from sklearn.datasets import load_breast_cancer

keras.utils.set_random_seed(1)
x, y = load_breast_cancer(return_X_y=True)
x = ((x - x.mean(0)) / x.std(0)).astype("float32")
y = y[:, None].astype("float32")


class LogisticEndpoint(layers.Layer):
    def __init__(self, name=None):
        super().__init__(name=name)
        self.loss_fn = keras.losses.BinaryCrossentropy(from_logits=True)
        self.accuracy_fn = keras.metrics.BinaryAccuracy(threshold=0.0, name="accuracy")

    def call(self, targets, logits, sample_weight=None):
        self.add_loss(self.loss_fn(targets, logits, sample_weight))
        self.accuracy_fn.update_state(targets, logits, sample_weight)
        return keras.ops.sigmoid(logits)


inputs = keras.Input((30,), name="inputs")
targets = keras.Input((1,), name="targets")
hidden = layers.Dense(16, activation="tanh", activity_regularizer="l2")(inputs)
predictions = LogisticEndpoint(name="predictions")(targets, layers.Dense(1)(hidden))
model = keras.Model([inputs, targets], predictions)
model.compile(optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
history = model.fit(
    {"inputs": x, "targets": y}, batch_size=50, epochs=2, shuffle=False, verbose=0
)
outcome.save(model, history)
