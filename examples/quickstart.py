"""Trains a small CNN on scikit-learn's handwritten digits, on all workers.

Run it in one process, or in two:

    python examples/quickstart.py
    tfdist run -n 2 examples/quickstart.py
"""

import hashlib
import time

import keras
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tfdist

SEED = 1
BATCH_SIZE = 64  # the global batch: 64 in one process, 32 + 32 in two
EPOCHS = 8


def make_stopwatch():
    """Returns a callback and a list: the callback appends when each epoch begins and ends."""
    times = []
    stopwatch = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: times.append(time.perf_counter()),
        on_epoch_end=lambda epoch, logs: times.append(time.perf_counter()),
    )
    return stopwatch, times


def make_model():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.BatchNormalization(momentum=0.9, synchronized=True),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.Adam(2e-3),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


def hash_of(model):
    weights = b"".join(w.tobytes() for w in model.get_weights())
    return hashlib.sha256(weights).hexdigest()[:16]


session = tfdist.init(seed=SEED)

images, labels = load_digits(return_X_y=True)
images = images.reshape(-1, 8, 8, 1).astype("float32") / 16
x_train, x_test, y_train, y_test = train_test_split(
    images, labels, test_size=0.25, stratify=labels, random_state=SEED
)

model = make_model()
stopwatch, times = make_stopwatch()
tfdist.fit(
    model,
    x_train,
    y_train,
    batch_size=BATCH_SIZE,
    epochs=EPOCHS,
    callbacks=[stopwatch],
)
scores = tfdist.evaluate(model, x_test, y_test, verbose=0, return_dict=True)
# Skip the first epoch, in which TensorFlow traces its graphs.
seconds = sum(times[3::2]) - sum(times[2::2])
hashes = session.strategy.gather_objects(hash_of(model))

if session.is_chief:
    place = session.strategy.place
    agreed = "equal" if len(set(hashes)) == 1 else "DIFFERENT"
    summary = Table(title="Digits, trained by tfdist", title_justify="left", box=box.ROUNDED)
    summary.show_header = False
    summary.add_column(style="bold")
    summary.add_row("strategy", session.strategy.name)
    summary.add_row("replicas", f"{place.num_replicas} (workers: {place.num_workers})")
    summary.add_row("examples/s", f"{len(x_train) * (EPOCHS - 1) / seconds:,.0f}")
    summary.add_row("held-out accuracy", f"{scores['accuracy']:.2%} of {len(x_test)} images")
    summary.add_row("weights of all workers", agreed)
    for worker, digest in enumerate(hashes):
        summary.add_row(f"  sha256 on worker {worker}", digest)
    Console().print(summary)

if len(set(hashes)) != 1:
    raise SystemExit("The workers hold different weights.")
