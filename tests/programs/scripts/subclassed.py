"""A subclassed model with `build`, BatchNormalization and Dropout, built by its first batch."""

import keras
import outcome
from keras import layers
from sklearn.datasets import load_digits

keras.utils.set_random_seed(1)
digits = load_digits()
x = digits.images[:960, ..., None].astype("float32") / 16
y = digits.target[:960]


class Block(layers.Layer):
    def __init__(self, filters):
        super().__init__()
        self.filters = filters
        self.normalization = layers.BatchNormalization(momentum=0.9)

    def build(self, input_shape):
        self.convolution = layers.Conv2D(self.filters, 3, padding="same", use_bias=False)
        self.convolution.build(input_shape)
        self.scale = self.add_weight(shape=(self.filters,), initializer="ones", name="scale")
        self.normalization.build((*input_shape[:-1], self.filters))

    def call(self, inputs, training=None):
        x = self.normalization(self.convolution(inputs), training=training)
        return keras.ops.tanh(x * self.scale)


class Network(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [Block(4), Block(4)]
        self.pool = layers.GlobalAveragePooling2D()
        self.dropout = layers.Dropout(0.25)
        self.classifier = layers.Dense(10)

    def call(self, inputs, training=None):
        x = inputs
        for block in self.blocks:
            x = block(x, training=training)
        return self.classifier(self.dropout(self.pool(x), training=training))


model = Network()
model.compile(
    optimizer=keras.optimizers.SGD(0.1),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
history = model.fit(x, y, batch_size=96, epochs=2, shuffle=False, verbose=0)
outcome.save(model, history)
