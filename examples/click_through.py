"""Predicts clicks on advertisements, with an embedding table that is split over servers.

A click depends on a hidden taste of each user and a hidden quality of each advertisement. The
data is generated: it has 300 000 users, and most of them occur only a few times. A worker
reads and updates only the rows of its batch, so the size of the table does not matter.

    tfdist run -n 2 --ps 2 examples/click_through.py
"""

import keras
import numpy as np

import tfdist

USERS, ADS, CLICKS = 300_000, 500, 60_000
BATCH_SIZE, EPOCHS = 256, 6


def make_data(seed=0):
    rng = np.random.default_rng(seed)
    taste, quality = rng.normal(size=(USERS, 4)), rng.normal(size=(ADS, 4))
    # As in real data, a few users see many advertisements.
    users = (USERS * rng.random(CLICKS) ** 12).astype("int32")
    ads = rng.integers(0, ADS, CLICKS).astype("int32")
    appeal = (taste[users] * quality[ads]).sum(1)
    clicks = (rng.random(CLICKS) < 1 / (1 + np.exp(-2 * appeal))).astype("float32")
    return {"user": users, "ad": ads}, clicks


def make_model():
    user = keras.Input((), dtype="int32", name="user")
    ad = keras.Input((), dtype="int32", name="ad")
    a = keras.layers.Embedding(USERS, 16, name="users")(user)
    b = keras.layers.Embedding(ADS, 16, name="ads")(ad)
    score = keras.layers.Dot(axes=1)([a, b])
    model = keras.Model({"user": user, "ad": ad}, score)
    model.compile(
        optimizer=keras.optimizers.Adam(0.01),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.AUC(from_logits=True, name="auc")],
    )
    return model


tfdist.init(tfdist.ParameterServer(data="workers"), seed=1)
model = make_model()
print(tfdist.placement(model))

x, y = make_data()
num_train = CLICKS * 9 // 10
before = model.get_weights()[0]
tfdist.fit(
    model,
    {name: ids[:num_train] for name, ids in x.items()},
    y[:num_train],
    batch_size=BATCH_SIZE,
    epochs=EPOCHS,
    verbose=2,
)
scores = tfdist.evaluate(
    model,
    {name: ids[num_train:] for name, ids in x.items()},
    y[num_train:],
    verbose=0,
    return_dict=True,
)
changed = np.flatnonzero((model.get_weights()[0] != before).any(1))
seen = np.unique(x["user"][:num_train])
print(f"held-out AUC:     {scores['auc']:.3f}")
print(f"rows changed:     {len(changed)} of {USERS}, those of the users that were seen: "
      f"{np.array_equal(changed, seen)}")  # fmt: skip
