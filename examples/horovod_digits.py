"""Trains on scikit-learn's handwritten digits with Horovod, in the style of its users.

The batch size is scaled with the number of ranks. So the learning rate is scaled too, after a
warm-up.

    python examples/horovod_digits.py
    tfdist run --strategy horovod -n 2 examples/horovod_digits.py
    horovodrun -np 2 python examples/horovod_digits.py

The last two need Horovod: `tfdist horovod build`.
"""

import hashlib

import keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tfdist

BATCH_SIZE_PER_RANK = 32
EPOCHS = 15


def make_model():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, padding="same"),
            keras.layers.BatchNormalization(momentum=0.9, synchronized=True),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.SGD(0.05, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


# This replaces hvd.init(), and the choice of a GPU by hvd.local_rank().
session = tfdist.init(seed=1)
ranks = session.strategy.place.num_replicas

images, labels = load_digits(return_X_y=True)
x_train, x_test, y_train, y_test = train_test_split(
    images.reshape(-1, 8, 8, 1) / 16, labels, test_size=0.25, stratify=labels, random_state=1
)

model = make_model()
tfdist.fit(
    model,
    x_train,  # all of the data on every rank: no shard()
    y_train,
    batch_size=BATCH_SIZE_PER_RANK * ranks,
    epochs=EPOCHS,
    verbose=2,  # only rank 0 shows progress
    callbacks=[
        tfdist.LearningRateScaling(),  # the rate times the number of ranks
        tfdist.LearningRateWarmup(epochs=3),  # from the rate of one rank to the scaled rate
    ],
)
scores = tfdist.evaluate(model, x_test, y_test, verbose=0, return_dict=True)

weights = b"".join(w.tobytes() for w in model.get_weights())
hashes = session.strategy.gather_objects(hashlib.sha256(weights).hexdigest()[:16])
if session.is_chief:
    print(f"strategy:           {session.strategy.name}")
    print(f"ranks:              {ranks}")
    print(f"held-out accuracy:  {scores['accuracy']:.2%} of {len(x_test)} images")
    print(f"sha256 of weights:  {', '.join(hashes)}")
if len(set(hashes)) != 1:
    raise SystemExit("The ranks hold different weights.")
