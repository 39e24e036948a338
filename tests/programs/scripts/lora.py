"""Fine-tuning by low-rank adapters: `enable_lora` between two fits."""

import keras
import outcome
from keras import layers
from sklearn.datasets import load_digits

keras.utils.set_random_seed(1)
x, y = load_digits(return_X_y=True)
x = x.astype("float32") / 16

model = keras.Sequential(
    [keras.Input((64,)), layers.Dense(32, "tanh"), layers.Dense(32, "tanh"), layers.Dense(10)]
)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
first = model.fit(x[:1000], y[:1000], epochs=1, shuffle=False, verbose=0)

for layer in model.layers[:2]:
    layer.enable_lora(rank=4)
model.layers[2].trainable = False
kernels = [layer._kernel.numpy() for layer in model.layers]
model.compile(keras.optimizers.AdamW(1e-3), loss, metrics=["accuracy"])
second = model.fit(x[1000:], 9 - y[1000:], epochs=2, shuffle=False, verbose=0)
for layer, kernel in zip(model.layers, kernels, strict=True):
    assert (layer._kernel.numpy() == kernel).all()
outcome.save(model, [first, second], trainable=len(model.trainable_weights))
