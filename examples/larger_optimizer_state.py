"""Trains with each half of Adam's state on one of two workers, and compares with one process.

Adam keeps two numbers for each weight. With `tfdist.Zero` a worker keeps them only for its
part of the weights, and the trained weights are the same.

    python examples/larger_optimizer_state.py
    tfdist run -n 2 examples/larger_optimizer_state.py
"""

import keras
import numpy as np

import tfdist


def make_model():
    keras.utils.set_random_seed(1)
    layers = [keras.Input((64,)), keras.layers.Dense(512, "tanh"), keras.layers.Dense(10)]
    model = keras.Sequential(layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    return model


class StateBytes(keras.callbacks.Callback):
    """Counts the bytes of Adam's state in this process while it trains."""

    def on_epoch_end(self, epoch, logs=None):
        state = self.model.optimizer.variables
        self.bytes = sum(np.prod(v.shape, dtype=int) * 4 for v in state)


def train(strategy):
    model, state = make_model(), StateBytes()
    options = {"batch_size": 64, "epochs": 3, "seed": 1, "callbacks": [state]}
    tfdist.fit(
        model, x, y, strategy=strategy, verbose=2 if strategy != "auto" else 0, **options
    )
    return model, state.bytes


session = tfdist.init(seed=1)
rng = np.random.default_rng(0)
x = rng.normal(size=(1000, 64)).astype("float32")
y = (x @ rng.normal(size=(64, 10))).argmax(1)

plain, plain_bytes = train("auto")
in_parts, part_bytes = train(tfdist.Zero(stage=1))

if session.is_chief:
    pairs = zip(plain.get_weights(), in_parts.get_weights(), strict=True)
    moments = zip(plain.optimizer.variables, in_parts.optimizer.variables, strict=True)
    print(f"replicas: {session.strategy.place.num_replicas}")
    print(f"bytes of the optimizer's state on a worker: {part_bytes:,} of {plain_bytes:,}")
    print(f"weights equal, bit by bit: {all(np.array_equal(a, b) for a, b in pairs)}")
    print(f"optimizer equal, bit by bit: {all(np.array_equal(a, b) for a, b in moments)}")
