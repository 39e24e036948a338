"""Trains on scikit-learn's handwritten digits with compressed gradients, then quantizes.

PowerSGD sends each gradient as two thin matrices. Then the chief quantizes the trained
model with Keras and with LiteRT, and prints the size and accuracy of each file.

    python examples/compressed_digits.py
    tfdist run -n 2 examples/compressed_digits.py
"""

import contextlib
import io
import tempfile
import warnings
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tfdist

COMPRESSION = tfdist.PowerSGD(rank=2, start_after=20)


def make_model():
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(256, activation="relu"),
            layers.Dense(10),
        ]
    )
    model.compile(
        optimizer="adam",
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def without_optimizer(model):
    """Returns an uncompiled copy: files of a compiled model also contain Adam's slots."""
    copy = type(model).from_config(model.get_config())
    copy.set_weights(model.get_weights())
    return copy


def keras_size(model, folder):
    model.save(folder / "model.keras")
    return (folder / "model.keras").stat().st_size


def litert(model, **options):
    """Returns the model in the format of LiteRT, for mobile devices."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = options.pop("optimizations", [])
    converter.representative_dataset = options.pop("representative_dataset", None)
    for name, value in options.items():
        setattr(converter.target_spec, name, value)
    with contextlib.redirect_stdout(io.StringIO()):  # Keras lists the variables
        return converter.convert()


def litert_scores(content, x):
    interpreter = tf.lite.Interpreter(model_content=content)
    (image,), (scores,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(image["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(image["index"], x)
    interpreter.invoke()
    return interpreter.get_tensor(scores["index"])


def show_small_models(model, x_train, x_test, y_test):
    def row(name, size, scores):
        accuracy = np.mean(np.argmax(scores, 1) == y_test)
        print(f"{name:<24} {size / 1000:7.0f} kB   {accuracy:.1%}", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        row("Keras, with Adam", keras_size(model, folder), model.predict(x_test, verbose=0))
        plain = without_optimizer(model)
        row("Keras", keras_size(plain, folder), plain.predict(x_test, verbose=0))
        for mode in ("int8", "int4"):
            small = without_optimizer(model)
            small.quantize(mode)  # its Dense layers; Conv2D has no quantize
            row(f"Keras {mode}", keras_size(small, folder), small.predict(x_test, verbose=0))
    optimized = {"optimizations": [tf.lite.Optimize.DEFAULT]}
    whole = {
        "representative_dataset": lambda: ([image[None]] for image in x_train[:100]),
        "supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS_INT8],
    }
    for kind, options in {
        "float32": {},
        "float16": {**optimized, "supported_types": [tf.float16]},
        "int8, weights": optimized,
        "int8, all": {**optimized, **whole},
    }.items():
        content = litert(plain, **options)
        row(f"LiteRT {kind}", len(content), litert_scores(content, x_test))


warnings.filterwarnings("ignore", message=r"Layer \w+ does not have a `quantize`")
warnings.filterwarnings("ignore", message=r"(?s).*tf.lite.Interpreter is deprecated")
warnings.filterwarnings("ignore", message="Statistics for quantized inputs were expected")
session = tfdist.init(seed=1)

images, labels = load_digits(return_X_y=True)
x_train, x_test, y_train, y_test = train_test_split(
    (images / 16).astype("float32").reshape(-1, 8, 8, 1),
    labels,
    test_size=0.25,
    stratify=labels,
    random_state=1,
)

model = make_model()
tfdist.fit(model, x_train, y_train, epochs=8, verbose=2, compression=COMPRESSION)
accuracy = tfdist.evaluate(model, x_test, y_test, verbose=0, return_dict=True)["accuracy"]

if session.is_chief:
    traffic = tfdist.compression.bytes_per_step(model, COMPRESSION)
    print(f"\nheld-out accuracy: {accuracy:.1%}")
    print(f"bytes a step: {traffic.compressed:,} instead of {traffic.plain:,}")
    print(f"times fewer: {traffic.ratio:.1f}\n")
    show_small_models(model, x_train, x_test, y_test)
