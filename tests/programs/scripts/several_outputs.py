"""Several inputs and outputs by name, with loss weights and sample weights."""

import keras
import numpy as np
import outcome
from keras import layers

keras.utils.set_random_seed(1)
rng = np.random.default_rng(10)
title = rng.integers(1, 100, (500, 6))
tags = rng.integers(0, 2, (500, 12)).astype("float32")
priority = tags[:, :6].mean(1, keepdims=True)
department = keras.utils.to_categorical(title[:, 0] % 4, 4)

title_input = keras.Input((None,), name="title")
tags_input = keras.Input((12,), name="tags")
features = layers.LSTM(8)(layers.Embedding(100, 8)(title_input))
features = layers.concatenate([features, tags_input])
model = keras.Model(
    inputs={"title": title_input, "tags": tags_input},
    outputs={
        "priority": layers.Dense(1, name="priority")(features),
        "department": layers.Dense(4, name="department")(features),
    },
)
model.compile(
    optimizer=keras.optimizers.RMSprop(1e-3),
    loss={
        "priority": keras.losses.BinaryCrossentropy(from_logits=True),
        "department": keras.losses.CategoricalCrossentropy(from_logits=True),
    },
    loss_weights={"priority": 1.0, "department": 0.2},
    metrics={"department": ["accuracy"], "priority": ["mae"]},
)
weights = {
    "priority": rng.uniform(0, 2, 500).astype("float32"),
    "department": np.where(title[:, 0] % 4 == 0, 3.0, 1.0).astype("float32"),
}
history = model.fit(
    {"title": title, "tags": tags},
    {"priority": priority, "department": department},
    sample_weight=weights,
    epochs=2,
    batch_size=32,
    shuffle=False,
    verbose=0,
)
predicted = model.predict({"title": title[:5], "tags": tags[:5]}, verbose=0)
outcome.save(model, history, **predicted)
