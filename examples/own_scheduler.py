"""A training function that a scheduler sends to processes that already run.

Ray Train, PySpark and Dask work like this: each process sets TF_CONFIG and calls the function.
Here Python's own process pool plays the scheduler. The function runs in a thread, as in Ray
and Dask.

    python examples/own_scheduler.py
"""

import json
import multiprocessing
import os
import socket
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

WORKERS = 2


def train():
    import tfdist

    tfdist.init(seed=1)  # before TensorFlow does anything else in this process
    import keras
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(64, activation="tanh"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    history = tfdist.fit(model, images / 16, labels, batch_size=64, epochs=5, verbose=2)
    if tfdist.is_chief():
        model.save_weights("digits.weights.h5")
    return history.history["accuracy"][-1]


def in_worker(index, addresses):
    """Runs in each process of the scheduler."""
    task = {"type": "worker", "index": index}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(train).result()


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


if __name__ == "__main__":
    addresses = [free_address() for _ in range(WORKERS)]
    # A fork of a process that uses TensorFlow would hang, so the processes are spawned.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, mp_context=spawn) as processes:
        results = list(processes.map(in_worker, range(WORKERS), [addresses] * WORKERS))
    print(f"accuracy on every worker: {', '.join(f'{accuracy:.2%}' for accuracy in results)}")
