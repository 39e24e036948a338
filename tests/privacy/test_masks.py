"""Random numbers of rows in private training: they move with the row, whoever else is there."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

import tfdist
from tfdist import _keras
from tfdist._keras import RowKeys, keyed, row_numbers
from tfdist.errors import ArgumentError
from tfdist.privacy.mechanism import independence
from tfdist.privacy.mechanism.clipping import clipped_sum
from tfdist.privacy.mechanism.contributions import pinned

L = keras.layers
SEED = tf.constant([7, 3], tf.int32)
SECRET = tf.constant([2**61 + 5, -(2**40)], tf.int64)
# Under the null hypothesis a test below fails with this probability; seeds are fixed.
LEVEL = 1e-4


def keys(rows: Any) -> RowKeys:
    return RowKeys(tf.constant(rows, tf.int64), SECRET)


@pytest.mark.quick
class TestNumbers:
    def test_they_have_their_distributions(self) -> None:
        many, shape = keys(np.arange(200)), (200, 500)
        uniform = keyed.uniform(many, shape, SEED, tf.float32).numpy()
        normal = keyed.normal(many, shape, SEED, tf.float32).numpy()
        assert uniform.min() >= 0
        assert uniform.max() < 1
        assert stats.kstest(uniform.ravel(), "uniform").pvalue > LEVEL
        assert stats.kstest(normal.ravel(), "norm").pvalue > LEVEL
        kept = keyed.is_at_least(0.3, many, shape, SEED, tf.float16).numpy()
        assert stats.binomtest(int(kept.sum()), kept.size, 0.7).pvalue > LEVEL
        whole = keyed.integers(many, shape, SEED).numpy() % 10
        assert stats.chisquare(np.bincount(whole.ravel())).pvalue > LEVEL

    def test_rows_positions_draws_and_secrets_are_independent(self) -> None:
        found = [keyed.normal(keys(np.arange(60)), (60, 300), SEED, tf.float64).numpy()]
        found += [keyed.normal(keys(np.arange(60)), (60, 300), SEED + 1, tf.float64).numpy()]
        other = RowKeys(keys(np.arange(60)).rows, SECRET + 1)
        found += [keyed.normal(other, (60, 300), SEED, tf.float64).numpy()]
        for numbers in (np.concatenate(found), np.concatenate(found).T):
            scores = np.corrcoef(numbers)[np.triu_indices(len(numbers), 1)]
            scores *= np.sqrt(numbers.shape[1] - 1)
            # Correlations of independent normal numbers have variance 1 / (n - 1).
            z = ((scores**2).sum() - len(scores)) / np.sqrt(2 * len(scores))
            assert abs(z) < stats.norm.isf(LEVEL / 2)
        # Three rows have no linear relation either.
        signs = found[0] > 0
        odd = (signs[:-2] ^ signs[1:-1] ^ signs[2:]).mean()
        assert abs(odd - 0.5) * 2 * np.sqrt(58 * 300) < stats.norm.isf(LEVEL / 2)

    @pytest.mark.parametrize("shape", [(4, 3), (8, 3)])  # the second has two places a row
    def test_they_move_with_the_row(self, shape: Any) -> None:
        draw = tf.function(
            lambda rows, size: keyed.uniform(
                RowKeys(rows, SECRET), [size, shape[1]], SEED, tf.float32
            ),
            input_signature=[tf.TensorSpec([None], tf.int64), tf.TensorSpec([], tf.int64)],
        )
        times = shape[0] // 4
        whole = draw(tf.constant([5, 6, 7, 8], tf.int64), shape[0]).numpy()
        some = draw(tf.constant([8, 6], tf.int64), 2 * times).numpy()
        rows = whole.reshape(4, times, 3)
        np.testing.assert_array_equal(some.reshape(2, times, 3), rows[[3, 1]])
        assert len(np.unique(whole)) == whole.size

    def test_an_axis_of_positions_is_not_the_batch(self) -> None:
        """Not even where it is as long, or a multiple: then a row would decide for others."""

        def shapes(x: Any) -> dict[str, Any]:
            turned = tf.transpose(x, (1, 0, 2))
            return {
                "element": [tf.shape(x)[1], 2],
                "from the end": [tf.shape(x)[-2], 2],
                "of Keras": [keras.ops.shape(x)[1], 2],
                "computed": [tf.cast(tf.shape(x)[1] * 2 + 1, tf.int64) // 2, 2],
                "stacked": tf.cast(tf.stack([tf.shape(x, tf.int64)[1], 2]), tf.int32),
                "batch": [tf.shape(x)[0], 2],
                "folded": tf.shape(tf.reshape(x, (-1, 2))),
                "both": [tf.shape(x)[1] * tf.shape(x)[0], 2],
                "not known": [tf.shape(turned)[0], 2],
            }

        @tf.function(
            input_signature=[tf.TensorSpec([None], tf.int64), tf.TensorSpec([None, None, 2])]
        )
        def draw(rows: Any, x: Any) -> Any:
            of = RowKeys(rows, SECRET)
            return {k: keyed.uniform(of, s, SEED, tf.float32) for k, s in shapes(x).items()}

        rows = tf.constant([5, 6, 7, 8], tf.int64)
        found, other = (draw(rows + add, tf.zeros([4, 4, 2])) for add in (0, 100))
        same = {name for name in found if np.array_equal(found[name], other[name])}
        assert same == {"element", "from the end", "of Keras", "computed", "stacked"}
        # What is not known goes by its size, and a single row shows it: see `independence`.
        five = (draw(rows + add, tf.zeros([4, 5, 2]))["not known"] for add in (0, 100))
        np.testing.assert_array_equal(*five)

    def test_equal_contents_have_equal_numbers_wherever_they_are(self) -> None:
        x = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")
        zero = tf.constant(0, tf.int64)
        for data in (
            tf.constant(x),
            (tf.constant(x), tf.range(6)),
            tf.constant(x, tf.bfloat16),
        ):
            cut = tf.nest.map_structure(lambda leaf: leaf[2:], data)
            found, later = row_numbers(data, zero), row_numbers(cut, zero + 2)
            np.testing.assert_array_equal(found[2:], later)
            assert len(np.unique(found)) == 6
        twice = row_numbers(tf.repeat(tf.constant(x), 2, axis=0), zero, 2)
        assert len(np.unique(twice)) == 12
        words = row_numbers(tf.constant([["a", "b"], ["a", "c"], ["a", "b"]]), zero)
        assert int(words[0]) == int(words[2]) != int(words[1])
        ragged = row_numbers(tf.ragged.constant([[1], [1]]), zero + 5)
        np.testing.assert_array_equal(ragged, [5, 6])


def sum_of_clipped(x: Any, y: Any, layers: Any, **options: Any) -> Any:
    """Gives what one step without noise adds up: C = 1, a rate of 1."""
    keras.utils.set_random_seed(0)
    last = L.Dense(1, use_bias=False, kernel_initializer="zeros")
    model = keras.Sequential([keras.Input(x.shape[1:]), *layers(), L.Flatten(), last])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    copies = options.pop("augmentations", 1)
    privacy = tfdist.DPSGD(1.0, noise_multiplier=0.0, delta=1e-3, augmentations=copies)
    options = {"batch_size": 200, "verbose": 0, "seed": 3, "privacy": privacy, **options}
    tfdist.fit(model, x, y, **options)
    return model.get_weights()[0] * 200


@pytest.mark.parametrize(
    ("layers", "augment", "copies"),
    [
        (lambda: [L.Dropout(0.5, seed=1), L.GaussianNoise(0.5, seed=2)], None, 1),
        pytest.param(
            *(lambda: [L.RandomFlip(seed=1), L.RandomRotation(0.2, seed=2)], None, 1),
            marks=pytest.mark.full,
        ),
        (lambda: [L.Dropout(0.5, seed=1)], lambda: L.RandomFlip(seed=1), 3),
        pytest.param(  # copies are augmented too
            *(list, lambda: L.RandomTranslation(0.3, 0.3, seed=1), 1), marks=pytest.mark.full
        ),
    ],
    ids=["noise", "images", "copies", "augmented"],
)
def test_a_row_that_is_left_out_changes_a_sum_by_one_gradient(
    layers: Any, augment: Any, copies: int
) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 6, 6, 1)).astype("float32"), np.full((64, 1), 50.0)

    def moved(*out: int) -> float:
        options = {} if augment is None else {"augment": tfdist.Augment(augment())}
        sums = [
            sum_of_clipped(a, b, layers, augmentations=copies, **options)
            for a, b in ((x, y), (np.delete(x, out, 0), np.delete(y, out, 0)))
        ]
        return float(np.linalg.norm(sums[0] - sums[1]))

    # So large are the errors that every gradient is clipped: to a norm of 1.
    assert moved(0) == pytest.approx(1.0, abs=1e-4)


class DropsWeights(L.Layer):
    """Drops numbers of a kernel: its first axis may be as long as a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seed = keras.random.SeedGenerator(1)

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], 6))

    def call(self, x: Any, training: bool = False) -> Any:
        kernel = keras.random.dropout(self.kernel, 0.5, seed=self.seed)
        return x @ (kernel if training else self.kernel)


@pytest.mark.parametrize(
    "way", ["batches", pytest.param("microbatches", marks=pytest.mark.full)]
)
def test_numbers_of_a_weight_follow_from_no_row(way: str) -> None:
    """Not even where the weight has as many rows as the batch: one row moves only itself."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 16)).astype("float32"), rng.normal(size=(64, 3))
    x[:, 5] = 30 * np.sign(x[:, 5])  # a feature in another unit
    other = x.copy()
    other[5] *= -1
    options: dict[str, Any] = {"microbatch_size": 16} if way == "microbatches" else {}
    privacy = tfdist.DPFTRL(
        0.1,
        noise_multiplier=0.0,
        delta=1e-4,
        bands=1,
        seed=7,
        relation="replace_one",
        **options,
    )

    def update(x: Any) -> Any:
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((16,)), DropsWeights(), L.Dense(3, "tanh")])
        compiled = {"jit_compile": True} if way == "microbatches" else {}
        model.compile(keras.optimizers.SGD(1.0), "mse", **compiled)
        before = model.get_weights()
        data: Any = (x, y)
        size, arguments = 64, {"batch_size": 64, "shuffle": False}
        if way != "microbatches":
            data = (tf.data.Dataset.from_tensor_slices(data).batch(16, drop_remainder=True),)
            size, arguments = 16, {}
        tfdist.fit(model, *data, steps_per_epoch=1, verbose=0, privacy=privacy, **arguments)
        changes = [a - b for a, b in zip(before, model.get_weights(), strict=True)]
        return size * np.concatenate([change.ravel() for change in changes])

    assert np.linalg.norm(update(x) - update(other)) <= 2.001 * 0.1


def test_masks_are_secret_unless_a_seed_is_given() -> None:
    x, y = np.ones((20, 40), "float32"), np.full((20, 1), 50.0)

    def masked(**options: Any) -> Any:
        return sum_of_clipped(x, y, lambda: [L.Dropout(0.5, seed=1)], **options)

    tfdist.init(seed=7)
    try:
        assert np.linalg.norm(masked(seed=None) - masked(seed=None)) > 1
    finally:
        tfdist.init()
    first = masked(seed=4)
    np.testing.assert_array_equal(first, masked(seed=4))
    assert np.linalg.norm(first - masked(seed=5)) > 1


def test_an_augmentation_that_mixes_is_refused() -> None:
    class Turned(L.Layer):
        def call(self, inputs: Any) -> Any:
            return inputs + inputs[::-1]

    class NowAndThen(L.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.seeds = keras.random.SeedGenerator(1)

        def call(self, inputs: Any) -> Any:
            drawn = keras.random.uniform((keras.ops.shape(inputs)[0], 1), seed=self.seeds)
            return keras.ops.where(drawn < 0.1, inputs + inputs[::-1], inputs)

    x, y = np.zeros((20, 6), "float32"), np.zeros((20, 1), "float32")
    for layer in (Turned(), NowAndThen()):
        augment = tfdist.Augment([L.GaussianNoise(0.5), layer])
        with pytest.raises(ArgumentError, match=f"{type(layer).__name__}, which mixes the ex"):
            sum_of_clipped(x, y, list, augment=augment)


class Positions(L.Layer):
    """A table that is used without the batch, and dropout around it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.drop = L.Embedding(5, 3), L.Dropout(0.4)

    def call(self, inputs: Any, training: bool = False) -> Any:
        places = self.table(keras.ops.arange(keras.ops.shape(inputs)[1]))
        return self.drop(inputs + places, training=training)


DROPPING = {
    "closed": lambda: [L.GRU(3, dropout=0.3, recurrent_dropout=0.2, go_backwards=True)],
    "computed_again": lambda: [L.GRU(4, reset_after=False, dropout=0.2), Positions()],
}


@pytest.mark.parametrize("kind", DROPPING)
def test_what_is_computed_again_drops_what_was_dropped(kind: str) -> None:
    """Each example's gradient is the one that Keras gives of it alone, with its own masks."""
    keras.utils.set_random_seed(1)
    x = keras.Input((5, 3))
    made = [L.Flatten()(layer(x)) for layer in DROPPING[kind]()]
    model = keras.Model(x, L.Dense(2)(L.Concatenate()(made)))
    model.compile(loss="mse")
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(4, 5, 3)), rng.normal(size=(4, 2))
    variables = [v.value for v in model.trainable_variables]
    columns = [tf.constant(column, tf.float32) for column in (inputs, targets)]
    given = (*columns, keys([5, 9, 2, 70]).rows)
    signature = [tf.TensorSpec([None, *part.shape[1:]], part.dtype) for part in given]

    def alone(x: Any, y: Any, rows: Any) -> Any:
        with pinned(model, RowKeys(rows, SECRET)), tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        return [tf.convert_to_tensor(g) for g in tape.gradient(loss, variables)]

    def together(x: Any, y: Any, rows: Any) -> Any:
        with pinned(model, RowKeys(rows, SECRET)):
            return clipped_sum(model, x, y, rows > 0, 0.5)

    with _keras.replicated():
        plain, private = (
            tf.function(f, input_signature=signature, autograph=False)
            for f in (alone, together)
        )
        each = [plain(*(part[i : i + 1] for part in given)) for i in range(4)]
        clipped = private(*given)
        if kind == "computed_again":
            independence.check(model, *columns)
    norms = np.sqrt([sum(np.sum(g.numpy() ** 2.0) for g in one) for one in each])
    np.testing.assert_allclose(clipped.norms, norms, rtol=1e-4)
    factors = np.minimum(1, 0.5 / clipped.norms.numpy())
    for received, *of_rows in zip(clipped.sums, *each, strict=True):
        expected = sum(f * g.numpy() for f, g in zip(factors, of_rows, strict=True))
        np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-6)
