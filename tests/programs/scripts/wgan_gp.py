"""WGAN-GP: several critic steps in a step, a gradient of a gradient, `tf.random`."""

import keras
import outcome
import tensorflow as tf
from keras import layers
from sklearn.datasets import load_digits

keras.utils.set_random_seed(1)
images = load_digits().data[:1000].astype("float32") / 8 - 1

critic = keras.Sequential(
    [keras.Input((64,)), layers.Dense(32, activation="tanh"), layers.Dense(1)]
)
generator = keras.Sequential(
    [keras.Input((8,)), layers.Dense(32, "tanh"), layers.Dense(64, activation="tanh")]
)


class WGAN(keras.Model):
    def __init__(self, critic, generator, critic_steps=2, gp_weight=10.0):
        super().__init__()
        self.critic = critic
        self.generator = generator
        self.critic_steps = critic_steps
        self.gp_weight = gp_weight

    def compile(self, c_optimizer, g_optimizer):
        super().compile()
        self.c_optimizer = c_optimizer
        self.g_optimizer = g_optimizer

    def gradient_penalty(self, rows, real, fake):
        alpha = tf.random.uniform([rows, 1])
        between = real + alpha * (fake - real)
        with tf.GradientTape() as tape:
            tape.watch(between)
            score = self.critic(between, training=True)
        slope = tape.gradient(score, between)
        norm = tf.sqrt(tf.reduce_sum(tf.square(slope), axis=1) + 1e-12)
        return tf.reduce_mean((norm - 1.0) ** 2)

    def train_step(self, real):
        if isinstance(real, tuple):
            real = real[0]
        rows = tf.shape(real)[0]
        for _ in range(self.critic_steps):
            noise = tf.random.normal([rows, 8])
            with tf.GradientTape() as tape:
                fake = self.generator(noise, training=True)
                cost = tf.reduce_mean(self.critic(fake)) - tf.reduce_mean(self.critic(real))
                c_loss = cost + self.gp_weight * self.gradient_penalty(rows, real, fake)
            slopes = tape.gradient(c_loss, self.critic.trainable_variables)
            self.c_optimizer.apply_gradients(
                zip(slopes, self.critic.trainable_variables, strict=True)
            )
        noise = tf.random.normal([rows, 8])
        with tf.GradientTape() as tape:
            g_loss = -tf.reduce_mean(self.critic(self.generator(noise, training=True)))
        slopes = tape.gradient(g_loss, self.generator.trainable_variables)
        self.g_optimizer.apply_gradients(
            zip(slopes, self.generator.trainable_variables, strict=True)
        )
        return {"c_loss": c_loss, "g_loss": g_loss}


wgan = WGAN(critic, generator)
wgan.compile(
    c_optimizer=keras.optimizers.Adam(2e-4, beta_1=0.5, beta_2=0.9),
    g_optimizer=keras.optimizers.Adam(2e-4, beta_1=0.5, beta_2=0.9),
)
history = wgan.fit(images, batch_size=50, epochs=2, shuffle=False, verbose=0)
outcome.save([critic, generator], history)
