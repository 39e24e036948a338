"""Trains on digits with rare odd ones, with imbalanced-learn's SMOTE before `fit`.

SMOTE makes new rows between those of a rare class (Chawla et al., JAIR 2002), once, before
training. Every worker makes the same rows, because they depend only on `random_state`. The
script compares this with tfdist's method: `fit` draws rare rows more often, and shifts them a
little each time that they are repeated.

    pip install imbalanced-learn
    python examples/smote.py
    tfdist run -n 2 examples/smote.py
"""

import keras
import numpy as np
from imblearn.over_sampling import SMOTE
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import tfdist

SEED = 1
BATCH_SIZE = 32
STEPS_PER_EPOCH = 25
EPOCHS = 12


def keep_few_odd(x, y):
    """Keeps one in 20 images of each odd digit, and all images of the even ones."""
    is_kept = y % 2 == 0
    for digit in range(1, 10, 2):
        rows = np.flatnonzero(y == digit)
        is_kept[rows[: -(-len(rows) // 20)]] = True
    return x[is_kept], y[is_kept]


def make_model():
    keras.utils.set_random_seed(SEED)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(optimizer=keras.optimizers.Adam(2e-3), loss="sparse_categorical_crossentropy")
    return model


session = tfdist.init(seed=SEED)

images, digits = load_digits(return_X_y=True)
images = images.astype("float32") / 16
(x, y), (x_held_out, y_held_out) = tfdist.imbalance.stratified_split(
    images, digits, fraction=0.25, seed=SEED
)
x, y = keep_few_odd(x, y)

# `k_neighbors` is below the number of rows of the rarest class, as SMOTE requires.
smote_x, smote_y = SMOTE(k_neighbors=5, random_state=SEED).fit_resample(x, y)

shift = tfdist.Augment(keras.layers.RandomTranslation(0.1, 0.1), repeated=True)
balanced = {"sampler": tfdist.samplers.ClassBalanced()}
METHODS = {
    "untreated": (x, y, {}),
    "SMOTE": (smote_x, smote_y, {}),
    "ClassBalanced()": (x, y, balanced),
    "ClassBalanced(), Augment": (x, y, {**balanced, "augment": shift}),
}

table = Table(title="Held-out digits, odd ones rare in training", title_justify="left")
table.box = box.ROUNDED
for column in ("", "rows", "balanced accuracy", "recall of odd"):
    table.add_column(column, justify="right" if column else "left")
for name, (x_train, y_train, options) in METHODS.items():
    metrics = tfdist.PerClassMetrics(x_held_out.reshape(-1, 8, 8, 1), y_held_out)
    history = tfdist.fit(
        make_model(),
        x_train.reshape(-1, 8, 8, 1),
        y_train,
        batch_size=BATCH_SIZE,
        epochs=EPOCHS,
        steps_per_epoch=STEPS_PER_EPOCH,
        callbacks=[metrics],
        verbose=0,
        **options,
    ).history
    recall = np.mean([history[f"val_recall_{digit}"][-1] for digit in range(1, 10, 2)])
    figures = f"{history['val_balanced_accuracy'][-1]:.2%}", f"{recall:.2%}"
    table.add_row(name, str(len(y_train)), *figures)

if session.is_chief:
    Console().print(table)
