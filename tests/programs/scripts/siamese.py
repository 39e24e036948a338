"""A siamese network: triplets of a zipped `tf.data`, an unreduced loss for each row."""

import keras
import numpy as np
import outcome
import tensorflow as tf
from keras import layers
from sklearn.datasets import load_digits

keras.utils.set_random_seed(1)
x, y = load_digits(return_X_y=True)
x = x.astype("float32") / 16
rng = np.random.default_rng(2)
anchors = rng.permutation(len(x))[:500]
positives = np.array([rng.choice(np.flatnonzero(y == y[row])) for row in anchors])
negatives = np.array([rng.choice(np.flatnonzero(y != y[row])) for row in anchors])

anchor_dataset = tf.data.Dataset.from_tensor_slices(x[anchors])
positive_dataset = tf.data.Dataset.from_tensor_slices(x[positives])
negative_dataset = tf.data.Dataset.from_tensor_slices(x[negatives])
dataset = tf.data.Dataset.zip((anchor_dataset, positive_dataset, negative_dataset))
dataset = dataset.map(lambda *images: tuple(image * 2.0 - 1.0 for image in images))
train_dataset = dataset.take(400).batch(32, drop_remainder=False).prefetch(tf.data.AUTOTUNE)
val_dataset = dataset.skip(400).batch(32).prefetch(tf.data.AUTOTUNE)


class DistanceLayer(layers.Layer):
    def call(self, anchor, positive, negative):
        ap = tf.reduce_sum(tf.square(anchor - positive), -1)
        an = tf.reduce_sum(tf.square(anchor - negative), -1)
        return ap, an


embedding = keras.Sequential(
    [keras.Input((64,)), layers.Dense(32, "tanh"), layers.Dense(8)], name="embedding"
)
inputs = [keras.Input((64,), name=name) for name in ("anchor", "positive", "negative")]
network = keras.Model(inputs, DistanceLayer()(*[embedding(one) for one in inputs]))


class SiameseModel(keras.Model):
    def __init__(self, siamese_network, margin=0.5):
        super().__init__()
        self.siamese_network = siamese_network
        self.margin = margin
        self.loss_tracker = keras.metrics.Mean(name="loss")

    def call(self, inputs):
        return self.siamese_network(inputs)

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = self._compute_loss(data)
        gradients = tape.gradient(loss, self.siamese_network.trainable_weights)
        self.optimizer.apply_gradients(
            zip(gradients, self.siamese_network.trainable_weights, strict=True)
        )
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}

    def test_step(self, data):
        self.loss_tracker.update_state(self._compute_loss(data))
        return {"loss": self.loss_tracker.result()}

    def _compute_loss(self, data):
        ap, an = self.siamese_network(data)
        return tf.nn.softplus(ap - an + self.margin)

    @property
    def metrics(self):
        return [self.loss_tracker]


model = SiameseModel(network)
model.compile(optimizer=keras.optimizers.Adam(1e-3))
history = model.fit(train_dataset, epochs=2, validation_data=val_dataset, verbose=0)
outcome.save(embedding, history)
