"""A GAN: two optimizers in a custom `compile`, not built before the first step."""

import keras
import outcome
import tensorflow as tf
from keras import layers, ops
from sklearn.datasets import load_digits

keras.utils.set_random_seed(1)
images = load_digits().data.astype("float32") / 16
dataset = tf.data.Dataset.from_tensor_slices(images[:1500])
dataset = dataset.shuffle(buffer_size=1024).batch(64)

LATENT = 16
discriminator = keras.Sequential(
    [keras.Input((64,)), layers.Dense(32, activation="tanh"), layers.Dense(1)],
    name="discriminator",
)
generator = keras.Sequential(
    [
        keras.Input((LATENT,)),
        layers.Dense(32, activation="tanh"),
        layers.Dense(64, activation="sigmoid"),
    ],
    name="generator",
)


class GAN(keras.Model):
    def __init__(self, discriminator, generator, latent_dim):
        super().__init__()
        self.discriminator = discriminator
        self.generator = generator
        self.latent_dim = latent_dim
        self.seed_generator = keras.random.SeedGenerator(1337)
        self.d_loss_metric = keras.metrics.Mean(name="d_loss")
        self.g_loss_metric = keras.metrics.Mean(name="g_loss")

    def compile(self, d_optimizer, g_optimizer, loss_fn):
        super().compile()
        self.d_optimizer = d_optimizer
        self.g_optimizer = g_optimizer
        self.loss_fn = loss_fn

    @property
    def metrics(self):
        return [self.d_loss_metric, self.g_loss_metric]

    def train_step(self, real_images):
        rows = ops.shape(real_images)[0]
        points = keras.random.normal((rows, self.latent_dim), seed=self.seed_generator)
        generated = self.generator(points)
        combined = ops.concatenate([generated, real_images], axis=0)
        labels = ops.concatenate([ops.ones((rows, 1)), ops.zeros((rows, 1))], axis=0)
        labels += 0.05 * tf.random.uniform(tf.shape(labels))
        with tf.GradientTape() as tape:
            d_loss = self.loss_fn(labels, self.discriminator(combined))
        gradients = tape.gradient(d_loss, self.discriminator.trainable_weights)
        self.d_optimizer.apply_gradients(
            zip(gradients, self.discriminator.trainable_weights, strict=True)
        )

        points = keras.random.normal((rows, self.latent_dim), seed=self.seed_generator)
        misleading = ops.zeros((rows, 1))
        with tf.GradientTape() as tape:
            g_loss = self.loss_fn(misleading, self.discriminator(self.generator(points)))
        gradients = tape.gradient(g_loss, self.generator.trainable_weights)
        self.g_optimizer.apply_gradients(
            zip(gradients, self.generator.trainable_weights, strict=True)
        )
        self.d_loss_metric.update_state(d_loss)
        self.g_loss_metric.update_state(g_loss)
        return {"d_loss": self.d_loss_metric.result(), "g_loss": self.g_loss_metric.result()}


class GANMonitor(keras.callbacks.Callback):
    """Generates images after each epoch."""

    def on_epoch_end(self, epoch, logs=None):
        points = keras.random.normal((3, LATENT), seed=epoch)
        self.model.generator(points)


gan = GAN(discriminator, generator, latent_dim=LATENT)
gan.compile(
    d_optimizer=keras.optimizers.Adam(learning_rate=0.0003),
    g_optimizer=keras.optimizers.Adam(learning_rate=0.0003),
    loss_fn=keras.losses.BinaryCrossentropy(from_logits=True),
)
history = gan.fit(dataset, epochs=2, callbacks=[GANMonitor()], verbose=0)
outcome.save([discriminator, generator], history)
