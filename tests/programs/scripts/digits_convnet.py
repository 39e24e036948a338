"""The usual first example: a convnet with dropout, arrays, a validation split."""

import keras
import outcome
from keras import layers
from sklearn.datasets import load_digits

keras.utils.set_random_seed(1)
digits = load_digits()
x = digits.images[..., None].astype("float32") / 16
y = keras.utils.to_categorical(digits.target, 10)
x_train, y_train, x_test, y_test = x[:1500], y[:1500], x[1500:], y[1500:]

model = keras.Sequential(
    [
        keras.Input(shape=(8, 8, 1)),
        layers.Conv2D(8, kernel_size=(3, 3), activation="tanh"),
        layers.AveragePooling2D(pool_size=(2, 2)),
        layers.Flatten(),
        layers.Dropout(0.5),
        layers.Dense(10, activation="softmax"),
    ]
)
model.compile(loss="categorical_crossentropy", optimizer="adam", metrics=["accuracy"])
history = model.fit(x_train, y_train, batch_size=128, epochs=2, validation_split=0.1, verbose=0)
loss, accuracy = model.evaluate(x_test, y_test, verbose=0)
outcome.save(model, history, loss=loss, accuracy=accuracy)
