"""Trains a small transformer language model whose layers four devices compute in parts.

Here the devices are quarters of the CPU, in a mesh of 2 x 2. The weights are those of one
device.

    python examples/tensor_parallel.py
"""

import keras
import numpy as np
import tensorflow as tf

import tfdist

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)
layers = keras.layers
LENGTH, WIDTH = 24, 32


def make_text(sentences):
    rng = np.random.default_rng(0)
    subjects, verbs = ["the cat", "a dog", "my aunt"], ["sees", "likes", "hears"]
    return " ".join(
        f"{rng.choice(subjects)} {rng.choice(verbs)} {rng.choice(subjects)}."
        for _ in range(sentences)
    )


def make_model(letters):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(letters, WIDTH, name="letters")(inputs)
    for number in range(2):
        attention = layers.MultiHeadAttention(4, WIDTH // 4, dropout=0.1, name=f"heads{number}")
        x = layers.LayerNormalization()(x + attention(x, x, use_causal_mask=True))
        hidden = layers.Dense(4 * WIDTH, activation="gelu", name=f"up{number}")(x)
        hidden = layers.Dropout(0.1)(hidden)
        hidden = layers.Dense(WIDTH, name=f"down{number}")(hidden)
        x = layers.LayerNormalization()(x + hidden)
    model = keras.Model(inputs, layers.Dense(letters, name="next")(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss=loss, metrics=["accuracy"])
    return model


text = make_text(240)
letters = sorted(set(text))
codes = np.array([letters.index(letter) for letter in text])
starts = np.arange(0, len(codes) - LENGTH - 1, LENGTH // 2)
x = np.stack([codes[start : start + LENGTH] for start in starts])
y = np.stack([codes[start + 1 : start + LENGTH + 1] for start in starts])

expected, model = make_model(len(letters)), make_model(len(letters))
tfdist.fit(expected, x, y, batch_size=64, epochs=2, seed=1, verbose=0, strategy="single")

mesh = {"batch": 2, "model": 2}
layout_map = tfdist.layout_map(model, mesh)
strategy = tfdist.ModelParallel(layout_map, mesh, on="mirrored")
print(tfdist.placement(model, strategy))
tfdist.fit(model, x, y, batch_size=64, epochs=2, seed=1, verbose=2, strategy=strategy)

pairs = zip(expected.get_weights(), model.get_weights(), strict=True)
difference = max(float(np.max(np.abs(a - b))) for a, b in pairs)
print(f"largest difference from one device: {difference:.1e}")
