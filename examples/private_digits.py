"""Trains on scikit-learn's handwritten digits with differential privacy, within a budget.

From the weights nobody can tell whether an image was in the data, up to epsilon and delta.

    python examples/private_digits.py
    tfdist run -n 2 examples/private_digits.py
"""

import textwrap

import keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tfdist

MAX_EPSILON = 3.0


def make_model():
    # Fewer weights get less noise, and tanh bounds the effect of one image (Papernot et al.,
    # "Tempered sigmoid activations for deep learning with differential privacy", AAAI 2021).
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(64, activation="tanh"),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.SGD(0.5, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


session = tfdist.init(seed=1)  # seeds the initial weights; sampling and noise stay secret

images, labels = load_digits(return_X_y=True)
x_train, x_test, y_train, y_test = train_test_split(
    images / 16, labels, test_size=0.25, stratify=labels, random_state=1
)

model = make_model()
history = tfdist.fit(
    model,
    x_train,
    y_train,
    batch_size=256,  # on average, because each image is drawn independently
    epochs=100,  # or fewer, if the budget ends before
    verbose=2,
    privacy=tfdist.DPSGD(l2_norm_clip=0.5, noise_multiplier=3.0, delta=1e-4),
    callbacks=[tfdist.PrivacyBudget(MAX_EPSILON)],
)

accuracy = tfdist.evaluate(model, x_test, y_test, verbose=0, return_dict=True)["accuracy"]
if session.is_chief:
    report = history.privacy
    # The result of the attack has no noise: do not publish it.
    attack = tfdist.privacy.audit(model, (x_train, y_train), (x_test, y_test))
    print(f"strategy:          {session.strategy.name}")
    print(f"held-out accuracy: {accuracy:.2%}")
    print(f"epsilon:           {report.epsilon:.3f} of {MAX_EPSILON}, delta {report.delta:g}")
    print(f"attack:            {attack}")
    print(f"steps:             {report.ledger.steps}")
    print(textwrap.fill(report.statement(), 96))
