"""Gradients summed in variables of the model; the optimizer runs in every fourth step."""

import keras
import outcome
import tensorflow as tf
from sklearn.datasets import load_digits

keras.utils.set_random_seed(1)
x, y = load_digits(return_X_y=True)
x = x[:1000].astype("float32") / 16
y = y[:1000]


class AccumulatingModel(keras.Model):
    def __init__(self, n_gradients, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.n_gradients = tf.constant(n_gradients, dtype=tf.int32)
        self.n_step = tf.Variable(0, dtype=tf.int32, trainable=False)
        self.sums = [
            tf.Variable(tf.zeros(variable.shape), trainable=False)
            for variable in self.trainable_variables
        ]

    def train_step(self, data):
        self.n_step.assign_add(1)
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)
        gradients = tape.gradient(loss, self.trainable_variables)
        for total, gradient in zip(self.sums, gradients, strict=True):
            total.assign_add(gradient / tf.cast(self.n_gradients, tf.float32))
        tf.cond(tf.equal(self.n_step, self.n_gradients), self.apply_sums, lambda: None)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics}

    def apply_sums(self):
        self.optimizer.apply_gradients(zip(self.sums, self.trainable_variables, strict=True))
        self.n_step.assign(0)
        for total in self.sums:
            total.assign(tf.zeros_like(total))


inputs = keras.Input((64,))
hidden = keras.layers.Dense(16, activation="tanh")(inputs)
outputs = keras.layers.Dense(10)(hidden)
model = AccumulatingModel(4, inputs=inputs, outputs=outputs)
model.compile(
    optimizer=keras.optimizers.SGD(0.2, momentum=0.9),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
history = model.fit(x, y, batch_size=32, epochs=2, shuffle=False, verbose=0)
outcome.save(model, history)
