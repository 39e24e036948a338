"""Trains an embedding table of words with differential privacy.

The data is generated: sentences of 24 words, with 1000 words that occur and 200 that never
occur. A sentence is good if the sum of its words' moods is high. The gradient of a sentence
has a few rows of the table, but every row must get noise: unchanged rows would reveal which
words never occur.

    python examples/private_embedding.py
    tfdist run -n 2 examples/private_embedding.py
"""

import keras
import numpy as np

import tfdist

WRITTEN, UNWRITTEN, LENGTH, SENTENCES = 1000, 200, 24, 12_000
EPSILON, DELTA = 3.0, 1e-5


def make_data(seed=0):
    rng = np.random.default_rng(seed)
    mood = rng.normal(size=WRITTEN)  # the mood of each word
    popularity = 1 / np.arange(10, WRITTEN + 10)
    words = rng.choice(WRITTEN, size=(SENTENCES, LENGTH), p=popularity / popularity.sum())
    score = mood[words].sum(1)
    return words.astype("int32"), (score > np.median(score)).astype("float32")


def make_model():
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            keras.layers.Embedding(WRITTEN + UNWRITTEN, 16, name="words"),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.Adam(0.02),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy(threshold=0.0, name="accuracy")],
    )
    return model


session = tfdist.init(seed=1)
x, y = make_data()
num_train = SENTENCES * 5 // 6

for name, privacy in (
    ("without privacy", None),
    ("private", tfdist.DPSGD(l2_norm_clip=0.1, target_epsilon=EPSILON, delta=DELTA)),
):
    model = make_model()
    before = model.get_layer("words").get_weights()[0]
    history = tfdist.fit(
        model,
        x[:num_train],
        y[:num_train],
        batch_size=500,
        epochs=8,
        verbose=0,
        privacy=privacy,
    )
    held_out = x[num_train:], y[num_train:]
    accuracy = tfdist.evaluate(model, *held_out, verbose=0, return_dict=True)["accuracy"]
    changed = (model.get_layer("words").get_weights()[0] != before).any(1)
    if session.is_chief:
        rows = (
            f"{changed[:WRITTEN].sum()} written and {changed[WRITTEN:].sum()} unwritten words"
        )
        print(f"{name}: held-out accuracy {accuracy:.1%}; changed were {rows}")
        if privacy is not None:
            report = history.privacy
            print(f"epsilon {report.epsilon:.2f} of {EPSILON}, in {report.ledger.steps} steps")
