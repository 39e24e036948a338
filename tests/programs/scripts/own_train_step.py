"""The guide on customizing `fit`: custom steps, custom trackers, sample weights."""

import keras
import numpy as np
import outcome
import tensorflow as tf
from sklearn.datasets import load_breast_cancer

keras.utils.set_random_seed(1)
x, y = load_breast_cancer(return_X_y=True)
x = ((x - x.mean(0)) / x.std(0)).astype("float32")
y = y[:, None].astype("float32")
weights = np.where(y[:, 0] == 0, 2.0, 1.0).astype("float32")

loss_tracker = keras.metrics.Mean(name="loss")
mae_metric = keras.metrics.MeanAbsoluteError(name="mae")
loss_fn = keras.losses.MeanSquaredError()


class CustomModel(keras.Model):
    def train_step(self, data):
        x, y, sample_weight = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = loss_fn(y, y_pred, sample_weight=sample_weight)
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply(gradients, self.trainable_weights)
        loss_tracker.update_state(loss)
        mae_metric.update_state(y, y_pred, sample_weight=sample_weight)
        return {"loss": loss_tracker.result(), "mae": mae_metric.result()}

    def test_step(self, data):
        x, y = data
        y_pred = self(x, training=False)
        loss_tracker.update_state(loss_fn(y, y_pred))
        mae_metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics}

    @property
    def metrics(self):
        return [loss_tracker, mae_metric]


inputs = keras.Input((30,))
hidden = keras.layers.Dense(16, activation="tanh")(inputs)
model = CustomModel(inputs, keras.layers.Dense(1, activation="sigmoid")(hidden))
model.compile(optimizer=keras.optimizers.SGD(0.1, momentum=0.9, clipnorm=0.2))
history = model.fit(
    x[:500],
    y[:500],
    sample_weight=weights[:500],
    epochs=2,
    batch_size=32,
    shuffle=False,
    validation_data=(x[500:], y[500:]),
    verbose=0,
)
result = model.evaluate(x[500:], y[500:], verbose=0, return_dict=True)
outcome.save(model, history, **result)
