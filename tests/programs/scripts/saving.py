"""Saving: a model, its weights, an export, TensorFlow's checkpoints; training continues."""

import keras
import numpy as np
import outcome
import tensorflow as tf
from sklearn.datasets import load_digits

keras.utils.set_random_seed(1)
x, y = load_digits(return_X_y=True)
x = x.astype("float32") / 16


@keras.saving.register_keras_serializable("programs")
class Scale(keras.layers.Layer):
    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, inputs):
        return inputs * self.factor

    def get_config(self):
        return {**super().get_config(), "factor": self.factor}


model = keras.Sequential(
    [keras.Input((64,)), Scale(2.0), keras.layers.Dense(16, "tanh"), keras.layers.Dense(10)]
)
model.compile(
    keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
)
first = model.fit(x[:960], y[:960], epochs=1, shuffle=False, verbose=0)
model.save("model.keras")
model.save_weights("model.weights.h5")

loaded = keras.models.load_model("model.keras")
second = loaded.fit(x[:960], y[:960], epochs=1, shuffle=False, verbose=0)
model.load_weights("model.weights.h5")
checkpoint = tf.train.Checkpoint(model=model)
manager = tf.train.CheckpointManager(checkpoint, "checkpoints", max_to_keep=1)


class Manage(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        manager.save()


third = model.fit(x[:960], y[:960], epochs=3, shuffle=False, verbose=0, callbacks=[Manage()])
trained = model.get_weights()
model.set_weights([0 * weight for weight in trained])
checkpoint.restore(manager.latest_checkpoint)
assert all(map(np.array_equal, model.get_weights(), trained))

loaded.export("exported", verbose=False)
reloaded = tf.saved_model.load("exported")
served = reloaded.serve(x[960:970])
predicted = loaded.predict(x[960:970], verbose=0)
np.testing.assert_allclose(served, predicted, atol=1e-4)
outcome.save([model, loaded], [first, second, third], served=served)
