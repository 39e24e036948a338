"""Trains on scikit-learn's handwritten digits with the weights on parameter servers.

It shows which variable is on which server, how the weights on the servers change from epoch
to epoch, and how stale the weights were that the workers used.

    tfdist run -n 2 --ps 2 examples/parameter_server.py
    tfdist run -n 2 --ps 2 examples/parameter_server.py --synchronous

Only the chief runs this script. The workers compute gradients; the servers hold the weights
and update them.
"""

import sys

import keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tfdist

BATCH_SIZE = 32
EPOCHS = 12


def make_model():
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Rescaling(1 / 16),
            keras.layers.Dense(128, activation="relu", name="hidden"),
            keras.layers.Dense(10, name="digits"),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.Adam(3e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


class ShowServers(keras.callbacks.Callback):
    """Prints the server and the norm of each variable after every third epoch."""

    def on_epoch_end(self, epoch, logs=None):
        if epoch % 3 != 2:
            return
        for variable in self.model.trainable_variables:
            device = variable.value.device  # the server that holds it while `fit` runs
            task = (
                device.partition("/job:")[2].replace("/replica:0/task:", " ").partition("/")[0]
            )
            norm = float(keras.ops.norm(keras.ops.reshape(variable, (-1,))))
            print(f"  epoch {epoch + 1}: {variable.path:<13} on {task}, norm {norm:.3f}")


synchronous = "--synchronous" in sys.argv[1:]
session = tfdist.init(tfdist.ParameterServer(synchronous=synchronous), seed=1)

images, labels = load_digits(return_X_y=True)
x_train, x_test, y_train, y_test = train_test_split(
    images, labels, test_size=0.25, stratify=labels, random_state=1
)

model = make_model()
print(tfdist.placement(model))
tfdist.fit(
    model,
    x_train,
    y_train,
    batch_size=BATCH_SIZE,
    epochs=EPOCHS,
    verbose=2,
    callbacks=[ShowServers()],
)
scores = tfdist.evaluate(model, x_test, y_test, verbose=0, return_dict=True)

staleness = session.strategy.staleness
steps = EPOCHS * -(-len(x_train) // BATCH_SIZE)
print(f"held-out accuracy:  {scores['accuracy']:.2%} of {len(x_test)} images")
print(f"updates:            {int(model.optimizer.iterations.numpy())} of {steps} steps")
if staleness is None:
    print("staleness:          none, every update was computed with the newest weights")
else:
    print(f"staleness:          {staleness.mean:.2f} updates, {staleness.maximum} at most")
