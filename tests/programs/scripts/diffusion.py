"""A diffusion model: noise and times for each row, a moving average updated in the step."""

import keras
import outcome
import tensorflow as tf
from keras import layers, ops
from sklearn.datasets import load_digits

keras.utils.set_random_seed(1)
images = load_digits().data[:960].astype("float32")


def network():
    noisy, rate = keras.Input((64,)), keras.Input((1,))
    x = layers.Dense(32, activation="tanh")(layers.Concatenate()([noisy, rate]))
    return keras.Model([noisy, rate], layers.Dense(64)(x))


class DiffusionModel(keras.Model):
    def __init__(self):
        super().__init__()
        self.normalizer = layers.Normalization()
        self.network = network()
        self.ema_network = keras.models.clone_model(self.network)
        self.seed_generator = keras.random.SeedGenerator(3)

    def compile(self, **kwargs):
        super().compile(**kwargs)
        self.noise_loss_tracker = keras.metrics.Mean(name="n_loss")

    @property
    def metrics(self):
        return [self.noise_loss_tracker]

    def train_step(self, images):
        images = self.normalizer(images, training=True)
        shape = ops.shape(images)
        noises = keras.random.normal(shape, seed=self.seed_generator)
        times = keras.random.uniform((shape[0], 1), seed=self.seed_generator)
        noisy = ops.cos(times) * images + ops.sin(times) * noises
        with tf.GradientTape() as tape:
            predicted = self.network([noisy, times], training=True)
            noise_loss = self.loss(noises, predicted)
        gradients = tape.gradient(noise_loss, self.network.trainable_weights)
        self.optimizer.apply_gradients(
            zip(gradients, self.network.trainable_weights, strict=True)
        )
        self.noise_loss_tracker.update_state(noise_loss)
        for weight, average in zip(self.network.weights, self.ema_network.weights, strict=True):
            average.assign(0.9 * average + 0.1 * weight)
        return {metric.name: metric.result() for metric in self.metrics}


model = DiffusionModel()
model.normalizer.adapt(images)
model.compile(
    optimizer=keras.optimizers.AdamW(1e-3, weight_decay=1e-4),
    loss=keras.losses.mean_squared_error,
)
history = model.fit(images, batch_size=64, epochs=2, shuffle=False, verbose=0)
outcome.save([model.network, model.ema_network], history)
