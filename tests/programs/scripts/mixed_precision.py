"""Half precision: a policy, and a step that scales its loss by hand."""

import keras
import outcome
import tensorflow as tf
from sklearn.datasets import load_digits

keras.utils.set_random_seed(1)
keras.mixed_precision.set_global_policy("mixed_float16")
x, y = load_digits(return_X_y=True)
x = x[:1000].astype("float32") / 16
y = y[:1000]
loss_fn = keras.losses.SparseCategoricalCrossentropy()


class Scaled(keras.Model):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = loss_fn(y, y_pred)
            scaled_loss = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled_loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


def layers():
    inputs = keras.Input((64,))
    hidden = keras.layers.Dense(16, activation="tanh")(inputs)
    logits = keras.layers.Dense(10)(hidden)
    return inputs, keras.layers.Activation("softmax", dtype="float32")(logits)


plain = keras.Model(*layers())
plain.compile(keras.optimizers.SGD(0.1), loss_fn, metrics=["accuracy"])
history = plain.fit(x, y, batch_size=50, epochs=1, shuffle=False, verbose=0)
assert isinstance(plain.optimizer, keras.optimizers.LossScaleOptimizer)

scaled = Scaled(*layers())
inner = keras.optimizers.SGD(0.1)
scaled.compile(keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**10))
history_of_scaled = scaled.fit(x, y, batch_size=50, epochs=1, shuffle=False, verbose=0)
outcome.save([plain, scaled], [history, history_of_scaled])
