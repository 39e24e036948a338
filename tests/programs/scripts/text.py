"""Text classification from strings: vectorized in the dataset, labels looked up."""

import keras
import numpy as np
import outcome
import tensorflow as tf
from keras import layers

keras.utils.set_random_seed(1)
rng = np.random.default_rng(4)
good = ["fine", "warm", "bright", "happy", "tale", "of", "the", "sea"]
bad = ["dull", "cold", "grey", "empty", "tale", "of", "the", "sea"]
kinds = rng.integers(0, 2, 400)
texts = [
    " ".join(rng.choice(good if kind else bad, rng.integers(4, 12))) + "." for kind in kinds
]
names = np.array(["negative", "positive"])[kinds]

raw = tf.data.Dataset.from_tensor_slices((texts, names))
raw_train = raw.take(320).shuffle(320, seed=5).batch(32)
raw_val = raw.skip(320).batch(32)
vectorize = layers.TextVectorization(max_tokens=40, output_sequence_length=12)
vectorize.adapt(raw_train.map(lambda text, _: text))
lookup = layers.StringLookup(vocabulary=["negative", "positive"], num_oov_indices=0)


def numbers(text, label):
    return vectorize(text), lookup(label)


train = raw_train.map(numbers).cache().prefetch(10)
val = raw_val.map(numbers).cache().prefetch(10)

inputs = keras.Input((None,), dtype="int64")
x = layers.Embedding(40, 8)(inputs)
x = layers.Conv1D(8, 3, padding="same", activation="tanh")(x)
x = layers.GlobalAveragePooling1D()(x)
x = layers.Dropout(0.3)(x)
model = keras.Model(inputs, layers.Dense(1, activation="sigmoid")(x))
model.compile(loss="binary_crossentropy", optimizer="adam", metrics=["accuracy"])
history = model.fit(train, validation_data=val, epochs=2, verbose=0)

strings = keras.Input((1,), dtype="string")
end_to_end = keras.Model(strings, model(vectorize(strings)))
end_to_end.compile(loss="binary_crossentropy", metrics=["accuracy"])
tested = end_to_end.evaluate(
    raw_val.map(lambda text, label: (tf.expand_dims(text, -1), lookup(label))), verbose=0
)
predicted = end_to_end.predict(tf.constant([["a warm tale"], ["a cold tale"]]), verbose=0)
outcome.save(model, history, tested=tested, predicted=predicted)
