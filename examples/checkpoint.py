"""Trains on handwritten digits, is stopped in the middle, and continues.

The first command is never stopped. The second receives SIGTERM after its 60th step, as from a
scheduler that wants the machine back: it saves and ends with status 75, "start me again".
The third continues. It prints the same hash of the weights as the first.

    python examples/checkpoint.py /tmp/never-stopped
    python examples/checkpoint.py /tmp/stopped --sigterm-after 60
    python examples/checkpoint.py /tmp/stopped

`tfdist run` can restart it by itself, on any number of workers:

    tfdist run -n 2 --max-restarts 1 examples/checkpoint.py /tmp/two --sigterm-after 60
"""

import argparse
import hashlib
import os
import signal
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits

import tfdist

parser = argparse.ArgumentParser()
parser.add_argument("directory", type=Path)
parser.add_argument("--sigterm-after", type=int, metavar="STEP")
arguments = parser.parse_args()


class SignalOnce(keras.callbacks.Callback):
    """Sends SIGTERM to this process, once for each directory."""

    marker = arguments.directory / "signalled"

    def on_train_batch_end(self, batch, logs=None):
        is_time = int(self.model.optimizer.iterations) == arguments.sigterm_after
        if is_time and tfdist.is_chief() and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGTERM)


tfdist.init(seed=1)
arguments.directory.mkdir(parents=True, exist_ok=True)
images, digits = load_digits(return_X_y=True)
images = images.reshape(-1, 8, 8, 1).astype("float32") / 16
train, held_out = slice(0, 1347), slice(1347, None)

model = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        keras.layers.Conv2D(16, 3, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(10, activation="softmax"),
    ]
)
model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
history = tfdist.fit(
    model,
    images[train],
    digits[train],
    batch_size=64,
    epochs=8,
    validation_data=(images[held_out], digits[held_out]),
    callbacks=[keras.callbacks.ReduceLROnPlateau(patience=1), SignalOnce()],
    verbose=2,
    checkpoint=tfdist.Checkpoint(arguments.directory / "checkpoints", every="epoch", keep=2),
)
weights = b"".join(np.asarray(w).tobytes() for w in model.get_weights())
if tfdist.is_chief():
    print(f"held-out accuracy {history.history['val_accuracy'][-1]:.1%}")
    print(f"weights {hashlib.sha256(weights).hexdigest()[:16]}")
