"""Transfer and fine-tuning: frozen layers, then all of them, two compiles and two fits."""

import keras
import outcome
from keras import layers
from sklearn.datasets import load_digits

keras.utils.set_random_seed(1)
x, y = load_digits(return_X_y=True)
x = x.astype("float32")
first, second = y < 5, y >= 5

scale = layers.Rescaling(1 / 16)
base = keras.Sequential(
    [keras.Input((64,)), scale, layers.Dense(32, "tanh"), layers.Dense(16, "tanh")],
    name="base",
)
source = keras.Sequential([base, layers.Dense(5, activation="softmax")])
source.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
pretraining = source.fit(x[first], y[first], epochs=2, shuffle=False, verbose=0)

base.trainable = False
inputs = keras.Input((64,))
outputs = layers.Dense(5)(base(inputs, training=False))
model = keras.Model(inputs, outputs)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
frozen = [weight.numpy() for weight in base.weights]
transfer = model.fit(x[second], y[second] - 5, epochs=2, shuffle=False, verbose=0)
assert all((a == b.numpy()).all() for a, b in zip(frozen, base.weights, strict=True))

base.trainable = True
model.compile(keras.optimizers.Adam(1e-4), loss, metrics=["accuracy"])
tuning = model.fit(x[second], y[second] - 5, epochs=1, shuffle=False, verbose=0)
assert any((a != b.numpy()).any() for a, b in zip(frozen, base.weights, strict=True))
outcome.save([source, model], [pretraining, transfer, tuning])
