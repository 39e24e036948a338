"""A supervised contrastive loss: each row of a batch is compared with all others."""

import keras
import outcome
from keras import layers, ops
from sklearn.datasets import load_digits

keras.utils.set_random_seed(1)
x, y = load_digits(return_X_y=True)
x, y = x[:900].astype("float32") / 16, y[:900]


class SupervisedContrastiveLoss(keras.losses.Loss):
    def __init__(self, temperature=0.5, name=None):
        super().__init__(name=name)
        self.temperature = temperature

    def __call__(self, labels, features, sample_weight=None):
        features = ops.normalize(features, axis=1)
        logits = ops.matmul(features, ops.transpose(features)) / self.temperature
        labels = ops.reshape(labels, (-1, 1))
        same = ops.cast(ops.equal(labels, ops.transpose(labels)), "float32")
        same = same / ops.sum(same, axis=1, keepdims=True)
        return ops.mean(ops.sum(-same * ops.log_softmax(logits, axis=1), axis=1))


encoder = keras.Sequential(
    [keras.Input((64,)), layers.Dense(32, "tanh"), layers.Dense(16)], name="encoder"
)
encoder.compile(keras.optimizers.Adam(1e-3), SupervisedContrastiveLoss())
contrast = encoder.fit(x, y, batch_size=64, epochs=2, shuffle=False, verbose=0)

encoder.trainable = False
inputs = keras.Input((64,))
classifier = keras.Model(inputs, layers.Dense(10, activation="softmax")(encoder(inputs)))
classifier.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
history = classifier.fit(x, y, batch_size=64, epochs=1, shuffle=False, verbose=0)
outcome.save(classifier, [contrast, history])
