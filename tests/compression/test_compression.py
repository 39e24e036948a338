"""Compression of gradients, against a reference in NumPy of several workers."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.equivalence.cases import crossentropy, table
from tests.strategies.devices import Devices
from tfdist import _keras
from tfdist.compression.extension import CompressedTraining
from tfdist.compression.half import HalfExchange, HalfPrecision
from tfdist.compression.power_sgd import LowRankExchange
from tfdist.errors import ArgumentError, CheckpointError
from tfdist.resume.checkpoint import files, tensors
from tfdist.resume.checkpoint.shards import Piece, TensorReader, merge, write_shard
from tfdist.step.exchange import Contribution
from tfdist.step.prepared import prepare
from tfdist.step.state import Role, Sharded, TrainState

L = keras.layers
WORKERS = 3
pytestmark = pytest.mark.quick


class Added:
    """Stands for a strategy: replicas that run one after the other, and sums given ahead."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.sums: Any = None

    def reduce_step(self, gradients: Any, others: Any, share: Any, variables: Any) -> Any:
        self.sent.append([np.array(g) for g in gradients])
        return (gradients if self.sums is None else list(self.sums)), list(others)


class Workers:
    """Several workers' exchanges, each with its state, whose steps are made together."""

    def __init__(self, settings: Any, model: Any, number: int = WORKERS) -> None:
        self.model = model
        self.exchanges = [LowRankExchange(settings, model) for _ in range(number)]

    def step(
        self, gradients: list[list[Any]], counts: bool = True, scale: float | None = None
    ) -> tuple[list[Any], list[Any]]:
        """Makes a step; gives what a worker applies, and the numbers that each sent."""
        variables = self.model.trainable_variables
        scales = [None if scale is None else tf.constant(scale)] * len(variables)
        phases = {exchange.next_phase() for exchange in self.exchanges}
        assert len(phases) == 1
        (phase,) = phases

        def reduced(exchange: Any, own: list[Any], added: Any) -> Any:
            given = Contribution(
                [tf.constant(g) for g in own], [], tf.ones([]), variables, scales
            )
            return exchange.reduce(added, given, phase)

        asked = Added()
        for exchange, own in zip(self.exchanges, gradients, strict=True):
            reduced(exchange, own, asked)
        added = Added()
        added.sums = [tf.constant(sum(parts)) for parts in zip(*asked.sent, strict=True)]
        applied = []
        for exchange, own in zip(self.exchanges, gradients, strict=True):
            (totals, _), keep = reduced(exchange, own, added)
            keep(tf.constant(counts))
            exchange.finish(tf.constant(counts))
            exchange.end_step()
            applied.append([np.array(total) for total in totals])
        for others in applied[1:]:
            for ours, theirs in zip(applied[0], others, strict=True):
                np.testing.assert_array_equal(ours, theirs)
        return applied[0], asked.sent

    def residuals(self) -> Any:
        """The sum of what all workers have not sent, of the first compressed variable."""
        return sum(np.array(residual_of(exchange)) for exchange in self.exchanges)


def residual_of(exchange: Any) -> Any:
    return next(f for f in exchange._factors.values()).residual.numpy()


def model_of(shape: tuple[int, int] = (12, 9), dtype: str = "float64") -> Any:
    layers = [keras.Input((shape[0],)), L.Dense(shape[1], dtype=dtype)]
    return keras.Sequential(layers)


def drawn(steps: int, shape: tuple[int, ...] = (12, 9), workers: int = WORKERS) -> Any:
    rng = np.random.default_rng(5)
    return rng.normal(size=(steps, workers, *shape)), rng.normal(size=(steps, workers, 9))


def begun(settings: Any, number: int = WORKERS, model: Any = None) -> Workers:
    workers = Workers(settings, model_of() if model is None else model, number)
    for exchange in workers.exchanges:
        exchange._step = 0
    return workers


def orthonormal(vectors: Any, first: Any) -> Any:
    """Gives a basis of what vectors span, when they were turned a little to the first ones."""
    turned = first / np.linalg.norm(first) * np.linalg.norm(vectors) / 1000
    return np.linalg.qr(vectors + turned)[0]


def reference(gradients: Any, firsts: Any, start_after: int) -> list[Any]:
    """PowerSGD of alternating sides, as its authors describe it, of several workers."""
    left, _ = firsts
    residuals = [np.zeros_like(g) for g in gradients[0]]
    right, updates = None, []
    for number, of_workers in enumerate(gradients):
        if number < start_after:
            updates.append(sum(of_workers))
            continue
        matrices = [g + e for g, e in zip(of_workers, residuals, strict=True)]
        if (number - start_after) % 2 == 0:
            basis = orthonormal(left, firsts[0])
            sent = [m.T @ basis for m in matrices]
            residuals = [m - basis @ s.T for m, s in zip(matrices, sent, strict=True)]
            right = sum(sent)
            updates.append(basis @ right.T)
        else:
            basis = orthonormal(right, firsts[1])
            sent = [m @ basis for m in matrices]
            residuals = [m - s @ basis.T for m, s in zip(matrices, sent, strict=True)]
            left = sum(sent)
            updates.append(left @ basis.T)
    return updates


def test_updates_are_those_of_the_authors_method():
    kernels, biases = drawn(7)
    workers = begun(tfdist.PowerSGD(rank=2, start_after=2, min_ratio=1.0))
    (factors,) = workers.exchanges[0]._factors.values()
    firsts = factors.left.numpy(), factors.right.numpy()
    expected = reference(kernels, firsts, start_after=2)
    for kernel, bias, update in zip(kernels, biases, expected, strict=True):
        applied, sent = workers.step([list(pair) for pair in zip(kernel, bias, strict=True)])
        np.testing.assert_allclose(applied[0], update, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(applied[1], bias.sum(0))  # a vector travels as it is
    assert sent[0][0].shape == (9, 2)  # the fifth compressed step is of the left side


@pytest.mark.parametrize("warm_start", [True, False])
def test_what_is_applied_and_what_is_kept_is_what_was_given(warm_start):
    kernels, biases = drawn(6)
    settings = tfdist.PowerSGD(1, start_after=0, min_ratio=0.0, warm_start=warm_start)
    workers = begun(settings)
    before = workers.residuals()
    assert not before.any()
    for kernel, bias in zip(kernels, biases, strict=True):
        applied, _ = workers.step([list(pair) for pair in zip(kernel, bias, strict=True)])
        after = workers.residuals()
        np.testing.assert_allclose(applied[0] + after - before, kernel.sum(0), atol=1e-12)
        assert np.linalg.matrix_rank(applied[0]) == 1
        before = after
    assert np.abs(before).max() > 1


def test_full_rank_is_no_compression():
    kernels, biases = drawn(2)
    workers = begun(tfdist.PowerSGD(9, start_after=0, min_ratio=0.0))
    for kernel, bias in zip(kernels, biases, strict=True):
        applied, _ = workers.step([list(pair) for pair in zip(kernel, bias, strict=True)])
        np.testing.assert_array_equal(applied[0], sum(kernel))


def test_gradients_of_a_rank_that_travels_arrive_whole():
    rng = np.random.default_rng(5)
    columns, biases = rng.normal(size=(4, WORKERS, 12, 2)), drawn(4)[1]
    kernels = columns @ rng.normal(size=(2, 9))
    workers = begun(tfdist.PowerSGD(2, start_after=0, min_ratio=0.0))
    sent, given = 0.0, 0.0
    for number, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
        applied, _ = workers.step([list(pair) for pair in zip(kernel, bias, strict=True)])
        sent, given = sent + applied[0], given + kernel.sum(0)
        if number % 2:  # the first step has begun with vectors drawn at random
            rest = np.linalg.norm(given - sent) / np.linalg.norm(given)
            assert rest < 1e-2  # since vectors are turned a little


def test_rounding_is_not_amplified_where_gradients_have_a_lower_rank():
    rng = np.random.default_rng(5)
    kernel = np.outer(rng.normal(size=12), rng.normal(size=9))  # of rank 1, as a row's is
    settings, bias = tfdist.PowerSGD(2, start_after=0, min_ratio=0.0), np.zeros(9)
    ones = [begun(settings, 1), begun(settings, 1)]
    for _ in range(3):
        noise = 1e-13 * rng.normal(size=(12, 9))
        ours, _ = ones[0].step([[kernel, bias]])
        theirs, _ = ones[1].step([[kernel + noise, bias]])
        np.testing.assert_allclose(ours[0], theirs[0], atol=1e-10)
    kernel = rng.normal(size=(12, 9))
    ours, theirs = (one.step([[kernel, bias]])[0] for one in ones)
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-9)


def test_parts_of_a_gradient_are_applied_as_the_whole_is():
    kernels, biases = drawn(6)
    settings = tfdist.PowerSGD(2, start_after=1, min_ratio=0.0)
    several, one = begun(settings), begun(settings, 1)
    for kernel, bias in zip(kernels, biases, strict=True):
        parts, _ = several.step([list(pair) for pair in zip(kernel, bias, strict=True)])
        whole, _ = one.step([[kernel.sum(0), bias.sum(0)]])
        np.testing.assert_allclose(parts[0], whole[0], atol=1e-11)
        np.testing.assert_allclose(several.residuals(), one.residuals(), atol=1e-11)


def state_of(workers: Workers) -> list[Any]:
    return [np.array(v.numpy()) for e in workers.exchanges for v, _ in e.state]


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_step_that_does_not_count_leaves_everything_as_it_was():
    kernels, biases = drawn(2)
    workers = begun(tfdist.PowerSGD(2, start_after=0, min_ratio=0.0))
    first, second = (
        [list(pair) for pair in zip(k, b, strict=True)]
        for k, b in zip(kernels, biases, strict=True)
    )
    workers.step(first)
    before = state_of(workers)
    workers.step(second, counts=False)
    assert_same(state_of(workers), before)


@pytest.mark.parametrize("place", [0, 1])  # of the kernel; of the bias, which loss scaling sees
def test_gradients_that_are_not_finite_are_not_kept(place):
    kernels, biases = drawn(3)
    workers = begun(tfdist.PowerSGD(2, start_after=0, min_ratio=0.0))
    steps = [
        [list(pair) for pair in zip(k, b, strict=True)]
        for k, b in zip(kernels, biases, strict=True)
    ]
    steps[0][1][place] = np.full_like(steps[0][1][place], np.nan)
    before = state_of(workers)
    applied, _ = workers.step(steps[0])
    assert not np.isfinite(applied[place]).all()
    for value, earlier in zip(state_of(workers), before, strict=True):
        if value.shape:  # all but the number of steps
            np.testing.assert_array_equal(value, earlier)
    applied, _ = workers.step(steps[1])  # of the other side, which has vectors too
    assert np.isfinite(applied[0]).all()
    assert applied[0].any()


def test_residuals_are_in_units_of_the_loss():
    kernels, biases = drawn(4)
    settings = tfdist.PowerSGD(1, start_after=0, min_ratio=0.0)
    scaled, plain = begun(settings), begun(settings)
    for number, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
        scale = 2.0 ** (8 - 3 * number)  # another one at each step
        given = [list(pair) for pair in zip(kernel, bias, strict=True)]
        ours, _ = scaled.step([[g * scale for g in own] for own in given], scale=scale)
        theirs, _ = plain.step(given)
        np.testing.assert_allclose(ours[0] / scale, theirs[0], atol=1e-12)
        np.testing.assert_allclose(scaled.residuals(), plain.residuals(), atol=1e-12)


def test_half_precision_variables_have_wide_residuals_and_scales():
    workers = begun(tfdist.PowerSGD(1, 0, 0.0), 1, model_of(dtype="float16"))
    small = np.full((12, 9), 2.0**-10, "float16"), np.zeros(9, "float16")
    # 2^-10 / 2^20 is 0 in float16.
    applied, _ = workers.step([list(small)], scale=2.0**20)
    assert applied[0].dtype == np.float16
    rest = residual_of(workers.exchanges[0])
    assert rest.dtype == np.float32
    np.testing.assert_allclose(applied[0] + rest * 2.0**20, small[0], rtol=1e-2)


def test_vectors_are_drawn_alike_with_xla_and_without():
    (factors,) = begun(tfdist.PowerSGD(2, 0, 0.0), 1).exchanges[0]._factors.values()

    def drawn_at(step: Any) -> Any:  # an argument: what is constant is computed without XLA
        return factors._random_vectors(12, step)

    step = tf.constant(5, tf.int64)
    vectors = drawn_at(step)
    np.testing.assert_array_equal(tf.function(drawn_at, jit_compile=True)(step), vectors)
    assert np.abs(vectors - drawn_at(step + 1)).min() > 0


def test_the_fixed_part_is_no_part_of_the_step():
    # TensorFlow folded it into a constant, on each replica at another moment, and rounded the
    # products with it differently: replicas' weights differed in the last bit.
    (factors,) = begun(tfdist.PowerSGD(2, 0, 0.0), 1).exchanges[0]._factors.values()
    traced = tf.function(factors._tilted).get_concrete_function(tf.zeros_like(factors.left))
    kinds = {operation.type for operation in traced.graph.get_operations()}
    assert not {kind for kind in kinds if "Random" in kind or kind == "RealDiv"}
    assert [kind.type for kind in traced.graph.get_operations()].count("Mul") <= 2


def test_rows_of_a_matrix_travel_as_they_are():
    model = model_of()
    exchange = LowRankExchange(tfdist.PowerSGD(1, 0, 0.0), model)
    rows = tf.IndexedSlices(tf.ones([2, 9], tf.float64), tf.constant([3, 1]), [12, 9])
    kernel = model.trainable_variables[0]
    for gradient in (rows, rows.values):  # values alone, where rows are the same every step
        given = Contribution([gradient], [], tf.ones([]), [kernel], [None])
        (totals, _), keep = exchange.reduce(Added(), given, exchange.next_phase())
        keep(tf.constant(True))
        assert totals[0] is gradient
    assert not residual_of(exchange).any()


def test_a_kernel_is_a_matrix_of_its_last_dimension():
    layers = [keras.Input((8, 8, 3)), L.Conv2D(16, 5, use_bias=False), L.Flatten(), L.Dense(2)]
    model = keras.Sequential(layers)
    exchange = LowRankExchange(tfdist.PowerSGD(2, min_ratio=2.0), model)
    shapes = [f.residual.shape for f in exchange._factors.values()]
    assert shapes == [(75, 16)]  # a matrix of 256 x 2 would not shrink


class TiedTable(keras.Model):
    """A table by which words are looked up, and scored too: its gradient is dense."""

    def __init__(self, dtype: str = "float64") -> None:
        super().__init__(dtype=dtype)
        self.words = L.Embedding(50, 16, dtype=dtype)
        self.looked_up = L.Embedding(50, 16, dtype=dtype)

    def call(self, x: Any) -> Any:
        h = keras.ops.mean(self.words(x) + self.looked_up(x), 1)
        return keras.ops.matmul(h, keras.ops.transpose(self.words.embeddings))


def test_only_tables_that_are_updated_by_rows_stay_as_they_are():
    model = TiedTable()
    model.compile("sgd", crossentropy())
    words = np.random.default_rng(0).integers(0, 50, (32, 4))
    tfdist.fit(model, words, words[:, 0], verbose=0, compression=tfdist.PowerSGD(2, 0))
    factors = _keras.attached(model).prepared.exchange._factors
    assert list(factors) == [id(model.words.embeddings)]
    traffic = tfdist.compression.bytes_per_step(model, tfdist.PowerSGD(2), embedding_rows=10)
    rows = 10 * (16 * 8 + 8)
    assert traffic.plain == 50 * 16 * 8 + rows
    assert traffic.compressed == 2 * (50 + 16) / 2 * 8 + rows


def small_model(**options: Any) -> Any:
    keras.utils.set_random_seed(7)
    model = keras.Sequential([keras.Input((20,)), L.Dense(16, "tanh"), L.Dense(3)])
    optimizer = options.pop("optimizer", None) or keras.optimizers.SGD(0.1)
    model.compile(optimizer, crossentropy(), **options)
    return model


ORDERED = {"batch_size": 64, "shuffle": False, "verbose": 0}
FIRST_RANK = tfdist.PowerSGD(rank=1, start_after=1, min_ratio=1.0)


def exchange_of(model: Any) -> Any:
    return _keras.attached(model).prepared.exchange


def test_a_training_begins_anew():
    model = small_model()
    weights = model.get_weights()
    runs = []
    for _ in range(2):
        model.set_weights(weights)
        model.optimizer.iterations.assign(0)
        tfdist.fit(model, *table(300), compression=FIRST_RANK, **ORDERED)
        assert exchange_of(model)._count.numpy() == 5
        assert residual_of(exchange_of(model)).any()
        runs.append(model.get_weights())
    assert_same(*runs)


def test_what_is_kept_outlives_a_change_of_replicas():
    model = small_model()
    tfdist.fit(model, *table(128), compression=FIRST_RANK, **ORDERED)
    kept = exchange_of(model)
    maker = _keras.attached(model).prepared.exchange_maker
    # As an elastic run does when processes have come or gone.
    again = prepare(model, Devices(3), for_training=True, exchange_maker=maker)
    assert again.exchange is kept
    rounded = HalfPrecision("bf16")
    first = prepare(model, Devices(3), for_training=True, exchange_maker=rounded).exchange
    other = prepare(model, Devices(2), for_training=True, exchange_maker=rounded).exchange
    assert first is not other  # it divides by the number of replicas


def test_evaluating_meanwhile_changes_nothing():
    runs = []
    for options in ({}, {"validation_data": table(50), "validation_freq": 1}):
        model = small_model()
        tfdist.fit(model, *table(300), epochs=2, compression=FIRST_RANK, **ORDERED, **options)
        runs.append(model.get_weights())
    assert_same(*runs)


class TwoOptimizers(keras.Model):
    """Each half of the weights has its optimizer; the second sees what the first has done."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = L.Dense(16, "tanh"), L.Dense(3)
        self.others = keras.optimizers.SGD(0.05)

    def call(self, x: Any) -> Any:
        return self.second(self.first(x))

    def train_step(self, data: Any) -> Any:
        x, y = data
        for optimizer, layer in ((self.optimizer, self.first), (self.others, self.second)):
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            grads = tape.gradient(loss, layer.trainable_variables)
            optimizer.apply(grads, layer.trainable_variables)
        return {"loss": loss}


def test_each_optimizer_of_a_step_exchanges_its_own():
    keras.utils.set_random_seed(7)
    model = TwoOptimizers()
    model.compile(keras.optimizers.SGD(0.1), crossentropy())
    model(table(1)[0])
    other = TwoOptimizers()
    other.compile(keras.optimizers.SGD(0.1), crossentropy())
    other(table(1)[0])
    other.set_weights(model.get_weights())
    none_yet = tfdist.PowerSGD(rank=2, start_after=2, min_ratio=0.0)
    tfdist.fit(model, *table(128), compression=none_yet, **ORDERED)
    other.fit(*table(128), **ORDERED)
    for ours, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    tfdist.fit(model, *table(192), compression=none_yet, **ORDERED)
    residuals = [f.residual.numpy() for f in exchange_of(model)._factors.values()]
    assert len(residuals) == 2
    assert all(residual.any() for residual in residuals)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_rounds_dense_gradients_alone(precision):
    wire = {"fp16": tf.float16, "bf16": tf.bfloat16}[precision]
    exchange = HalfExchange(wire, 4.0)
    dense = np.array([1 / 3, 1e-7, 300.0], "float32")
    rows = tf.IndexedSlices(tf.ones([2, 9]) / 3, tf.constant([3, 1]), [12, 9])
    exact = tf.constant([1 / 3])
    given = Contribution(
        [tf.constant(dense), rows], [exact], tf.ones([]), [None] * 2, [None] * 2
    )
    added = Added()
    sent: list[Any] = []

    def reduce_step(gradients: Any, others: Any, *_: Any) -> Any:
        sent[:] = gradients
        return list(gradients), list(others)

    added.reduce_step = reduce_step  # type: ignore[method-assign]
    (totals, others), _ = exchange.reduce(added, given, None)
    assert sent[0].dtype == wire
    assert sent[1] is rows
    assert others[0] is exact
    assert totals[0].dtype == tf.float32
    np.testing.assert_allclose(totals[0], dense, rtol=2**-8, atol=2**-24)
    assert (totals[0].numpy() != dense).any()


def test_gradients_are_divided_before_they_are_rounded():
    given = Contribution([tf.constant([30000.0])], [], tf.ones([]), [None], [None])
    for factor, expected in ((4.0, np.inf), (1.0, 30000.0)):
        (totals, _), _ = HalfExchange(tf.float16, factor).reduce(Added(), given, None)
        np.testing.assert_allclose(totals[0], [expected], rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": 1.5},
        {"rank": True},
        {"start_after": -1},
        {"min_ratio": -1},
        {"min_ratio": "2"},
        {"min_ratio": True},
        {"min_ratio": float("nan")},
        {"warm_start": 1},
    ],
)
def test_settings_that_make_no_sense_are_refused(options):
    (name,) = options
    with pytest.raises(ArgumentError, match=f"`{name}` of `PowerSGD`"):
        tfdist.PowerSGD(**options)


@pytest.mark.parametrize("compression", ["int8", "", 8, tf.float16, tfdist.PowerSGD])
def test_what_is_no_compression_is_refused(compression):
    with pytest.raises(ArgumentError, match="`compression` must be None"):
        CompressedTraining(compression)
    with pytest.raises(ArgumentError, match="`compression` must be None"):
        tfdist.fit(small_model(), *table(8), compression=compression, verbose=0)


def test_private_training_is_refused():
    private = tfdist.DPSGD(noise_multiplier=1.0, l2_norm_clip=1.0, delta=1e-3)
    for compression in ("bf16", tfdist.PowerSGD()):
        with pytest.raises(ArgumentError, match="Private training must exchange sums as"):
            tfdist.fit(
                small_model(), *table(64), privacy=private, compression=compression, verbose=0
            )


def test_momentum_with_vectors_that_are_drawn_anew_is_warned_of():
    compression = tfdist.PowerSGD(warm_start=False)
    for momentum, number in ((0.9, 1), (0.0, 0)):
        model = small_model()
        model.compile(keras.optimizers.SGD(0.1, momentum=momentum), crossentropy())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tfdist.fit(model, *table(64), compression=compression, steps_per_epoch=1, verbose=0)
        assert len([w for w in caught if "hardly trains" in str(w.message)]) == number


def test_bytes_are_those_of_the_vectors():
    layers = [keras.Input((1000,)), L.Dense(500), L.Dense(2, use_bias=False)]
    model = keras.Sequential(layers)
    plain = 4 * (1000 * 500 + 500 + 500 * 2)
    bytes_of = tfdist.compression.bytes_per_step
    assert bytes_of(model, None) == tfdist.compression.Traffic(plain, plain)
    assert bytes_of(model, "bf16").compressed == plain / 2
    found = bytes_of(model, tfdist.PowerSGD(rank=3))
    assert found.compressed == 4 * (3 * (1000 + 500) / 2 + 500 + 500 * 2)
    assert found.ratio == pytest.approx(plain / found.compressed)
    with pytest.raises(ArgumentError):
        bytes_of(model, "int8")
    with pytest.raises(ArgumentError, match="`model` must be built"):
        bytes_of(keras.Sequential([L.Dense(2)]), "bf16")


class StoppedError(Exception):
    pass


class StopAfter(keras.callbacks.Callback):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.left -= 1
        if not self.left:
            raise StoppedError


@pytest.mark.parametrize("stopped_after", [3, 4])  # of either side
def test_a_training_that_goes_on_ends_with_the_same_bits(stopped_after, tmp_path):
    expected = small_model()
    options = {**ORDERED, "epochs": 2, "compression": FIRST_RANK}
    tfdist.fit(expected, *table(300), **options)
    for stop in ([StopAfter(stopped_after)], []):
        model = small_model()
        checkpoint = tfdist.Checkpoint(tmp_path, every=1)
        with pytest.raises(StoppedError) if stop else contextlib.nullcontext():
            tfdist.fit(model, *table(300), checkpoint=checkpoint, callbacks=stop, **options)
    assert_same(model.get_weights(), expected.get_weights())
    ours, theirs = (exchange_of(one).state for one in (model, expected))
    assert_same([v.numpy() for v, _ in ours], [v.numpy() for v, _ in theirs])


def test_a_disk_must_have_room_for_what_replicas_keep(tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr(files, "check_room", lambda directory, size: needed.append(size))
    tfdist.fit(
        small_model(), *table(64), compression=FIRST_RANK, checkpoint=tmp_path, **ORDERED
    )
    (written,) = tmp_path.glob("*/tensors.data*")
    assert needed == [pytest.approx(written.stat().st_size, rel=0.02)]
    kept = keras.Variable(np.zeros((5, 3)), dtype="float32", trainable=False)
    state = TrainState((kept,), ((kept, Role.PER_REPLICA),))
    assert tensors.size_of(state, 3) == 60 + 3 * 60


def test_another_compression_is_another_training(tmp_path):
    options = {**ORDERED, "checkpoint": tmp_path}
    tfdist.fit(small_model(), *table(100), compression=FIRST_RANK, **options)
    with pytest.raises(ArgumentError, match=r"Received: compression='PowerSGD\(rank=2"):
        tfdist.fit(small_model(), *table(100), compression=tfdist.PowerSGD(), **options)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("per_replica/0", lambda kept: None, r"2 tensors per_replica/\*. Received: 1 in here"),
        ("per_replica/7", lambda kept: np.zeros(2), "2 tensors per_replica"),
        ("per_replica/1", lambda kept: kept[:, 1:], r"shape \(5, 3\) and float32 for each"),
        ("per_replica/1", lambda kept: kept[0], "for each replica"),
        ("per_replica/1", lambda kept: kept[:0], "for each replica"),
        ("per_replica/1", lambda kept: kept.astype("float64"), "and float64 in here"),
        ("per_replica/1", lambda kept: kept * np.nan, "finite numbers in per_replica/1"),
        ("variables/0", lambda kept: None, "1 tensors variables"),
        ("variables/0", lambda kept: kept[1:], r"variables/0 of shape \(5, 3\) and float32"),
        ("sharded/0", lambda kept: kept[1:], r"sharded/0 of shape \(7, 3\) and float32"),
        ("keras/global_seed_generator", lambda kept: None, "a tensor keras/global_seed"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name, change, message):
    kept = [keras.Variable(np.ones((5, 3)), dtype="float32") for _ in range(4)]
    own = [(v, Role.PER_REPLICA) for v in kept[2:]]
    state = TrainState((kept[0],), ((kept[1], Sharded(7)), *own))
    ones = np.ones((2, 5, 3), "float32")
    values = {"variables/0": ones[0], "per_replica/0": ones, "per_replica/1": ones}
    values["sharded/0"] = np.ones((7, 3), "float32")
    values["keras/global_seed_generator"] = np.zeros(2, "int32")

    def checked() -> None:
        with tempfile.TemporaryDirectory() as folder:
            pieces = [Piece(key, tf.constant(value)) for key, value in values.items()]
            merge(Path(folder), [write_shard(Path(folder), 0, pieces)])
            about = {"global_seed": True, "folder": "here"}
            tensors.check(state, TensorReader(Path(folder)), about)

    checked()
    changed = change(values.pop(name, None))
    if changed is not None:
        values[name] = changed
    with pytest.raises(CheckpointError, match=message):
        checked()


def test_what_replicas_keep_is_checked_before_a_training_goes_on(tmp_path):
    options = {**ORDERED, "checkpoint": tmp_path, "compression": FIRST_RANK}
    tfdist.fit(small_model(), *table(128), **options)
    (folder,) = tmp_path.iterdir()
    saved = files.latest(tmp_path)
    assert saved is not None
    read = saved.tensors.whole
    values = {name: tf.constant(read(name)) for name in saved.tensors.specs}
    values["per_replica/0"] *= np.nan
    epoch, step, _ = saved.state["position"]
    pieces = [Piece(name, value) for name, value in values.items()]
    files.write(tmp_path, epoch, step, pieces, saved.state, keep=1)
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(CheckpointError, match=r"finite numbers in per_replica/0\. Received"):
        tfdist.fit(small_model(), *table(128), epochs=2, **options)
