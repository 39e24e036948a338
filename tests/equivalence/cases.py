"""The trainings whose result must not depend on where they run.

Each case is a function that trains and returns what must be equal: weights by name of the
variable, and the history. `train(model, ...)` is `tfdist.fit` on the strategy under test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tfdist

L = keras.layers
Train = Callable[..., Any]
Case = Callable[[Train], tuple[Any, Any]]
CASES: dict[str, Case] = {}
FAMILIES: dict[str, list[str]] = {}


def case(family: str) -> Callable[[Case], Case]:
    """Adds a training to the cases of a family."""

    def add(function: Case) -> Case:
        CASES[function.__name__] = function
        FAMILIES.setdefault(family, []).append(function.__name__)
        return function

    return add


def table(rows: int = 961, columns: int = 20, classes: int = 3) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, columns)).astype("float32")
    return x, (x @ rng.normal(size=(columns, classes))).argmax(1)


def sequences(rows: int = 321, length: int = 12, words: int = 50) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.integers(1, words, size=(rows, length))
    x[np.arange(length) >= rng.integers(2, length + 1, size=(rows, 1))] = 0  # padding
    return x, (x.sum(1) % 2).astype("float32")


def images(rows: int = 193) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 8, 8, 1)).astype("float32") + 3.0
    return x, rng.integers(0, 4, size=rows)


def crossentropy(**options: Any) -> Any:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


def mlp(
    optimizer: Any,
    loss: Any = None,
    *,
    normalized: bool = False,
    bias_regularizer: Any = "l1",
    **compile_options: Any,
) -> Any:
    """A small model, since tracing its steps takes most of a test's time.

    It is smooth: on a ReLU's edge the last bit of an input changes a training by 1e-3.
    """
    model = keras.Sequential(
        [
            keras.Input((20,)),
            L.Dense(32, "tanh", kernel_regularizer=keras.regularizers.L2(1e-3)),
            *[L.LayerNormalization()] * normalized,
            L.Dense(3, bias_regularizer=bias_regularizer),
        ]
    )
    compile_options.setdefault("metrics", ["accuracy"])
    model.compile(optimizer=optimizer, loss=loss or crossentropy(), **compile_options)
    return model


def clipped_sgd() -> Any:
    """Clips some steps and not others: unlike Adam it shows gradients of a wrong scale."""
    return keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.5)


def rows_case(rows: int) -> Case:
    def run(train: Train) -> tuple[Any, Any]:
        model = mlp(clipped_sgd())
        x, y = table(rows)
        return model, train(model, x, y, batch_size=64, epochs=3, validation_data=table(101))

    return run


for _rows in (960, 961, 3, 1):
    CASES[f"rows_{_rows}"] = rows_case(_rows)
FAMILIES["rows"] = list(CASES)


@case("samplers")
def poisson_some_batches_empty(train: Train) -> tuple[Any, Any]:
    model = mlp(keras.optimizers.SGD(0.01, momentum=0.9))
    sampler = tfdist.privacy.Poisson()
    steps = sampler.batches(0, 80, num_rows=80, batch_size=2, seed=3)
    assert 3 < sum(len(rows) == 0 for rows in steps) < 25  # 11 are expected
    options = {"batch_size": 2, "epochs": 2, "sampler": sampler, "seed": 3}
    return model, train(model, *table(80), **options)


@case("optimizers")
def sgd_momentum(train: Train) -> tuple[Any, Any]:
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True, clipnorm=0.5)
    model = mlp(optimizer, normalized=True)
    return model, train(model, *table(), batch_size=64, epochs=2)


@case("optimizers")
def adamw_ema(train: Train) -> tuple[Any, Any]:
    optimizer = keras.optimizers.AdamW(
        0.01, weight_decay=0.1, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=5
    )
    model = mlp(optimizer)
    # Keras matches names with the layer's name, and keeps a list as keys of `tf.Variable`s.
    kernel = model.trainable_variables[0]
    optimizer.exclude_from_weight_decay(var_list=[kernel], var_names=["dense.*bias"])
    return model, train(model, *table(), batch_size=64, epochs=2)


@case("optimizers")
def gradient_accumulation(train: Train) -> tuple[Any, Any]:
    model = mlp(keras.optimizers.Adam(0.01, gradient_accumulation_steps=3))
    return model, train(model, *table(), batch_size=64, epochs=2)


@case("optimizers")
def loss_scaling(train: Train) -> tuple[Any, Any]:
    # The first scales overflow in sums over rows: steps are skipped, on all replicas alike.
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01), initial_scale=2.0**127, dynamic_growth_steps=4
    )
    model = keras.Sequential([keras.Input((20,)), L.Dense(3)])
    model.compile(optimizer, crossentropy(), metrics=["accuracy"])
    x, y = table()
    history = train(model, x * 100, y, batch_size=64, epochs=2)
    assert 8 < int(optimizer.inner_optimizer.iterations) < 29  # of 32 steps
    return model, history


@case("optimizers")
def mixed_precision(train: Train) -> tuple[Any, Any]:
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = mlp(keras.optimizers.Adam(1e-4))
        return model, train(model, *table(), batch_size=64, epochs=2)
    finally:
        keras.mixed_precision.set_global_policy("float32")


@case("optimizers")
def every_optimizer(train: Train) -> tuple[Any, Any]:
    models = []
    for name in ("Adadelta", "Adafactor", "Adagrad", "Adamax", "Ftrl", "Lamb", "Lion",
                 "Nadam", "RMSprop"):  # fmt: skip
        model = keras.Sequential([keras.Input((20,)), L.Dense(3)])
        model.compile(getattr(keras.optimizers, name)(0.01), crossentropy())
        history = train(model, *table(131), batch_size=64, epochs=1)
        models.append(model)
    return models, history


@case("layers")
def cnn_synchronized_batch_norm(train: Train) -> tuple[Any, Any]:
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            L.Conv2D(6, 3, use_bias=False),
            L.BatchNormalization(synchronized=True, momentum=0.9),
            L.Activation("silu"),
            L.GlobalAveragePooling2D(),
            L.Dense(4),
        ]
    )
    model.compile("sgd", crossentropy(), metrics=["accuracy"])
    x, y = images(195)  # of 4 replicas one has no row of the last batch, of 3 rows
    return model, train(model, x, y, batch_size=32, epochs=2, validation_data=(x, y))


@case("layers")
def embedding_lstm(train: Train) -> tuple[Any, Any]:
    model = keras.Sequential(
        [
            keras.Input((12,), dtype="int32"),
            L.Embedding(50, 8, mask_zero=True),
            L.LSTM(8, dropout=0.2),
            L.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile(
        keras.optimizers.Adam(0.01), "binary_crossentropy", metrics=["accuracy", "auc"]
    )
    return model, train(model, *sequences(), batch_size=32, epochs=2)


@case("layers")
def masked_tagging(train: Train) -> tuple[Any, Any]:
    words = keras.Input((12,), dtype="int32")
    hidden = L.Embedding(50, 8, mask_zero=True)(words)
    tags = L.Dense(2, name="tags")(L.GRU(8, return_sequences=True)(hidden))
    last = L.Dense(1, name="last")(L.LSTM(4)(hidden))
    model = keras.Model(words, {"tags": tags, "last": last})
    model.compile(
        keras.optimizers.Adam(0.01),
        {"tags": crossentropy(), "last": "mse"},
        loss_weights={"tags": 1.0, "last": 0.5},
        metrics={"tags": ["accuracy"]},
    )
    x, y = sequences()
    targets = {"tags": x % 2, "last": y[:, None]}
    return model, train(model, x, targets, batch_size=32, epochs=2)


@case("inputs")
def several_inputs_and_outputs(train: Train) -> tuple[Any, Any]:
    a, b = keras.Input((12,), name="a"), keras.Input((8,), name="b")
    hidden = L.Dense(16, activation="tanh")(L.Concatenate()([a, b]))
    model = keras.Model(
        {"a": a, "b": b},
        {"kind": L.Dense(3, name="kind")(hidden), "size": L.Dense(1, name="size")(hidden)},
    )
    model.compile(
        clipped_sgd(),
        {"kind": crossentropy(), "size": "mse"},
        loss_weights={"kind": 1.0, "size": 0.3},
        metrics={"kind": ["accuracy"], "size": ["mae"]},
    )
    x, y = table()
    inputs = {"a": x[:, :12], "b": x[:, 12:]}
    targets = {"kind": y, "size": x.sum(1, keepdims=True)}
    return model, train(model, inputs, targets, batch_size=64, epochs=2, validation_split=0.2)


class Mean(L.Layer):
    def call(self, rows: Any) -> Any:
        return tf.reduce_mean(tf.cast(rows, tf.float32) / 20.0, 1, keepdims=True)


@case("inputs")
def sparse_and_ragged(train: Train) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x, y = table(131)
    few = tf.sparse.from_dense(x * (rng.random(x.shape) < 0.1))
    lengths = rng.integers(1, 6, len(x))
    words = tf.RaggedTensor.from_row_lengths(rng.integers(0, 20, lengths.sum()), lengths)
    inputs = (
        keras.Input((20,)),
        keras.Input((20,), sparse=True),
        keras.Input((None,), dtype="int64", ragged=True),
    )
    joined = L.Concatenate()([L.Dense(4)(inputs[0]), L.Dense(4)(inputs[1]), Mean()(inputs[2])])
    model = keras.Model(inputs, L.Dense(3)(joined))
    # Not clipped: a norm is taken of rows as they come, and those of a sparse input come once
    # for each replica.
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(optimizer, crossentropy(), metrics=["accuracy"])
    batches = tf.data.Dataset.from_tensor_slices(((x, few, words), y)).batch(32)
    train(model, (x, few, words), y, batch_size=32, epochs=1)
    return model, train(model, batches, epochs=2, validation_data=batches)


class Subclassed(keras.Model):
    """Without a config: it cannot be rebuilt, only moved."""

    def __init__(self, act: Callable[[Any], Any]) -> None:
        super().__init__()
        self.act = act
        self.first, self.second = L.Dense(16), L.Dense(3)
        self.steps = self.add_weight(shape=(), trainable=False, name="steps")

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.steps.assign(self.steps + 1.0)
        return self.second(self.act(self.first(x)))


@case("layers")
def subclassed_by_function(train: Train) -> tuple[Any, Any]:
    def make() -> Any:
        model = Subclassed(lambda x: tf.sin(x))
        model.compile(clipped_sgd(), crossentropy(), metrics=["accuracy"])
        return model

    history = train(make, *table(), batch_size=64, epochs=2)
    return history.model, history


@case("losses")
def sample_weight(train: Train) -> tuple[Any, Any]:
    model = mlp(clipped_sgd(), weighted_metrics=["accuracy"])
    weights = np.random.default_rng(1).uniform(0, 3, 961).astype("float32")
    return model, train(model, *table(), sample_weight=weights, batch_size=64, epochs=2)


@case("losses")
def class_weight(train: Train) -> tuple[Any, Any]:
    model = mlp(clipped_sgd())
    return model, train(model, *table(), class_weight={0: 3.0, 1: 0.5}, batch_size=64, epochs=2)


def unbalanced() -> tuple[Any, Any]:
    x, y = table()
    kept = (y > 0) | (np.arange(len(y)) % 20 == 0)
    return x[kept], y[kept]


@case("samplers")
def class_balanced(train: Train) -> tuple[Any, Any]:
    model = mlp(clipped_sgd())
    sampler = tfdist.samplers.ClassBalanced()
    return model, train(model, *unbalanced(), sampler=sampler, batch_size=64, epochs=3)


@case("samplers")
def stratified(train: Train) -> tuple[Any, Any]:
    model = mlp(clipped_sgd())
    sampler = tfdist.samplers.Stratified()
    return model, train(model, *unbalanced(), sampler=sampler, batch_size=60, epochs=3)


@case("samplers")
def class_streams(train: Train) -> tuple[Any, Any]:
    model = mlp(clipped_sgd())
    dataset = tf.data.Dataset.from_tensor_slices(unbalanced()).shuffle(100, seed=3).batch(30)
    data = tfdist.ByClass(dataset, buffer_size=100)  # one class is kept, two are streams
    options = {"sampler": tfdist.samplers.ClassBalanced(), "batch_size": 50}
    return model, train(model, data, epochs=2, **options)


@case("samplers")
def augmented(train: Train) -> tuple[Any, Any]:
    model = keras.Sequential([keras.Input((6, 6, 1)), L.Flatten(), L.Dense(4)])
    model.compile(keras.optimizers.Adam(0.01), crossentropy())
    x, y = images()
    layers = [L.RandomFlip(), L.RandomRotation(0.2), L.RandomCrop(6, 6)]
    options = {"augment": tfdist.Augment(layers), "validation_data": (x[:, 1:7, 1:7], y)}
    return model, train(model, x, y, batch_size=32, epochs=2, **options)


@case("samplers")
def augmented_where_repeated(train: Train) -> tuple[Any, Any]:
    models = [mlp(clipped_sgd()), mlp(clipped_sgd())]
    x, y = unbalanced()
    augment = tfdist.Augment(L.GaussianNoise(0.3), repeated=True)
    sampler = tfdist.samplers.ClassBalanced()
    train(models[0], x, y, sampler=sampler, augment=augment, batch_size=64, epochs=2)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(50).filter(lambda *_: True)
    augment = tfdist.Augment(L.GaussianNoise(0.3), classes=[0])
    return models, train(models[1], dataset, augment=augment, epochs=2)


@case("losses")
def logit_adjusted(train: Train) -> tuple[Any, Any]:
    x, y = unbalanced()
    loss = tfdist.imbalance.LogitAdjustedCrossentropy(np.bincount(y))
    model = mlp(clipped_sgd(), loss)
    return model, train(model, x, y, class_weight="balanced", batch_size=64, epochs=2)


@case("losses")
def loss_reductions(train: Train) -> tuple[Any, Any]:
    weights = np.random.default_rng(1).uniform(0, 3, 131).astype("float32")
    models = []
    for reduction in ("sum", "mean_with_sample_weight"):
        model = mlp("sgd", crossentropy(reduction=reduction))
        model.optimizer.learning_rate = 1e-3
        history = train(model, *table(131), sample_weight=weights, batch_size=32, epochs=2)
        models.append(model)
    return models, history


@case("inputs")
def steps_per_execution(train: Train) -> tuple[Any, Any]:
    model = mlp(clipped_sgd(), steps_per_execution=4)
    return model, train(model, *table(), batch_size=64, epochs=2, validation_data=table(300))


@case("inputs")
def steps_per_epoch(train: Train) -> tuple[Any, Any]:
    model = mlp(clipped_sgd())
    return model, train(
        model,
        *table(),
        batch_size=64,
        epochs=4,
        steps_per_epoch=6,
        validation_data=table(300),
        validation_steps=2,
    )


@case("layers")
def dropout(train: Train) -> tuple[Any, Any]:
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            L.Conv2D(6, 3, activation="tanh"),
            L.SpatialDropout2D(0.2),
            L.Flatten(),
            L.Dropout(0.5),
            L.Dense(4),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), crossentropy())
    return model, train(model, *images(), batch_size=32, epochs=2)


@case("layers")
def dropout_compiled_by_xla(train: Train) -> tuple[Any, Any]:
    """As Keras does on a GPU by itself, where one process trains."""
    model = keras.Sequential(
        [keras.Input((20,)), L.Dense(16, activation="tanh"), L.Dropout(0.5), L.Dense(3)]
    )
    model.compile(keras.optimizers.Adam(0.01), crossentropy(), jit_compile=True)
    return model, train(model, *table(301), batch_size=64, epochs=2)


@case("inputs")
def tf_dataset(train: Train) -> tuple[Any, Any]:
    def batches(rows: int) -> Any:
        return tf.data.Dataset.from_tensor_slices(table(rows)).shuffle(200, seed=3).batch(50)

    model = mlp(clipped_sgd())
    return model, train(
        model, batches(961), epochs=2, validation_data=batches(101), class_weight={1: 2.0}
    )


@case("inputs")
def tf_dataset_of_unknown_length(train: Train) -> tuple[Any, Any]:
    dataset = tf.data.Dataset.from_tensor_slices(table(300)).batch(64).filter(lambda *_: True)
    model = mlp(clipped_sgd())
    history = train(model, dataset, epochs=2)
    endless = tf.data.Dataset.from_tensor_slices(table(300)).repeat().batch(64)
    train(model, endless, epochs=2, steps_per_epoch=3)
    return model, history


class Pages(keras.utils.PyDataset):
    def __init__(self, x: Any, y: Any) -> None:
        super().__init__(workers=2)
        self.x, self.y = x, y

    def __len__(self) -> int:
        return -(-len(self.x) // 50)

    def __getitem__(self, page: int) -> tuple[Any, Any]:
        return self.x[page * 50 : page * 50 + 50], self.y[page * 50 : page * 50 + 50]


@case("inputs")
def py_dataset(train: Train) -> tuple[Any, Any]:
    model = mlp(clipped_sgd())
    return model, train(model, Pages(*table()), epochs=2, validation_data=Pages(*table(101)))


@case("inputs")
def generator(train: Train) -> tuple[Any, Any]:
    def pages() -> Any:
        x, y = table()
        while True:
            for start in range(0, 961, 50):
                yield x[start : start + 50], y[start : start + 50]

    model = mlp(clipped_sgd())
    return model, train(model, pages(), epochs=2, steps_per_epoch=12)


class OwnStep(keras.Model):
    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            logits = self(x, training=True)
            loss = self.compute_loss(x, y, logits)
        grads = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(grads, self.trainable_variables, strict=True))
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=tf.shape(x)[0])
            else:
                metric.update_state(y, logits)
        return {"raw": loss, **{m.name: m.result() for m in self.metrics}}


@case("losses")
def own_train_step(train: Train) -> tuple[Any, Any]:
    inputs = keras.Input((20,))
    model = OwnStep(inputs, L.Dense(3)(L.Dense(16, activation="tanh")(inputs)))
    model.compile(clipped_sgd(), crossentropy(), metrics=["accuracy"])
    return model, train(model, *table(), batch_size=64, epochs=2)


class Adversaries(keras.Model):
    """Two optimizers; the second update sees what the first one changed."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = keras.Sequential([keras.Input((4,)), L.Dense(20)])
        self.judge = keras.Sequential([keras.Input((20,)), L.Dense(8, "tanh"), L.Dense(1)])
        self.judge_loss = keras.metrics.Mean(name="judge_loss")

    def compile(self, **options: Any) -> None:
        super().compile(**options)
        self.judge_optimizer = keras.optimizers.Adam(0.01)
        self.judge_optimizer.build(self.judge.trainable_variables)
        self.optimizer.build(self.maker.trainable_variables)

    def call(self, x: Any) -> Any:
        return self.judge(x)

    def train_step(self, data: Any) -> Any:
        x = data
        noise = x[:, :4]
        with tf.GradientTape() as tape:
            scores = self.judge(x) - self.judge(self.maker(noise))
            loss = tf.reduce_mean(tf.nn.softplus(-scores))
        grads = tape.gradient(loss, self.judge.trainable_variables)
        self.judge_optimizer.apply(grads, self.judge.trainable_variables)
        self.judge_loss.update_state(loss, sample_weight=tf.shape(x)[0])
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.nn.softplus(-self.judge(self.maker(noise))))
        grads = tape.gradient(loss, self.maker.trainable_variables)
        self.optimizer.apply(grads, self.maker.trainable_variables)
        return {"judge_loss": self.judge_loss.result()}


@case("losses")
def two_optimizers(train: Train) -> tuple[Any, Any]:
    model = Adversaries()
    model.compile(optimizer=keras.optimizers.Adam(0.01))
    return model, train(model, table()[0], batch_size=64, epochs=2)


@case("optimizers")
def second_fit_continues(train: Train) -> tuple[Any, Any]:
    model = mlp(clipped_sgd())
    train(model, *table(), batch_size=64, epochs=1)
    return model, train(model, *table(), batch_size=64, epochs=2)


@case("losses")
def own_compute_loss(train: Train) -> tuple[Any, Any]:
    class OwnLoss(keras.Model):
        def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):  # type: ignore[no-untyped-def]
            return tf.reduce_mean(tf.square(y_pred[:, 0] - tf.cast(y, tf.float32)))

    inputs = keras.Input((20,))
    model = OwnLoss(inputs, L.Dense(1)(L.BatchNormalization(synchronized=True)(inputs)))
    model.compile(keras.optimizers.Adam(0.01))
    return model, train(model, *table(), batch_size=64, epochs=2)


def noiseless(**options: Any) -> tfdist.DPSGD:
    """Clips, and adds no noise, which would differ with the number of replicas."""
    return tfdist.DPSGD(noise_multiplier=0.0, delta=1e-5, **options)


def private_mlp(optimizer: Any, **options: Any) -> Any:
    return mlp(optimizer, bias_regularizer=None, **options)


@case("privacy")
def private(train: Train) -> tuple[Any, Any]:
    model = private_mlp(keras.optimizers.AdamW(0.01, weight_decay=0.01), normalized=True)
    return model, train(
        model,
        *table(),
        batch_size=64,
        epochs=2,
        validation_data=table(101),
        privacy=noiseless(l2_norm_clip=0.5),
    )


@case("privacy")
def private_compiled_by_xla(train: Train) -> tuple[Any, Any]:
    model = private_mlp(keras.optimizers.Adam(0.01), jit_compile=True)
    falling = keras.optimizers.schedules.ExponentialDecay(0.5, 5, 0.5)
    privacy = noiseless(l2_norm_clip=falling)
    return model, train(model, *table(300), batch_size=64, epochs=2, privacy=privacy)


@case("privacy")
def private_adaptive(train: Train) -> tuple[Any, Any]:
    model = private_mlp(keras.optimizers.Adam(0.01))
    privacy = noiseless(l2_norm_clip=0.1, target_quantile=0.5)
    return model, train(model, *table(300), batch_size=64, epochs=2, privacy=privacy)


@case("privacy")
def private_clipped_by_layer(train: Train) -> tuple[Any, Any]:
    model = private_mlp(keras.optimizers.Adam(0.01))
    privacy = noiseless(l2_norm_clip=0.1, clipping="per_layer", bands=2)
    return model, train(model, *table(300), batch_size=64, epochs=2, privacy=privacy)


@case("privacy")
def private_users(train: Train) -> tuple[Any, Any]:
    model = private_mlp(keras.optimizers.Adam(0.01))
    ids = np.minimum(np.random.default_rng(2).geometric(0.05, 300), 60)
    privacy = noiseless(
        l2_norm_clip=0.5, group_ids=ids, max_rows_per_group=7, microbatch_size=20
    )
    return model, train(model, *table(300), batch_size=20, epochs=2, privacy=privacy)


@case("optimizers")
def power_sgd(train: Train) -> tuple[Any, Any]:
    # Few steps in float64, since warm starts amplify rounding.
    keras.config.set_dtype_policy("float64")
    try:
        words = keras.Input((12,), dtype="int32")
        hidden = L.Embedding(50, 8)(words)  # whose rows travel as they are
        hidden = L.Conv1D(6, 3, activation="tanh")(hidden)
        model = keras.Model(words, L.Dense(4)(L.Flatten()(hidden)))
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=1.0)
        model.compile(optimizer, crossentropy(dtype="float64"))
    finally:
        keras.config.set_dtype_policy("float32")
    compression = tfdist.PowerSGD(rank=2, start_after=1, min_ratio=1.1)
    x, y = sequences(193)  # the last batch has a row, and other replicas none
    return model, train(model, x, y % 4, batch_size=64, epochs=2, compression=compression)


@case("privacy")
def private_long_and_rebalanced(train: Train) -> tuple[Any, Any]:
    # So many positions that XLA computes the norms.
    model = keras.Sequential(
        [
            keras.Input((64,), dtype="int32"),
            L.Embedding(50, 160),
            L.Dense(96, activation="tanh"),
            L.GlobalAveragePooling1D(),
            L.Dense(1),
        ]
    )
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.5), loss, steps_per_execution=2)
    sampler = tfdist.privacy.PoissonLike(tfdist.samplers.ClassBalanced())
    x, y = sequences(97, length=64)
    privacy = noiseless(l2_norm_clip=0.5)
    return model, train(
        model, x, (y > 0) & (x[:, 0] > 20), batch_size=16, sampler=sampler, privacy=privacy
    )


@case("privacy")
def private_bias_corrected_adam(train: Train) -> tuple[Any, Any]:
    model = private_mlp(tfdist.privacy.DPAdam(0.01, variance_floor=1e-4))
    return model, train(
        model, *table(300), batch_size=64, epochs=2, privacy=noiseless(l2_norm_clip=0.5)
    )


@case("privacy")
def private_in_turn(train: Train) -> tuple[Any, Any]:
    models = [private_mlp(keras.optimizers.SGD(0.1)) for _ in range(2)]
    # The noise is the same too: its first stream makes all of it.
    privacy = tfdist.DPFTRL(0.5, noise_multiplier=0.5, delta=1e-3, bands=3, seed=4)
    train(models[0], *table(300), batch_size=64, epochs=3, privacy=privacy)
    dataset = tf.data.Dataset.from_tensor_slices(table(300)).batch(64)
    privacy = tfdist.DPFTRL(0.5, noise_multiplier=0.5, delta=1e-3, min_separation=5, seed=4)
    return models, train(models[1], dataset, epochs=2, privacy=privacy)


@case("privacy")
def private_augmented(train: Train) -> tuple[Any, Any]:
    model = private_mlp(keras.optimizers.Adam(0.01))
    privacy = noiseless(l2_norm_clip=0.1, augmentations=3)
    augment = tfdist.Augment(L.GaussianNoise(0.3))
    options = {"augment": augment, "batch_size": 4, "epochs": 2}  # some batches are empty
    return model, train(model, *table(100), privacy=privacy, **options)


@case("privacy")
def private_some_batches_empty(train: Train) -> tuple[Any, Any]:
    model = private_mlp(keras.optimizers.SGD(0.05, momentum=0.9), steps_per_execution=3)
    options = {"batch_size": 2, "epochs": 2, "privacy": noiseless(l2_norm_clip=0.5)}
    return model, train(model, *table(60), **options)


@case("privacy")
def private_microbatches_and_dropout(train: Train) -> tuple[Any, Any]:
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            L.Conv2D(6, 3, activation="tanh"),
            L.GroupNormalization(2),
            L.Flatten(),
            L.Dropout(0.5),
            L.Dense(4),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), crossentropy(), weighted_metrics=["accuracy"])
    weights = np.random.default_rng(1).uniform(0, 3, 193).astype("float32")
    return model, train(
        model,
        *images(),
        sample_weight=weights,
        batch_size=32,
        epochs=2,
        privacy=noiseless(l2_norm_clip=0.5, microbatch_size=5),
    )


@case("privacy")
def private_masked_tagging(train: Train) -> tuple[Any, Any]:
    words = keras.Input((12,), dtype="int32")
    hidden = L.Embedding(50, 8, mask_zero=True)(words)
    tags = L.Dense(2, name="tags")(hidden)
    # A private LSTM takes long to trace; tests/privacy/test_clipping.py has one with a mask.
    last = L.Dense(1, name="last")(L.GlobalAveragePooling1D()(hidden))
    model = keras.Model(words, {"tags": tags, "last": last})
    model.compile(
        keras.optimizers.Adam(0.01),
        {"tags": crossentropy(), "last": "mse"},
        loss_weights={"tags": 1.0, "last": 0.5},
        metrics={"tags": ["accuracy"]},
    )
    x, y = sequences(41)
    targets = {"tags": x % 2, "last": y[:, None]}
    privacy = noiseless(l2_norm_clip=0.5)
    return model, train(model, x, targets, batch_size=16, epochs=1, privacy=privacy)


@case("privacy")
def private_class_weight_and_mixed_precision(train: Train) -> tuple[Any, Any]:
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = private_mlp(keras.optimizers.Adam(1e-3))
        return model, train(
            model,
            *table(),
            class_weight={0: 3.0, 1: 0.5},
            batch_size=64,
            epochs=1,
            privacy=noiseless(l2_norm_clip=0.5),
        )
    finally:
        keras.mixed_precision.set_global_policy("float32")


@case("losses")
def double_precision(train: Train) -> tuple[Any, Any]:
    # A replica has 9 of 17 rows: float32 has no such fraction.
    weights = np.random.default_rng(1).uniform(0, 3, 61)
    models = []
    keras.config.set_floatx("float64")
    try:
        for loss in ("sum_over_batch_size", "sum", "mean_with_sample_weight"):
            model = keras.Sequential(
                [
                    keras.Input((20,)),
                    L.Dense(8, "tanh"),
                    L.BatchNormalization(synchronized=True),
                    L.Dropout(0.3),
                    L.Dense(3),
                ]
            )
            model.compile(
                keras.optimizers.SGD(0.01, momentum=0.9), crossentropy(reduction=loss)
            )
            history = train(model, *table(61), sample_weight=weights, batch_size=22, epochs=2)
            models.append(model)
    finally:
        keras.config.set_floatx("float32")
    return models, history
