"""Norms are never below those of what is added, whatever cancels, overflows or is rounded."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tfdist._keras import ReplicaBatch
from tfdist.errors import ArgumentError
from tfdist.privacy.mechanism import gram_matrices, parts, rounding
from tfdist.privacy.mechanism.adaptive import AdaptiveClip
from tfdist.privacy.mechanism.clipping_groups import (
    Alone,
    ClippingGroups,
    CopiesOfExamples,
    Groups,
)
from tfdist.privacy.mechanism.closed_forms import FORMS as OF_LAYERS
from tfdist.privacy.mechanism.closed_forms import RecordedCall
from tfdist.privacy.mechanism.mechanism import Mechanism
from tfdist.privacy.mechanism.parts import GradientPart, Lookup, Product, Written
from tfdist.privacy.mechanism.row_sums import summed
from tfdist.privacy.settings import DPSGD, LARGEST_NORM, LEAST_NORM

UNITS = 3
ALONE = Alone()
SLACK = 1e-5


class Case:
    """Factors of `UNITS` examples whose positions nearly cancel, and settings for them."""

    def __init__(self, seed: int, positions: int, p: int, q: int, spread: int) -> None:
        random = np.random.default_rng(seed)
        self.positions, self.p, self.q = positions, p, q

        def factor(size: int, alternates: bool) -> Any:
            """One vector at all positions, of alternating sign, and little of another."""
            same = random.normal(size=(UNITS, 1, size)) + random.choice([0, 10])
            sign = np.where(np.arange(positions) % 2, -1.0, 1.0) if alternates else 1.0
            own = random.normal(size=(UNITS, positions, size))
            part = 10.0 ** -random.integers(0, 8, size=(UNITS, 1, 1))
            scale = 10.0 ** random.integers(-spread, spread + 1, size=(UNITS, 1, 1))
            made = (same * np.reshape(sign, [1, -1, 1]) + own * part) * scale
            return made.astype("float32")

        self.inputs, self.outputs = factor(p, False), factor(q, True)
        # Rows that come again and again, as words do.
        self.rows = random.integers(0, 3, size=(UNITS, positions))


def cases(spread: int) -> st.SearchStrategy[Case]:
    number = st.integers(1, 40)
    return st.builds(
        Case,
        st.integers(0, 2**32 - 1),
        st.sampled_from([1, 2, 3, 8, 33]),
        number,
        number,
        st.just(spread),
    )


def product(case: Case) -> tuple[GradientPart, Any]:
    variable = keras.Variable(np.zeros((case.p, case.q), "float32"))
    exact = np.einsum(
        "btp,btq->bpq", case.inputs.astype("float64"), case.outputs.astype("float64")
    )
    return Product(variable, tf.constant(case.inputs), tf.constant(case.outputs)), exact


def lookup(case: Case) -> tuple[GradientPart, Any]:
    variable = keras.Variable(np.zeros((3, case.q), "float32"))
    same = np.eye(3)[case.rows]
    exact = np.einsum("btr,btq->brq", same, case.outputs.astype("float64"))
    return Lookup(variable, tf.constant(case.rows), tf.constant(case.outputs)), exact


def written(case: Case) -> tuple[GradientPart, Any]:
    variable = keras.Variable(np.zeros((case.positions, case.q), "float32"))
    return Written(variable, tf.constant(case.outputs)), case.outputs.astype("float64")


FORMS: dict[str, Callable[[Case], tuple[GradientPart, Any]]] = {
    "product": product,
    "lookup": lookup,
    "written": written,
}


def norm(part: GradientPart, together: ClippingGroups) -> Any:
    return np.sqrt(part.squared_norms(together).numpy().astype("float64"))


def weighted_sum(part: GradientPart, weights: Any, together: ClippingGroups = ALONE) -> Any:
    (result,) = summed([part.weighted_sum(tf.constant(weights), together)], tf.constant(True))
    return result


def added(
    part: GradientPart, unit: int, units: int, factor: float, together: ClippingGroups
) -> float:
    """Gives the norm of what one unit adds."""
    weights = np.zeros(units, "float32")
    weights[unit] = factor
    total = weighted_sum(part, weights, together)
    return float(np.linalg.norm(total.numpy().astype("float64")))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gram", [True, False])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases(4))
def test_no_example_adds_more_than_its_norm(form: str, gram: bool, case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "_gram_is_smaller", lambda *_: gram)
        part, exact = FORMS[form](case)
        norms = norm(part, Alone())
        true = np.sqrt((exact**2).sum(axis=(1, 2)))
        magnitudes = np.linalg.norm(case.outputs, axis=2)
        if form == "product":
            magnitudes = magnitudes * np.linalg.norm(case.inputs, axis=2)
        rounded = magnitudes.sum(1) * case.positions * 2.0**-23
        # What is written out is rounded as it is added: there the norm is of that.
        missing = 0 if gram or form == "lookup" else rounded
        assert np.all(norms >= true * (1 - SLACK) - missing)
        for unit in range(UNITS):
            clip = norms[unit] / 3
            assert added(part, unit, UNITS, 1 / 3, Alone()) <= clip * (1 + SLACK)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases(0))
def test_norms_are_hardly_larger_where_nothing_cancels(form: str, case: Case) -> None:
    case.inputs, case.outputs = np.abs(case.inputs), np.abs(case.outputs)
    part, exact = FORMS[form](case)
    true = np.sqrt((exact**2).sum(axis=(1, 2)))
    np.testing.assert_allclose(norm(part, Alone()), true, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["copies", "groups"])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(case=cases(2))
def test_no_unit_of_examples_that_cancel_adds_more(form: str, kind: str, case: Case) -> None:
    # The second example takes the first one back but for rounding.
    for factor, sign in ((case.inputs, 1.0), (case.outputs, -1.0)):
        factor[1] = sign * factor[0] * np.float32(1 + 2e-7)
    case.rows[1] = case.rows[0]
    together: ClippingGroups = Groups(tf.constant([4, 4, 9]), 2)
    if kind == "copies":
        case.inputs, case.outputs, case.rows = (
            a[:2] for a in (case.inputs, case.outputs, case.rows)
        )
        together = CopiesOfExamples(2)
    part, _ = FORMS[form](case)
    norms = norm(part, together)
    for unit in range(len(norms)):
        clip = norms[unit] / 3
        assert added(part, unit, len(norms), 1 / 3, together) <= clip * (1 + SLACK)


@pytest.mark.parametrize("unit", [2.0**-11, 2.0**-8])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(case=cases(2))
def test_devices_that_round_factors(unit: float, case: Case) -> None:
    # As TensorFloat-32 and bfloat16 have it, to the nearest of so many bits.
    real, bits = tf.matmul, -int(math.log2(unit))

    def rounded(values: Any) -> Any:
        mantissa, exponent = np.frexp(np.asarray(values))
        return tf.constant(
            np.ldexp(np.round(mantissa * 2**bits) / 2**bits, exponent), tf.float32
        )

    with pytest.MonkeyPatch.context() as patch:
        for module in (gram_matrices, parts, rounding):
            patch.setattr(module, "factor_unit", lambda: unit)
        patch.setattr(parts, "_gram_is_smaller", lambda *_: True)
        patch.setattr(tf, "matmul", lambda a, b, **k: real(rounded(a), rounded(b), **k))
        for form in (product, lookup):
            part, _ = form(case)
            norms = norm(part, Alone())
            for number in range(UNITS):
                clip = norms[number] / 3
                assert added(part, number, UNITS, 1 / 3, Alone()) <= clip * (1 + SLACK)


@pytest.mark.quick
@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("positions", [1, 2])
def test_small_factors_of_large_ones_are_no_zeros(gram: bool, positions: int) -> None:
    # The squares of the inputs underflow.
    inputs = np.full((1, positions, 4), 1e-24, "float32")
    outputs = np.full((1, positions, 4), 1e10, "float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "_gram_is_smaller", lambda *_: gram)
        part = Product(keras.Variable(np.zeros((4, 4), "float32")), inputs, outputs)
        assert norm(part, Alone())[0] >= 1e-14 * 4 * positions


@pytest.mark.quick
def test_what_overflows_is_not_finite() -> None:
    large = np.full((1, 2, 4), 1e20, "float32")
    part = Product(keras.Variable(np.zeros((4, 4), "float32")), large, large)
    assert not np.isfinite(part.squared_norms().numpy()[0])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 9000), st.integers(0, 2**32 - 1))
def test_sums_of_squares_are_rounded_up_and_little(count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    values = np.abs(random.normal(size=(2, count))).astype("float32") + 0.1
    exact = (values.astype("float64") ** 2).sum(1)
    found = rounding.sums_of_squares(tf.constant(values)).numpy().astype("float64")
    assert np.all(found >= exact)
    assert np.all(found <= exact * (1 + 1.3e-7 * (count + 100)))


@pytest.mark.quick
@pytest.mark.parametrize("norm_asked", [0.0, 1e-25, 1e20, math.nan])
def test_norms_to_clip_to_are_within_what_float32_squares(norm_asked: float) -> None:
    with pytest.raises(ArgumentError, match="`l2_norm_clip` must be a number between"):
        DPSGD(norm_asked, noise_multiplier=1.0, delta=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize(("votes", "last"), [(1e4, LEAST_NORM), (-1e4, LARGEST_NORM)])
def test_an_adaptive_norm_stays_within(votes: float, last: float) -> None:
    mechanism = Mechanism(1.0, 1.0, 10.0, target_quantile=0.5, expected_units=10.0)
    adaptive = AdaptiveClip(keras.Sequential([keras.layers.Dense(1)]), mechanism, 1)
    batch = ReplicaBatch(*(tf.constant(n, tf.int64) for n in (1, 1, 0)), list, tf.identity)
    batch.updates = SimpleNamespace(apply=lambda _, votes, update, __: update(votes))
    for _ in range(3):
        adaptive.update(batch, tf.constant(votes))
    np.testing.assert_allclose(adaptive.norm(), last, rtol=1e-4)
    adaptive.update(batch, tf.constant(-votes / 100))  # and comes back at once
    assert abs(math.log(adaptive.norm() / last)) > 1


L = keras.layers


def low_rank(layer: Any, shape: Any) -> Any:
    layer.build((None, *shape))
    layer.enable_lora(2)
    for variable in layer.trainable_variables:
        variable.assign(np.ones(variable.shape) / 3)
    return layer


# Layers, the shape of an example's inputs, and whether these are words.
LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...], bool]] = {
    "dense": (lambda: L.Dense(12), (4, 12), False),
    "einsum": (
        lambda: L.EinsumDense("abc,cde->abde", (4, 3, 6), bias_axes="de"),
        (4, 9),
        False,
    ),
    "conv1d": (lambda: L.Conv1D(16, 4, padding="same"), (4, 9), False),
    "conv2d": (lambda: L.Conv2D(3, 2), (5, 4, 2), False),
    "conv_groups": (lambda: L.Conv1D(4, 2, groups=2), (6, 4), False),
    "depthwise": (lambda: L.DepthwiseConv1D(2), (6, 3), False),
    "embedding": (lambda: L.Embedding(3, 7), (6,), True),
    "layer_norm": (L.LayerNormalization, (6, 5), False),
    "group_norm": (lambda: L.GroupNormalization(2), (6, 4), False),
    "rms_norm": (L.RMSNormalization, (6, 5), False),
    "lora_dense": (lambda: low_rank(L.Dense(12), (3, 12)), (3, 12), False),
    "lora_embedding": (lambda: low_rank(L.Embedding(3, 7), (6,)), (6,), True),
    "gru": (lambda: L.GRU(12, return_sequences=True), (3, 12), False),
}


def exact_norms(layer: Any, x: Any, by_outputs: Any) -> Any:
    """Takes the gradients of single examples, in float64."""
    config = layer.get_config() | {"dtype": "float64"}
    precise = type(layer).from_config(config)
    precise.build(x.shape)
    precise.set_weights(layer.get_weights())
    found = []
    for i in range(len(x)):
        with tf.GradientTape() as tape:
            inputs = x[i : i + 1] if x.dtype.kind == "i" else x[i : i + 1].astype("float64")
            outputs = precise(inputs)
        by_weights = tape.gradient(
            outputs,
            precise.trainable_variables,
            tf.constant(by_outputs[i : i + 1].astype("float64")),
        )
        squares = [np.sum(tf.convert_to_tensor(g).numpy() ** 2) for g in by_weights]
        found.append(math.sqrt(sum(squares)))
    return np.array(found)


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), part=st.integers(0, 7))
def test_no_layer_adds_more_than_its_norm(name: str, seed: int, part: int) -> None:
    random = np.random.default_rng(seed)
    make, shape, is_words = LAYERS[name]
    layer = make()
    if not layer.built:
        layer.build((None, *shape))
    same = random.normal(size=(2, *[1] * (len(shape) - 1), shape[-1])) + 10
    x = (same + random.normal(size=(2, *shape)) * 10.0**-part).astype("float32")
    if is_words:
        x = np.repeat(random.integers(0, 3, size=(2, 3)), 2, 1).astype("int32")
    outputs = layer(x)
    made = random.normal(size=(2, 1, outputs.shape[-1])) * 10.0 ** random.integers(-4, 5)
    count = math.prod(outputs.shape[1:-1])
    made = made * np.where(np.arange(count) % 2, -1, 1)[:, None]
    made += random.normal(size=(2, count, outputs.shape[-1])) * 10.0**-part * np.abs(made)
    gradients = made.reshape(outputs.shape).astype("float32")
    call = RecordedCall((tf.constant(x),), {}, outputs, gradients=tf.constant(gradients))
    found = OF_LAYERS[type(layer)](layer, [call])
    assert found
    norms = np.sqrt(sum(norm(each, Alone()) ** 2 for each in found))
    for unit in range(2):
        factor = 1 / (3 * norms[unit])
        whole = [added(each, unit, 2, factor, Alone()) for each in found]
        assert math.sqrt(sum(n**2 for n in whole)) <= (1 + SLACK) / 3
    if "norm" not in name:  # what these normalize is itself rounded
        least = np.linalg.norm(gradients.reshape(2, -1), axis=1) * 2.0**-20
        least *= 1 if is_words else np.linalg.norm(x.reshape(2, -1), axis=1)
        assert np.all(norms >= exact_norms(layer, x, gradients) * (1 - SLACK) - least)


@pytest.mark.quick
def test_cancelling_positions_do_not_round_what_others_add_up_to() -> None:
    """A table's rows: each example's +B and -B cancel, and its 1 counts."""
    examples, large = 300, 2e5
    outputs = np.tile(np.float32([[[large], [1.001], [-large]]]), (examples, 1, 1))
    rows = np.zeros((examples, 3), np.int32)
    table = keras.Variable(np.zeros((1, 1), "float32"))
    part = Lookup(table, tf.constant(rows), tf.constant(outputs))
    received = weighted_sum(part, np.ones(examples, np.float32))
    assert float(received[0, 0]) == pytest.approx(examples * np.float32(1.001), rel=1e-6)


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("apart", [1e-5, 1e-3])
def test_sums_of_positions_that_cancel_are_hardly_rounded(alike: bool, apart: float) -> None:
    """The largest terms that norms allow, in every example of a batch."""
    random, examples, p, q = np.random.default_rng(0), 1024, 3, 3
    shapes = [(1 if alike else examples, 1, size) for size in (p, q)]
    inputs, outputs = (
        np.broadcast_to(random.normal(size=shape), (examples, 2, shape[2])) for shape in shapes
    )
    outputs = outputs * np.array([1, -1])[:, None]
    outputs[:, 0] += apart * random.normal(size=(examples, q))
    given = inputs.astype("float32"), outputs.astype("float32")
    part = Product(SimpleNamespace(shape=(p, q)), *map(tf.constant, given))
    weights = (1 / norm(part, Alone())).astype("float32")  # all are clipped, to a norm of 1
    terms = np.prod([np.linalg.norm(factor, axis=2) for factor in given], axis=0).sum(1)
    assert np.all(weights * terms < 4096 / math.sqrt(p + q + 4))
    received = weighted_sum(part, weights)
    exact = np.einsum("b,btp,btq->pq", *(part.astype("float64") for part in (weights, *given)))
    assert np.linalg.norm(received.numpy().astype("float64") - exact) < 1e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("examples", [1024, 20_000])
def test_sums_of_equal_gradients_are_hardly_rounded(
    form: str, gram: bool, examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding errors of one sum of n equal numbers add up to a part of n^2."""
    monkeypatch.setattr(parts, "_gram_is_smaller", lambda *_: gram)
    case = Case(0, 2, 3, 3, 0)
    case.inputs, case.outputs = np.abs(case.inputs), np.abs(case.outputs)
    for name in ("inputs", "outputs", "rows"):
        value = getattr(case, name)[:1]
        setattr(case, name, np.broadcast_to(value, (examples, *value.shape[1:])))
    part, each = FORMS[form](case)
    weights = (1 / norm(part, Alone())).astype("float32")
    received = weighted_sum(part, weights)
    exact = np.tensordot(weights.astype("float64"), each, 1)
    error = np.linalg.norm(received.numpy().astype("float64") - exact)
    assert error < 1e-3 + examples * 2.0**-24  # the result itself is in float32
