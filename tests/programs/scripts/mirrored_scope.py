"""TensorFlow's guide: a model built and compiled in `MirroredStrategy`'s scope."""

import keras
import outcome
import tensorflow as tf
from sklearn.datasets import load_digits

strategy = tf.distribute.MirroredStrategy()
keras.utils.set_random_seed(1)
x, y = load_digits(return_X_y=True)
x = x.astype("float32") / 16
dataset = tf.data.Dataset.from_tensor_slices((x[:1000], y[:1000])).batch(64)

with strategy.scope():
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(16, activation="tanh"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.Adam(0.001),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )

history = model.fit(dataset, epochs=2, verbose=0)
tested = model.evaluate(x[1000:], y[1000:], verbose=0)
predicted = model.predict(x[1000:1010], verbose=0)
outcome.save(model, history, tested=tested, predicted=predicted)
