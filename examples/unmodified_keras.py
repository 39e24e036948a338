"""A plain Keras script that does not use tfdist.

    python examples/unmodified_keras.py [folder]
    tfdist run -n 2 --drop-in examples/unmodified_keras.py [folder]

The second command trains on two workers. The script writes its best model to `folder`.
"""

import sys
from pathlib import Path

import keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
keras.utils.set_random_seed(1)

images, labels = load_digits(return_X_y=True)
x_train, x_test, y_train, y_test = train_test_split(
    images.astype("float32") / 16, labels, test_size=0.25, stratify=labels, random_state=1
)

model = keras.Sequential(
    [
        keras.Input((64,)),
        keras.layers.Dense(128, activation="relu"),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(10),
    ]
)
model.compile(
    optimizer="adam",
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
model.fit(
    x_train,
    y_train,
    batch_size=64,
    epochs=10,
    validation_data=(x_test, y_test),
    callbacks=[
        keras.callbacks.ModelCheckpoint(folder / "digits.keras", save_best_only=True),
        keras.callbacks.EarlyStopping(patience=3),
    ],
    verbose=2,
)

best = keras.models.load_model(folder / "digits.keras")
loss, accuracy = best.evaluate(x_test, y_test, verbose=0)
predicted = best.predict(x_test, verbose=0).argmax(1)
print(f"held-out accuracy {accuracy:.4f}, {(predicted == y_test).sum()} of {len(y_test)} right")
