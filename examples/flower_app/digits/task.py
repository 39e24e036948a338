"""The model and the data of all nodes."""

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def model_fn():
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.SGD(0.1),  # of the clients
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def digits():
    images, labels = load_digits(return_X_y=True)
    return train_test_split(
        (images / 16).astype("float32"), labels, test_size=0.25, stratify=labels, random_state=1
    )


def node_of(labels, nodes):
    """Gives each image to a node, so that nodes differ: Dirichlet(0.3) by digit."""
    random = np.random.default_rng(1)
    node = np.zeros(len(labels), int)
    for digit in range(10):
        rows = np.flatnonzero(labels == digit)
        shares = random.dirichlet(np.full(nodes, 0.3))
        node[rows] = random.choice(nodes, size=len(rows), p=shares)
    return node


def data_fn(context):
    """A node's own images. Here all nodes read one file; yours would read what they hold."""
    x_train, _, y_train, _ = digits()
    config = context.node_config
    own = node_of(y_train, int(config["num-partitions"])) == int(config["partition-id"])
    return x_train[own], y_train[own]
