"""Measures whether private training does what its epsilon assumes.

The check measures noise, clipping, sampling and the sum over replicas. It uses your model, and
the same `fit` that will train it.

    python examples/private_check.py
    tfdist run -n 2 examples/private_check.py
"""

import keras
from sklearn.datasets import load_digits

import tfdist

session = tfdist.init(seed=1)

images, labels = load_digits(return_X_y=True)
model = keras.Sequential(
    [
        keras.Input((64,)),
        keras.layers.Dense(32, activation="tanh"),
        keras.layers.Dense(10),
    ]
)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile("adam", loss, metrics=["accuracy"])

privacy = tfdist.DPSGD(l2_norm_clip=0.5, noise_multiplier=3.0, delta=1e-4)
report = tfdist.privacy.check(model, images / 16, labels, privacy, batch_size=128, effort=0.2)
if session.is_chief:
    print(report)
    print(f"every check passed: {report.passed}")
