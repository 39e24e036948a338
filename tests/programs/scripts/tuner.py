"""A search: many models in one script, folds of scikit-learn, cleared sessions."""

import keras
import outcome
from keras import layers
from sklearn.datasets import load_iris
from sklearn.model_selection import KFold

keras.utils.set_random_seed(1)
x, y = load_iris(return_X_y=True)
x = x.astype("float32")


def build(units, rate):
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(units, "tanh"), layers.Dense(3, "softmax")]
    )
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
    return model


scores = {}
folds = KFold(2, shuffle=True, random_state=1).split(x)
for (units, rate), (train, held_out) in zip(((4, 0.02), (8, 0.02)), folds, strict=True):
    keras.backend.clear_session()
    keras.utils.set_random_seed(2)
    model = build(units, rate)
    model.fit(x[train], y[train], epochs=2, batch_size=16, shuffle=False, verbose=0)
    scores[units, rate] = model.evaluate(x[held_out], y[held_out], verbose=0)

best = min(scores, key=scores.get)
keras.utils.set_random_seed(3)
final = build(*best)
history = final.fit(x, y, epochs=2, batch_size=16, shuffle=False, verbose=0)
outcome.save(final, history, scores=list(scores.values()))
