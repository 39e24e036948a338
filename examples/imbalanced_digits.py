"""Trains on digits with rare odd ones: untreated, with class weights, and rebalanced.

The training data has 1 in 50 images of each odd digit. The held-out data has all digits
equally often. The results are the same in one process and in two:

    python examples/imbalanced_digits.py
    tfdist run -n 2 examples/imbalanced_digits.py
"""

import keras
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import tfdist

SEED = 1
BATCH_SIZE = 32
STEPS_PER_EPOCH = 25
EPOCHS = 6

METHODS = {
    "untreated": {},
    'class_weight="balanced"': {"class_weight": "balanced"},
    "ClassBalanced()": {"sampler": tfdist.samplers.ClassBalanced()},
}


def keep_few_odd(x, y):
    """Keeps one in 50 images of each odd digit, and all images of the even ones."""
    is_kept = y % 2 == 0
    for digit in range(1, 10, 2):
        rows = np.flatnonzero(y == digit)
        is_kept[rows[: -(-len(rows) // 50)]] = True
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
images = images.reshape(-1, 8, 8, 1).astype("float32") / 16
(x, y), held_out = tfdist.imbalance.stratified_split(images, digits, fraction=0.25, seed=SEED)
x, y = keep_few_odd(x, y)

table = Table(title="Held-out digits, odd ones rare in training", title_justify="left")
table.box = box.ROUNDED
for column in ("", "balanced accuracy", "recall of even", "recall of odd"):
    table.add_column(column, justify="right" if column else "left")
for name, options in METHODS.items():
    metrics = tfdist.PerClassMetrics(*held_out)
    history = tfdist.fit(
        make_model(),
        x,
        y,
        batch_size=BATCH_SIZE,
        epochs=EPOCHS,
        steps_per_epoch=STEPS_PER_EPOCH,
        callbacks=[metrics],
        verbose=0,
        **options,
    ).history
    recalls = [history[f"val_recall_{digit}"][-1] for digit in range(10)]
    figures = (
        history["val_balanced_accuracy"][-1],
        np.mean(recalls[::2]),
        np.mean(recalls[1::2]),
    )
    table.add_row(name, *[f"{figure:.2%}" for figure in figures])

if session.is_chief:
    print(tfdist.imbalance.report(y))
    Console().print(table)
