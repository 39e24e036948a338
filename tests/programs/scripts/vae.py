"""A variational autoencoder: a custom `train_step`, no `call`, noise from `keras.random`."""

import keras
import outcome
import tensorflow as tf
from keras import layers, ops
from sklearn.datasets import load_digits

keras.utils.set_random_seed(1)
images = load_digits().images[..., None].astype("float32") / 16


class Sampling(layers.Layer):
    """Draws a point from the distribution that the encoder describes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(1337)

    def call(self, inputs):
        mean, log_variance = inputs
        noise = keras.random.normal(ops.shape(mean), seed=self.seed_generator)
        return mean + ops.exp(0.5 * log_variance) * noise


encoder_input = keras.Input((8, 8, 1))
x = layers.Conv2D(8, 3, strides=2, padding="same", activation="tanh")(encoder_input)
x = layers.Dense(16, activation="tanh")(layers.Flatten()(x))
mean = layers.Dense(2, name="mean")(x)
log_variance = layers.Dense(2, name="log_variance")(x)
encoder = keras.Model(encoder_input, [mean, log_variance, Sampling()([mean, log_variance])])

latent = keras.Input((2,))
x = layers.Reshape((4, 4, 4))(layers.Dense(64, activation="tanh")(latent))
decoded = layers.Conv2DTranspose(1, 3, strides=2, padding="same", activation="sigmoid")(x)
decoder = keras.Model(latent, decoded)


class VAE(keras.Model):
    def __init__(self, encoder, decoder, **kwargs):
        super().__init__(**kwargs)
        self.encoder = encoder
        self.decoder = decoder
        self.total_tracker = keras.metrics.Mean(name="loss")
        self.reconstruction_tracker = keras.metrics.Mean(name="reconstruction_loss")
        self.kl_tracker = keras.metrics.Mean(name="kl_loss")

    @property
    def metrics(self):
        return [self.total_tracker, self.reconstruction_tracker, self.kl_tracker]

    def train_step(self, data):
        with tf.GradientTape() as tape:
            mean, log_variance, z = self.encoder(data)
            difference = keras.losses.binary_crossentropy(data, self.decoder(z))
            reconstruction = ops.mean(ops.sum(difference, axis=(1, 2)))
            kl = -0.5 * (1 + log_variance - ops.square(mean) - ops.exp(log_variance))
            kl = ops.mean(ops.sum(kl, axis=1))
            total = reconstruction + kl
        gradients = tape.gradient(total, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        self.total_tracker.update_state(total)
        self.reconstruction_tracker.update_state(reconstruction)
        self.kl_tracker.update_state(kl)
        return {
            "loss": self.total_tracker.result(),
            "reconstruction_loss": self.reconstruction_tracker.result(),
            "kl_loss": self.kl_tracker.result(),
        }


vae = VAE(encoder, decoder)
vae.compile(optimizer=keras.optimizers.Adam(1e-3))
history = vae.fit(images, epochs=2, batch_size=128, shuffle=False, verbose=0)
drawn = decoder.predict(ops.zeros((1, 2)), verbose=0)
outcome.save([encoder, decoder], history, drawn=drawn)
