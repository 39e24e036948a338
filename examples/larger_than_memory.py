"""Trains a model that is larger than the memory of one process.

Each process limits its own memory. Weights and Adam's state (with AMSGrad, three numbers for
each weight) do not fit into one process, but into two, each with half of them.

    python examples/larger_than_memory.py
    export MALLOC_MMAP_THRESHOLD_=1048576
    tfdist run -n 2 examples/larger_than_memory.py

The variable lets the C library give freed tensors back to the system at once.
"""

import resource

import keras
import numpy as np
import tensorflow as tf

import tfdist

LAYERS, WIDTH = 28, 1536  # 252 MiB of weights, 1008 MiB with Adam's state
LIMIT_MIB = 960  # of what a process may take for the model


def train(layers, width, **options):
    with tfdist.deferred_weights():
        dense = [keras.layers.Dense(width, "tanh") for _ in range(layers)]
        model = keras.Sequential([keras.Input((width,)), *dense, keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(amsgrad=True), "mse")
    x = np.random.default_rng(0).normal(size=(64, width)).astype("float32")
    zero = tfdist.Zero(stage=3)
    return tfdist.fit(model, x, x[:, :1], batch_size=16, seed=1, strategy=zero, **options)


def memory_mib():
    """Memory that this process has asked the system for, as its limit counts it."""
    with open("/proc/self/status") as status:
        lines = [line.split() for line in status]
    return next(int(line[1]) // 1024 for line in lines if line[0] == "VmData:")


session = tfdist.init(seed=1)
train(1, 8, verbose=0)  # starts TensorFlow's threads, which have memory too
limit = (memory_mib() + LIMIT_MIB) * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

state_mib = 4 * LAYERS * WIDTH * WIDTH * 4 / 2**20
if session.is_chief:
    print(f"weights and Adam's state, MiB: {state_mib:.0f}")
    print(f"limit of a process, MiB: {LIMIT_MIB}")
try:
    history = train(LAYERS, WIDTH, epochs=1, verbose=2 if session.is_chief else 0)
except (tf.errors.ResourceExhaustedError, MemoryError):
    print("trained: False, the memory of this process is exhausted")
else:
    if session.is_chief:
        print(f"trained: True, loss {history.history['loss'][-1]:.3f}")
