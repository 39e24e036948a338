"""What an example adds to a private step depends on this example alone, or training ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist.errors import ArgumentError
from tfdist.privacy.mechanism import independence
from tfdist.privacy.mechanism.contributions import Added, is_same

L, R, ops = keras.layers, keras.random, keras.ops
Tried = tuple[Any, Any, Any]


class Own(L.Layer):
    """A layer that computes a function of its inputs, `training` and a `SeedGenerator`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.seeds = R.SeedGenerator(5)

    def call(self, inputs: Any, training: bool = False) -> Any:
        return self.function(inputs, training, self.seeds)


def model_of(
    shape: Any, *layers: Any, words: int = 0, loss: Any = "mse", rows: int = 20
) -> Tried:
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, *shape)).astype("float32")
    if words:
        x = rng.integers(0, words, size=(rows, *shape))
    dtype = "int32" if words else None
    model = keras.Sequential(
        [keras.Input(shape, dtype=dtype), *layers, L.Flatten(), L.Dense(2)]
    )
    model.compile(keras.optimizers.SGD(1.0), loss)
    return model, x, rng.normal(size=(rows, 2)).astype("float32")


def attention() -> Tried:
    x = keras.Input((6, 8))
    made = L.LayerNormalization()(x + L.MultiHeadAttention(2, 4, dropout=0.2)(x, x))
    model = keras.Model(x, L.Dense(2)(L.GlobalAveragePooling1D()(L.Dropout(0.1)(made))))
    model.compile("sgd", "mse")
    rng = np.random.default_rng(0)
    return model, *(rng.normal(size=(20, *s)).astype("float32") for s in ((6, 8), (2,)))


def all_alike(x: Any, training: bool, seeds: Any) -> Any:
    """Changes all rows by less than bfloat16 can show, without a derivative."""
    return x * (1 + 2e-4 * ops.stop_gradient(ops.sign(ops.mean(x))))


def in_half_precision(make: Callable[[], Tried]) -> Tried:
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        return make()
    finally:
        keras.config.set_dtype_policy("float32")


def masked_words() -> Tried:
    words = keras.Input((6,), dtype="int32")
    made = L.SpatialDropout1D(0.3)(L.Embedding(9, 5, mask_zero=True)(words))
    model = keras.Model(words, L.Dense(1)(L.LSTM(4)(made)))
    model.compile("sgd", "mse")
    rng = np.random.default_rng(0)
    x = rng.integers(1, 9, size=(12, 6))
    x[np.arange(6) >= rng.integers(1, 7, size=(12, 1))] = 0
    return model, x, rng.normal(size=(12, 1)).astype("float32")


def several_inputs_and_outputs() -> Tried:
    a, b = keras.Input((4,), name="a"), keras.Input((3,), dtype="int32", name="b")
    made = L.Concatenate()([L.Dropout(0.4)(a), L.Flatten()(L.Embedding(7, 4)(b))])
    outputs = [L.Dense(1)(made), L.Dense(2, activation="softmax")(made)]
    model = keras.Model({"a": a, "b": b}, outputs)
    model.compile("sgd", ["mse", "sparse_categorical_crossentropy"])
    rng = np.random.default_rng(0)
    x = {"a": rng.normal(size=(9, 4)).astype("float32"), "b": rng.integers(0, 7, size=(9, 3))}
    return model, x, [rng.normal(size=(9, 1)).astype("float32"), rng.integers(0, 2, size=9)]


def with_x(change: Callable[[Any], Any], tried: Tried) -> Tried:
    model, x, y = tried
    return model, change(x), y


def other_draws(x: Any, training: bool, seeds: Any) -> Any:
    shape = ops.shape(x)
    classes = R.categorical(x, 4, seed=seeds)
    whole = R.randint(shape, 0, 3, seed=seeds)
    made = x * ops.cast(whole, x.dtype) + ops.cast(classes, x.dtype)
    return made + R.truncated_normal(shape, seed=seeds) + R.gamma(shape, 2.0, seed=seeds)


def capacity(x: Any, training: bool, seeds: Any) -> Any:
    """Lets 8 rows of a batch pass, as a mixture of experts does."""
    return x * tf.cast(tf.cumsum(tf.cast(x[:, 0] > 0, tf.int32)) <= 8, x.dtype)[:, None]


def now_and_then(x: Any, training: bool, seeds: Any) -> Any:
    """Mixes in a quarter of the batches."""
    return ops.where(R.uniform((), seed=seeds) < 0.25, x + mean(x), x)


def ranked(x: Any, training: bool, seeds: Any) -> Any:
    return x + 0.1 * ops.cast(ops.arange(ops.shape(x)[0]), x.dtype)[:, None]


def noise_of_positions(x: Any, training: bool, seeds: Any) -> Any:
    """Draws along an axis of unknown size, which is the first one of another tensor."""
    turned = tf.shape(tf.transpose(x, (1, 0, 2)))
    return x * (1 + R.normal((turned[0], 1), seed=seeds))


def mean(x: Any) -> Any:
    return ops.mean(x, 0, keepdims=True)


HONEST: dict[str, Callable[[], Tried]] = {
    "noise": lambda: model_of(
        (4,), L.Dropout(0.3), L.GaussianNoise(0.5), L.GaussianDropout(0.3), L.AlphaDropout(0.3)
    ),
    "images": lambda: model_of(
        (6, 6, 1), L.RandomFlip(), L.RandomRotation(0.2), L.RandomContrast(0.3), L.Conv2D(3, 3)
    ),
    "erasing": lambda: model_of((6, 6, 3), L.RandomErasing(), L.GroupNormalization(3)),
    "gru": lambda: model_of((3, 3), L.GRU(3)),
    "attention": attention,
    "half_precision": lambda: in_half_precision(attention),
    "masked_words": masked_words,
    "several": several_inputs_and_outputs,
    "words": lambda: model_of((5,), L.Embedding(9, 4), L.Dropout(0.3), words=9),
    "other_draws": lambda: model_of((4,), Own(other_draws)),
    "no_seed": lambda: model_of((4,), Own(lambda x, t, s: R.dropout(x, 0.5))),
    "one_for_all": lambda: model_of((4,), Own(lambda x, t, s: x * R.uniform((1, 4), seed=s))),
    "folded": lambda: model_of(
        (6, 4),
        Own(
            lambda x, t, s: ops.reshape(
                R.dropout(ops.reshape(x, (-1, 4)), 0.5, seed=s), (-1, 24)
            )
        ),
    ),
    "loss_of_a_batch": lambda: model_of(
        (4,), L.Dropout(0.5), loss=lambda y, p: ops.mean(ops.square(y - p)) * ops.std(p)
    ),
    "only_positive": lambda: with_x(
        lambda x: np.abs(x) + 0.1, model_of((4,), Own(lambda x, t, s: ops.log(x)))
    ),
    "equal_rows": lambda: with_x(lambda x: 0 * x, model_of((4,), L.Dropout(0.5))),
    "one_row": lambda: model_of((4,), L.Dropout(0.5), rows=1),
}
MIXING: dict[str, Callable[[], Tried]] = {
    "mean": lambda: model_of((4,), Own(lambda x, t, s: x + mean(x))),
    "mean_of_equal_rows": lambda: with_x(
        lambda x: 0 * x, model_of((4,), Own(lambda x, t, s: x + mean(x)))
    ),
    "only_in_training": lambda: model_of(
        (4,), Own(lambda x, t, s: x - mean(x) if t else x), L.Dropout(0.1)
    ),
    "before_a_gru": lambda: model_of(
        (3, 3), Own(lambda x, t, s: x - mean(x) if t else x), L.GRU(3)
    ),
    "mix_up": lambda: model_of((6, 6, 1), L.MixUp(0.2)),
    "cut_mix": lambda: model_of((6, 6, 1), L.CutMix()),
    "capacity": lambda: with_x(np.abs, model_of((4,), Own(capacity))),
    "a_little": lambda: model_of((4,), Own(lambda x, t, s: x + 1e-4 * ops.tanh(ops.mean(x)))),
    "all_alike": lambda: model_of((4,), Own(all_alike)),
    "all_alike_in_half": lambda: in_half_precision(lambda: model_of((4,), Own(all_alike))),
    "rank": lambda: model_of((4,), Own(ranked)),
    "now_and_then": lambda: model_of((4,), Own(now_and_then)),
    "size": lambda: model_of(
        (4,), Own(lambda x, t, s: x * (1 + 0.01 * ops.cast(ops.shape(x)[0], x.dtype)))
    ),
    "shuffled": lambda: model_of((4,), Own(lambda x, t, s: x + R.shuffle(x, seed=s))),
    "largest": lambda: model_of((4,), Own(lambda x, t, s: x / (1e-3 + ops.max(ops.abs(x))))),
    "words_of_others": lambda: model_of(
        (5,), Own(lambda x, t, s: (x + x[:1]) // 2), L.Embedding(9, 4), words=9
    ),
    # 20 positions, which 16 rows do not divide.
    "noise_of_positions": lambda: model_of(
        (20,), L.Reshape((-1, 1)), Own(noise_of_positions), L.Flatten()
    ),
    "noise_by_place": lambda: model_of(
        (4,), Own(lambda x, t, s: x + tf.random.stateless_normal(tf.shape(x), [1, 2]))
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_a_model_that_mixes_nothing_is_accepted_and_left_as_it_was(name: str) -> None:
    model, x, y = HONEST[name]()
    before = [np.array(v) for v in model.variables]
    independence.check(model, x, y)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


@pytest.mark.parametrize("name", MIXING)
def test_a_layer_that_mixes_is_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match="may mix the examples of a batch"):
        independence.check(*MIXING[name]())


@pytest.mark.parametrize("mixes", [False, True])
def test_tiny_gradients_are_compared_in_units_of_the_norm(mixes: bool) -> None:
    """Whole numbers, so that no changed inputs have larger gradients."""

    def centered(x: Any, training: bool, seeds: Any) -> Any:
        x = ops.cast(x, "float32")
        return x - mean(x) if mixes else x

    model, x, y = model_of((3,), Own(centered), words=3)
    model.layers[-1].kernel.assign(0 * model.layers[-1].kernel)
    if not mixes:
        independence.check(model, x, 1e-10 * y, l2_norm_clip=1e-10)
        return
    with pytest.raises(ArgumentError, match="may mix the examples of a batch"):
        independence.check(model, x, 1e-10 * y, l2_norm_clip=1e-10)


def test_numbers_that_no_seed_determines_are_refused() -> None:
    model, x, y = model_of((4,), Own(lambda x, t, s: x + tf.random.normal(tf.shape(x))))
    with pytest.raises(ArgumentError, match=r"drawn by `keras.random`.*RandomStandardNormal"):
        independence.check(model, x, y)


class Late(L.Layer):
    """Mixes only in batches of more rows, or from a later step on, than are tried at first."""

    def __init__(self, optimizer: Any, rows: int, step: int) -> None:
        super().__init__()
        vars(self).update(optimizer=optimizer, rows=rows, step=step)

    def call(self, inputs: Any) -> Any:
        is_late = self.optimizer.iterations >= self.step
        is_large = ops.shape(inputs)[0] > self.rows
        return inputs + tf.where(is_late & is_large, 1.0, 0.0) * mean(inputs)


@pytest.mark.parametrize(("rows", "step", "made"), [(40, 0, 0), (2, 3, 16)])
def test_training_ends_where_examples_begin_to_be_mixed(
    rows: int, step: int, made: int
) -> None:
    optimizer = keras.optimizers.SGD(0.1)
    keras.utils.set_random_seed(1)
    layers = [keras.Input((4,)), Late(optimizer, rows, step), L.Dropout(0.3), L.Dense(2)]
    model = keras.Sequential(layers)
    model.compile(optimizer, "mse")
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(1024, k)).astype("float32") for k in (4, 2))
    privacy = tfdist.DPSGD(1.0, noise_multiplier=1.0, delta=1e-4)
    weights, finished = model.get_weights(), []

    def move(batch: int, logs: Any) -> None:
        """Sets what a user may set; checks must not go by it."""
        finished.append(batch)
        optimizer.iterations.assign(5)

    options = {"batch_size": 64, "epochs": 9, "verbose": 0}
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=move)
    with pytest.raises(ArgumentError, match="that step was not made"):
        tfdist.fit(model, x, y, privacy=privacy, callbacks=[callback], **options)
    # At the latest at the first step of the second epoch.
    assert len(finished) <= made
    if made == 0:
        for ours, theirs in zip(model.get_weights(), weights, strict=True):
            np.testing.assert_array_equal(ours, theirs)


class Codebook(L.Layer):
    """Moves a weight of its own after its use: gradients do not show it."""

    def build(self, shape: Any) -> None:
        self.code = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x: Any) -> Any:
        used = x * self.code
        self.code.assign(0.9 * self.code + 0.1 * keras.ops.mean(x, 0))
        return used


class Seedlike(L.Layer):
    """Keeps a mean in a variable with the name of a seed, or in a seed."""

    def __init__(self, is_seed: bool) -> None:
        super().__init__()
        self.seeds = R.SeedGenerator(5) if is_seed else None

    def build(self, shape: Any) -> None:
        name, added = "seed_generator_state", self.seeds is None
        self.kept = self.add_weight(shape=(2,), name=name, trainable=False) if added else None

    def call(self, x: Any) -> Any:
        kept = self.seeds.state if self.kept is None else self.kept
        used = x + ops.sum(ops.cast(kept, x.dtype))
        kept.assign(ops.cast(ops.abs(x[0, :2]), kept.dtype))
        return used


class Scaled(keras.losses.Loss):
    """Keeps a running scale, in a `keras.Variable` or one of TensorFlow."""

    def __init__(self, kind: Any) -> None:
        super().__init__(name="scaled")
        self.scale = kind(1.0, trainable=False)

    def call(self, y: Any, p: Any) -> Any:
        squares = keras.ops.mean((y - p) ** 2, -1)
        self.scale.assign(0.9 * self.scale + 0.1 * keras.ops.max(squares))
        return squares


class Scoring(keras.Model):
    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        self.best.assign(keras.ops.maximum(self.best, keras.ops.max(y)))
        return super().compute_metrics(x, y, y_pred, sample_weight)


@pytest.mark.parametrize(
    ("cls", "layers", "loss"),
    [
        (keras.Sequential, [Codebook], lambda: "mse"),
        (keras.Sequential, [], lambda: Scaled(keras.Variable)),
        (keras.Sequential, [], lambda: Scaled(tf.Variable)),
        (Scoring, [], lambda: "mse"),
        (keras.Sequential, [lambda: Seedlike(False)], lambda: "mse"),
        (keras.Sequential, [lambda: Seedlike(True)], lambda: "mse"),
    ],
    ids=["weight", "loss", "of TensorFlow", "metrics", "name of a seed", "seed"],
)
def test_state_of_the_examples_is_refused_wherever_it_is_kept(
    cls: Any, layers: Any, loss: Any
) -> None:
    inputs = keras.Input((4,))
    outputs = L.Dense(1)(keras.Sequential([L.Dense(4), *(layer() for layer in layers)])(inputs))
    model = keras.Model(inputs, outputs) if cls is keras.Sequential else cls(inputs, outputs)
    if cls is Scoring:
        model.best = model.add_weight(shape=(), initializer="zeros", trainable=False)
    model.compile("sgd", loss())
    x = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")
    privacy = tfdist.DPSGD(1.0, noise_multiplier=1.0, delta=1e-3)
    with pytest.raises(ArgumentError, match="must keep no state of its examples"):
        tfdist.fit(model, x, x[:, :1], batch_size=10, verbose=0, privacy=privacy)


class HoldsWeight(keras.metrics.Metric):  # type: ignore[misc]
    """Counts in a weight of the model, which then is a variable of the metric."""

    def __init__(self, weight: Any) -> None:
        super().__init__(name="count")
        self.weight = weight

    def update_state(self, y: Any, p: Any, sample_weight: Any = None) -> None:
        self.weight.assign_add(ops.sum(y) * ops.ones_like(self.weight))

    def result(self) -> Any:
        return ops.sum(self.weight)


class Counted(L.Layer):
    def build(self, shape: Any) -> None:
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x: Any) -> Any:
        return x


def test_a_metric_that_holds_a_weight_is_refused() -> None:
    counted = Counted()
    model = keras.Sequential([keras.Input((3,)), counted, L.Dense(1)])
    model.compile("sgd", "mse", metrics=[HoldsWeight(counted.count)])
    x, y = np.ones((32, 3), "float32"), np.ones((32, 1), "float32")
    privacy = tfdist.DPSGD(1.0, noise_multiplier=1.0, delta=1e-3)
    with pytest.raises(ArgumentError, match="must keep no state of its examples"):
        tfdist.fit(model, x, y, batch_size=8, verbose=0, privacy=privacy)


class ReadsLoss(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """A learning rate, or a regularizer, that follows the loss, which has no noise."""

    model: Any = None

    def __call__(self, step: Any) -> Any:
        if self.model is None:
            return 0.1 * ops.sum(step * 0 + 1)
        return ops.sum(step) * ops.convert_to_tensor(self.model.metrics[0].variables[0])


class KeepsLoss(keras.losses.Loss):  # type: ignore[misc]
    """Python code keeps its mean, which another part of the same step can read."""

    kept: Any = None

    def call(self, y: Any, p: Any) -> Any:
        losses = ops.mean(ops.square(y - p), -1)
        if not tf.executing_eagerly():  # tfdist also tries losses without a graph
            self.kept = ops.mean(losses)
        return losses


class ReadsKept(ReadsLoss):
    """As `ReadsLoss`, by a tensor that Python code keeps while a step is traced."""

    def __call__(self, step: Any) -> Any:
        kept = None if self.model is None else self.model.loss.kept
        if kept is None or tf.executing_eagerly():
            return 0.1 * ops.sum(step * 0 + 1)
        return ops.sum(ops.cast(step, "float32")) * kept


@pytest.mark.parametrize("reads", [ReadsLoss(), ReadsKept()], ids=["metric", "kept"])
@pytest.mark.parametrize("place", ["schedule", "regularizer"])
def test_an_update_that_reads_the_loss_is_refused(place: str, reads: Any) -> None:
    reads.model = None
    layer = L.Dense(2, kernel_regularizer=reads if place == "regularizer" else None)
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile(keras.optimizers.SGD(reads if place == "schedule" else 0.1), KeepsLoss())
    reads.model = model
    rows = np.ones((8, 3), "float32"), np.ones((8, 2), "float32")
    privacy = tfdist.DPSGD(1.0, noise_multiplier=1.0, delta=1e-3)
    with pytest.raises(ArgumentError, match="must not read a loss or metric"):
        tfdist.fit(model, *rows, batch_size=4, verbose=0, privacy=privacy)


class ReadsMetric(keras.Model):
    """Its loss of an example reads the mean loss of earlier ones, in one of several ways."""

    way = "variable"

    @tf.function
    def remembered(self) -> Any:
        return self.metrics[0].result()

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if self.way == "variable":
            return loss * (1 + self.metrics[0].variables[0])
        if self.way == "tf.function":  # traced before the step is
            return loss * (1 + self.remembered())
        if self.way == "own":
            self.trackers[0].update_state(loss)
            return loss * (1 + self.trackers[0].result())
        if self.way == "tracked":  # an honest one
            self.trackers[0].update_state(loss)
        return loss


class Tracks(L.Layer):
    """Follows its inputs by a metric, and may use it."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.tracker, self.reads = keras.metrics.Mean("seen"), reads

    def call(self, x: Any) -> Any:
        # What it has of earlier batches: to use this one would mix its examples.
        used = x * (1 + self.tracker.result()) if self.reads else x
        self.tracker.update_state(ops.abs(x))
        return used


def trained_reader(way: str, layer: Any = None) -> Any:
    keras.utils.set_random_seed(1)
    inputs = keras.Input((3,))
    outputs = L.Dense(2)(inputs)
    model = ReadsMetric(inputs, outputs if layer is None else layer(outputs))
    model.way = way
    if way in ("own", "tracked"):
        model.trackers = [keras.metrics.Mean("own")]
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
    privacy = tfdist.DPSGD(1.0, noise_multiplier=1.0, delta=1e-3, seed=4)
    tfdist.fit(model, x, x[:, :2], batch_size=16, verbose=0, privacy=privacy)
    return model


@pytest.mark.parametrize("way", ["variable", "tf.function", "own", "layer"])
def test_a_gradient_that_reads_a_metric_is_refused(way: str) -> None:
    with pytest.raises(ArgumentError, match="must not read a loss or metric"):
        trained_reader(way, Tracks(reads=True) if way == "layer" else None)


class AppliesInMetrics(keras.Model):
    """Makes an update of its own, without clipping and noise, where metrics are computed."""

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x) - tf.cast(y, "float32")) ** 2)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return super().compute_metrics(x, y, y_pred, sample_weight)


def test_an_update_beside_the_private_one_is_refused() -> None:
    inputs = keras.Input((3,))
    model = AppliesInMetrics(inputs, keras.layers.Dense(1)(inputs))
    model.compile("sgd", "mse")
    x, y = np.ones((32, 3), "float32"), np.ones((32, 1), "float32")
    privacy = tfdist.DPSGD(1.0, noise_multiplier=1.0, delta=1e-3)
    with pytest.raises(ArgumentError, match="Only the private update may change weights"):
        tfdist.fit(model, x, y, batch_size=8, verbose=0, privacy=privacy)


@pytest.mark.quick
def test_a_row_with_a_large_gradient_hides_no_other() -> None:
    weights, far = tf.constant([1.0, 1.0]), np.float32(1e6)

    def contribution(small: float, large: float = far) -> Added:
        rows = np.array([[small, 0.0], [0.0, large]])
        norms = np.linalg.norm(np.nan_to_num(rows), axis=1)
        shares = 1.0 / np.maximum(norms, 1.0)
        clipped = (np.nan_to_num(rows) * shares[:, None]).sum(0)
        sums = [tf.constant(total, tf.float32) for total in (rows.sum(0), clipped)]
        squares = tf.constant((rows**2).sum(1), tf.float32)
        return Added(sums[:1], squares, sums[1:])

    def same(first: Added, second: Added) -> bool:
        return bool(is_same(first, second, weights, 1e-4, 1.0))

    assert same(contribution(0.5), contribution(0.5))
    assert same(contribution(0.5, far * (1 + 1e-6)), contribution(0.5))
    assert not same(contribution(0.6), contribution(0.5))  # 1e-7 of all, and 0.1 C
    assert not same(contribution(50.0), contribution(5.0, 5.0))  # their directions are the same
    # Of rows that are not finite nothing is known, but of the others.
    assert same(contribution(0.5, np.nan), contribution(0.5, np.nan))
    assert not same(contribution(0.6, np.nan), contribution(0.5, np.nan))


def test_metrics_that_are_only_updated_change_nothing() -> None:
    expected = trained_reader("plain").get_weights()
    tracked = trained_reader("tracked", Tracks(reads=False))
    for ours, theirs in zip(tracked.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def written(x: Any) -> Any:
    SEEN.assign(tf.maximum(SEEN, tf.reduce_max(x)))
    return x


def by_python(x: Any) -> Any:
    return x * tf.ensure_shape(tf.numpy_function(lambda: np.float32(1), [], tf.float32), [])


def staged(x: Any) -> Any:
    with tf.control_dependencies([tf.raw_ops.Stage(values=[tf.reduce_max(x)])]):
        return tf.identity(x)


SEEN = tf.Variable(0.0)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (written, "must keep no state"),
        (by_python, "Python code"),
        (staged, "keep values for other steps"),
    ],
)
def test_what_a_lambda_may_remember_is_refused(call: Any, match: str) -> None:
    """tfdist takes a `Lambda` for one of Keras's layers, so no trial step is traced."""
    model = keras.Sequential([keras.Input((3,)), L.Dense(2), L.Lambda(call)])
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
    privacy = tfdist.DPSGD(1.0, noise_multiplier=1.0, delta=1e-3)
    with pytest.raises(ArgumentError, match=match):
        tfdist.fit(model, x, x[:, :2], batch_size=16, verbose=0, privacy=privacy)
