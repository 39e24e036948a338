"""Trains a model whose layers are on two devices, in micro-batches.

The devices are two halves of the CPU, or those of two other processes. The weights are those
that plain Keras gives.

    python examples/pipeline.py
    tfdist run -n 1 --ps 1 examples/pipeline.py
"""

import os

import keras
import numpy as np
import tensorflow as tf

import tfdist

if "TF_CONFIG" not in os.environ:  # no other processes
    cpu = tf.config.list_physical_devices("CPU")[0]
    halves = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, halves)
layers = keras.layers


def make_model():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((64,))])
    for _ in range(2):
        model.add(layers.Dense(128, activation="gelu"))
        model.add(layers.LayerNormalization())
        model.add(layers.Dropout(0.1))
    model.add(layers.Dense(10))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(1e-3), loss=loss)
    return model


x = np.random.default_rng(0).normal(size=(512, 64)).astype("float32")
y = np.argmax(x[:, :10], 1)

expected, model = make_model(), make_model()
options = {"batch_size": 64, "epochs": 2, "shuffle": False}
keras.utils.set_random_seed(2)
expected.fit(x, y, verbose=0, **options)
keras.utils.set_random_seed(2)
strategy = tfdist.Pipeline(stages=2, microbatches=4)
tfdist.fit(model, x, y, verbose=2, strategy=strategy, **options)

pairs = zip(expected.get_weights(), model.get_weights(), strict=True)
difference = max(float(np.max(np.abs(a - b))) for a, b in pairs)
print(f"largest difference from plain Keras: {difference:.1e}")
