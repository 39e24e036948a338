"""What floats would tell: the grid of noisy sums, the noise's tail, composition by FFT."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import integrate, optimize, special, stats

import tfdist
from tfdist.errors import ArgumentError
from tfdist.privacy import Ledger, Phase
from tfdist.privacy.accounting.accountants import gaussian_epsilon
from tfdist.privacy.accounting.pld import LossDistributions, Losses
from tfdist.privacy.mechanism import normals
from tfdist.privacy.mechanism.grid import Rounding
from tfdist.privacy.mechanism.normals import from_words, standard_normal

pytestmark = pytest.mark.quick
NORMAL = stats.norm


# --- noise and its grid -----------------------------------------------------------------


def released(target: float, steps: int = 150) -> Any:
    """A bias's moves from 0, of 64 rows of which the first has a gradient of norm 1 or 0."""
    model = keras.Sequential(
        [keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")]
    )
    model.compile(keras.optimizers.SGD(1.0), "mse")
    x, y = np.zeros((64, 1), "float32"), np.zeros((64, 1), "float32")
    y[0] = target
    bias, moves = model.layers[-1].bias, []
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: bias.assign([0.0]),
        on_train_batch_end=lambda batch, logs: moves.append(float(-bias.numpy()[0]) * 64),
    )
    privacy = tfdist.DPSGD(1.0, noise_multiplier=4.0, delta=1e-5, relation="replace_special")
    options = {"batch_size": 64, "steps_per_epoch": steps, "verbose": 0}
    tfdist.fit(model, x, y, callbacks=[callback], privacy=privacy, **options)
    return np.array(moves)


def test_what_leaves_a_step_is_on_a_grid_whatever_the_data() -> None:
    # In float32, 18 % of what came without the example was impossible with it.
    for target, mean in ((-100.0, 1.0), (0.0, 0.0)):
        moves = released(target)
        np.testing.assert_array_equal(moves * 2**6 / 4, np.round(moves * 2**6 / 4))
        assert len(set(moves)) > 60
        assert stats.kstest((moves - mean) / 4, "norm").pvalue > 1e-4


def test_the_noise_has_a_tail() -> None:
    def largest(low: int) -> float:
        return math.hypot(*from_words(tf.constant([[0], [low], [0]], tf.uint32)).numpy())

    assert largest(0) == pytest.approx(math.sqrt(130 * math.log(2)), rel=1e-12)
    assert 2 * NORMAL.sf(largest(0)) < 2.0**-64
    assert largest(0) > largest(1) > largest(2) > 9.1  # no gap of a float32


def test_cells_of_the_grid_have_the_probability_of_a_normal_number() -> None:
    # A cell of probability p is off by 5 % of p with a power of 0.99 for p above 0.01.
    key, counter = tf.constant([9], tf.uint64), tf.constant([0, 1], tf.uint64)
    numbers = standard_normal(1_000_000, key, counter).numpy()
    assert numbers.dtype == np.float64
    cells = np.round(numbers * 2**6)
    edges = np.arange(-192, 193)
    expected = 1e6 * np.diff(NORMAL.cdf((np.arange(-192, 194) - 0.5) / 2**6))
    counts = np.array([np.count_nonzero(cells == edge) for edge in edges])
    chi = ((counts - expected) ** 2 / expected).sum()
    assert stats.chi2.sf(chi, len(edges)) > 1e-4
    # Neither are two of one radius, times cosine and times sine, related.
    products = numbers[::2] * numbers[1::2]
    assert abs(products.mean()) < 5 / math.sqrt(500_000)


def test_compiled_numbers_are_those_of_philox_and_of_box_and_muller() -> None:
    key = tf.constant([0x9E3779B97F4A7C15], tf.uint64)
    counter = [2**32 - 7000, 0xFEDCBA9876543210]  # its second word changes on the way
    words = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[15_000, 4],
        key=key,
        counter=tf.constant(counter, tf.uint64),
        alg=1,
        dtype="uint32",
    )
    high, low, turn, _ = words.numpy().astype(float).T
    radius = np.sqrt(-2 * np.log(high / 2**32 + (low + 0.5) / 2**64))
    turn = 2 * np.pi * (turn + 0.5) / 2**32 - np.pi / 4
    expected = np.stack([radius * np.cos(turn), radius * np.sin(turn)], 1).ravel()
    for count in (1, 101, 16_383, 16_384, 30_000):  # the last two are compiled
        numbers = standard_normal(count, key, tf.constant(counter, tf.uint64)).numpy()
        np.testing.assert_allclose(numbers, expected[:count], rtol=0, atol=1e-14)


def test_logarithm_and_directions_are_right_to_the_last_places() -> None:
    uniform = np.concatenate(
        [2.0 ** -np.arange(66), 1 - 2.0 ** -np.arange(1, 54), [0.5**0.5, 0.70710678, 0.7072]]
    )
    compiled = tf.function(normals._log, jit_compile=True)(tf.constant(uniform)).numpy()
    np.testing.assert_allclose(compiled, np.log(uniform), rtol=1e-15, atol=0)
    turns = np.arange(16, dtype=np.uint64)[:, None] * 2**28 + np.array([0, 1, 2**27, 2**28 - 1])
    words = tf.constant(turns.astype(np.uint64).ravel())
    found = tf.function(normals._cosine_and_sine, jit_compile=True)(words)
    angles = 2 * np.pi * (turns.ravel().astype(float) + 0.5) / 2**32 - np.pi / 4
    np.testing.assert_allclose(found, [np.cos(angles), np.sin(angles)], rtol=0, atol=2e-15)


@pytest.mark.parametrize("size", [300, 20_000])  # the second is compiled
def test_a_sum_with_noise_is_rounded_to_the_nearest_of_the_grid(size: int) -> None:
    rng = np.random.default_rng(size)
    rounding = Rounding(1.5, bound=2 * 256 + 64, replicas=1)
    value, drawn = rng.normal(size=size).astype("float32"), rng.normal(size=size + 9)
    value[:2] = 1e9, -1e9
    counts = rounding.counts(value, tf.constant(drawn), 0.7).numpy()
    noisy = (value / 0.7 + 1.5 * drawn[:size]) * 2**6 / 1.5
    np.testing.assert_array_equal(counts, np.clip(np.round(noisy), -(2**24), 2**24))


@pytest.mark.parametrize("replicas", [1, 3, 64, 1000])
def test_replicas_numbers_add_up_without_rounding(replicas: int) -> None:
    rounding = Rounding(1.5, bound=2 * 256 + 64, replicas=replicas)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(replicas, 2000)).astype("float32")
    values[:, 0] = 1e9  # more than there can be
    drawn = rng.normal(size=values.shape)
    counts = [rounding.counts(v, d, 0.7).numpy() for v, d in zip(values, drawn, strict=True)]
    exact = np.sum(np.array(counts, np.int64), axis=0)
    total = np.zeros(2000, np.float32)
    for count in counts:
        np.testing.assert_array_equal(count, np.round(count))
        total += count
    np.testing.assert_array_equal(total, exact)
    assert total[0] <= 2**24
    noisy = total[1:] * 0.7 * rounding.step - values.sum(0)[1:]
    wanted = 0.7 * math.hypot(1.5, rounding.deviation)
    assert noisy.std() == pytest.approx(wanted, rel=6 / math.sqrt(2 * len(noisy)))
    assert rounding.deviation < 0.12 * 1.5


def test_the_sum_of_rounded_parts_tells_no_more_than_the_whole() -> None:
    # Computed: the distribution of the sum is the same however the whole is dealt out.
    for replicas in (2, 4):
        steps = 4 * math.sqrt(replicas)  # the coarsest grid that is used
        deviation = steps / math.sqrt(replicas)
        places = np.arange(-150, 151)

        def rounded(shift: float, deviation: float = deviation, places: Any = places) -> Any:
            return np.diff(NORMAL.cdf((np.append(places, 151) - 0.5 - shift) / deviation))

        sums = []
        for parts in ([3.3] + [0.0] * (replicas - 1), [3.3 / replicas] * replicas):
            sums.append(np.ones(1))
            for part in parts:
                sums[-1] = np.convolve(sums[-1], rounded(part))
        np.testing.assert_allclose(sums[0], sums[1], atol=1e-14)


def test_too_little_noise_for_exact_sums_is_refused() -> None:
    assert Rounding(1e-6, bound=600, replicas=1).step > 0
    with pytest.raises(ArgumentError, match="large enough for sums over replicas"):
        Rounding(1e-6, bound=600, replicas=2)


def test_the_sum_is_divided_by_batch_size_even_if_there_are_fewer_examples() -> None:
    weights = []
    for rows in (20, 40):
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(1.0), "mse")
        model.set_weights([np.zeros((1, 1)), np.zeros(1)])
        x, y = np.zeros((rows, 1), "float32"), np.full((rows, 1), -9, "float32")
        privacy = tfdist.DPSGD(0.5, noise_multiplier=0.0, delta=1e-5)
        tfdist.fit(model, x, y, batch_size=80, verbose=0, privacy=privacy)
        weights.append(float(model.layers[0].bias.numpy()[0]))
    assert weights == pytest.approx([-20 * 0.5 / 80, -40 * 0.5 / 80], rel=1e-5)


# --- accounting -------------------------------------------------------------------------


def exact_gaussian(mean: float, delta: float) -> float:
    """Balle and Wang, 2018, theorem 8, with enough digits."""

    def log_delta(epsilon: float) -> float:
        one = special.log_ndtr(mean / 2 - epsilon / mean)
        other = epsilon + special.log_ndtr(-mean / 2 - epsilon / mean)
        return float(one + np.log1p(-np.exp(other - one)) - math.log(delta))

    return float(optimize.brentq(log_delta, 0, 100, xtol=1e-13))


@pytest.mark.parametrize("delta", [1e-2, 1e-6, 1e-10, 1e-14, 1e-20])
@pytest.mark.parametrize(("mean", "steps"), [(0.1, 100), (1.0, 10**4), (3.0, 10**6)])
def test_composition_is_above_the_truth_and_near(mean: float, steps: int, delta: float) -> None:
    # dp-accounting's own composition gave 7.647 for 7.869.
    from dp_accounting.pld import privacy_loss_distribution as plds

    exact = exact_gaussian(mean, delta)
    interval = 1e-4 * min(1.0, exact)
    options = {"value_discretization_interval": interval, "log_mass_truncation_bound": -80}
    one = plds.from_gaussian_mechanism(math.sqrt(steps) / mean, **options)
    pmf = one._pmf_remove.to_dense_pmf()
    losses = Losses(pmf._probs, pmf._lower_loss, pmf._infinity_mass, steps)
    received = LossDistributions([losses], interval).epsilon(delta)
    assert exact <= received < exact * 1.01
    assert exact <= gaussian_epsilon(mean, delta) < exact * (1 + 1e-6) + 1e-9
    phase = Phase(1.0, math.sqrt(steps) / mean, steps)
    doubled = Ledger((phase,)).epsilon(delta, relation="replace_one")
    assert doubled == pytest.approx(exact_gaussian(2 * mean, delta), rel=1e-6)


def delta_of_two_steps(q: float, noise: float, epsilon: float, removed: bool) -> float:
    """The second step in closed form, the first by Simpson's rule."""
    x = np.linspace(-14 * noise, 14 * noise + 1, 100_001)
    without, with_it = NORMAL.pdf(x / noise) / noise, NORMAL.pdf((x - 1) / noise) / noise
    mixed = (1 - q) * without + q * with_it
    loss = np.log1p(q * np.expm1((2 * x - 1) / (2 * noise**2)))
    needed = epsilon - loss if removed else -(epsilon + loss)
    always = needed <= math.log1p(-q)
    least = np.expm1(np.where(always, 1.0, needed)) / q
    edge = np.where(always, -np.inf, noise**2 * np.log1p(least) + 0.5) / noise
    tail = NORMAL.sf if removed else NORMAL.cdf
    of_without, of_with = tail(edge), tail(edge - 1 / noise)
    of_mixed = (1 - q) * of_without + q * of_with
    if removed:
        density = mixed * of_mixed - math.exp(epsilon) * without * of_without
    else:
        density = without * of_without - math.exp(epsilon) * mixed * of_mixed
    return float(integrate.simpson(np.maximum(density, 0), x=x))


@pytest.mark.parametrize(("q", "noise"), [(0.01, 1.0), (0.5, 1.0)])
def test_sampled_steps_are_above_the_truth_and_near(q: float, noise: float) -> None:
    for delta in (1e-5, 1e-10, 1e-18):
        found = [
            optimize.brentq(
                lambda e, way=way, delta=delta: math.log(
                    max(delta_of_two_steps(q, noise, e, way), 1e-300) / delta
                ),
                1e-9,
                40,
                xtol=1e-8,
            )
            for way in (True, False)
            if delta_of_two_steps(q, noise, 1e-9, way) > delta
        ]
        received = Ledger((Phase(q, noise, 2),)).epsilon(delta)
        assert max(found) * (1 - 1e-7) <= received < max(found) * 1.001


def test_other_kinds_of_steps_compose_with_gaussian_ones() -> None:
    sampled, whole = Phase(0.02, 1.5, 200), Phase(1.0, 20.0, 50)
    both = Ledger((sampled, whole)).epsilon(1e-12)
    apart = [Ledger((phase,)).epsilon(1e-12) for phase in (sampled, whole)]
    assert max(apart) < both < sum(apart)
    # A step of which all examples are part, as one that draws them all but never does.
    nearly = Ledger((sampled, Phase(1 - 1e-12, 20.0, 50))).epsilon(1e-12)
    assert both == pytest.approx(nearly, rel=1e-3)
