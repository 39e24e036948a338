"""Trains a transformer whose blocks compute their activations again in the backward pass.

The weights are those of training without it. `tfdist.memory` estimates what it saves.

    python examples/recompute.py
    tfdist run -n 2 examples/recompute.py
"""

import keras
import numpy as np

import tfdist

layers = keras.layers
session = tfdist.init(seed=1)


class Block(layers.Layer):
    """Attention and a feed-forward part, each with dropout."""

    def __init__(self, size):
        super().__init__()
        self.attention = layers.MultiHeadAttention(2, size // 2, dropout=0.1)
        self.wide = layers.Dense(4 * size, activation="gelu")
        self.narrow = layers.Dense(size)
        self.dropout = layers.Dropout(0.1)
        self.norms = [layers.LayerNormalization() for _ in range(2)]

    def call(self, x):
        y = self.norms[0](x)
        x = x + self.attention(y, y)
        return x + self.dropout(self.narrow(self.wide(self.norms[1](x))))


def make_model():
    keras.utils.set_random_seed(1)
    words = keras.Input((32,), dtype="int32")
    x = layers.Embedding(50, 32)(words)
    for _ in range(4):
        x = Block(32)(x)
    model = keras.Model(words, layers.Dense(50)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss=loss)
    return model


# Generated text in which each word follows from the one before.
start = np.random.default_rng(0).integers(0, 50, size=(256, 1))
text = (start + 7 * np.arange(33)) % 50
x, y = text[:, :-1], text[:, 1:]

plain, saving = make_model(), make_model()
chosen = tfdist.recompute(saving)

for model in (plain, saving):
    tfdist.fit(model, x, y, batch_size=64, epochs=2, verbose=0, seed=1)

pairs = zip(plain.get_weights(), saving.get_weights(), strict=True)
difference = max(float(np.max(np.abs(a - b))) for a, b in pairs)
if session.is_chief:
    print(chosen)
    kept, recomputed = (tfdist.memory(m, 64).device.activations for m in (plain, saving))
    print(
        f"activations kept: {kept / 2**20:.1f} MiB, with recompute {recomputed / 2**20:.1f} MiB"
    )
    print(f"largest difference of a weight: {difference:.1e}")
