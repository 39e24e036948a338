"""Structured data with `FeatureSpace`: adapted to a dataset, applied in its `map`."""

import keras
import numpy as np
import outcome
import tensorflow as tf
from keras.utils import FeatureSpace

keras.utils.set_random_seed(1)
rng = np.random.default_rng(3)
ROWS = 600
table = {
    "age": rng.normal(50, 12, ROWS).astype("float32"),
    "sex": rng.integers(0, 2, ROWS),
    "pain": rng.choice(["none", "some", "severe"], ROWS),
    "cholesterol": rng.normal(240, 40, ROWS).astype("float32"),
}
target = ((table["age"] > 52) | (table["pain"] == "severe")).astype("int64")


def to_dataset(rows):
    columns = {name: values[rows] for name, values in table.items()}
    return tf.data.Dataset.from_tensor_slices((columns, target[rows]))


train, validation = to_dataset(slice(0, 500)).batch(32), to_dataset(slice(500, None)).batch(32)
feature_space = FeatureSpace(
    features={
        "age": FeatureSpace.float_discretized(num_bins=10),
        "sex": FeatureSpace.integer_categorical(num_oov_indices=0),
        "pain": FeatureSpace.string_categorical(num_oov_indices=0),
        "cholesterol": FeatureSpace.float_normalized(),
    },
    crosses=[FeatureSpace.cross(feature_names=("sex", "age"), crossing_dim=16)],
    output_mode="concat",
)
feature_space.adapt(train.map(lambda x, _: x))
preprocessed = train.map(lambda x, y: (feature_space(x), y)).prefetch(tf.data.AUTOTUNE)
preprocessed_val = validation.map(lambda x, y: (feature_space(x), y))

encoded = feature_space.get_encoded_features()
hidden = keras.layers.Dropout(0.5)(keras.layers.Dense(16, activation="tanh")(encoded))
outputs = keras.layers.Dense(1, activation="sigmoid")(hidden)
training_model = keras.Model(encoded, outputs)
training_model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
history = training_model.fit(
    preprocessed, epochs=2, validation_data=preprocessed_val, verbose=0
)

inference_model = keras.Model(feature_space.get_inputs(), outputs)
sample = {"age": 60.0, "sex": 1, "pain": "some", "cholesterol": 233.0}
sample = {name: tf.convert_to_tensor([value]) for name, value in sample.items()}
predicted = inference_model.predict(sample, verbose=0)
outcome.save(training_model, history, predicted=predicted)
