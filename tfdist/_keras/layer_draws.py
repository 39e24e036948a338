"""The random numbers of a preprocessing layer, while tfdist calls it.

Keras's layers draw through `keras.src.backend.tensorflow.random`, whose functions take their
seed from `draw_seed`. They are replaced while a layer is traced, in the thread that traces it.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow import random as _random

from tfdist._keras import keyed
from tfdist._keras.interception import replaced
from tfdist._keras.random import uniform_rows

Tensor = Any
PROBE = 7919  # examples of a batch that is only traced; no layer has such a size
fold = tf.random.experimental.stateless_fold_in


@dataclass(frozen=True)
class TransformedRows:
    """The examples of a share that a layer transforms, and the seed of their numbers.

    Attributes:
        seed: Integer tensor of shape [2], the same for the whole global batch.
        first: Scalar int64 tensor, the position of the share's first example in the global
            batch.
        count: Scalar int64 tensor, number of examples of the share.
        chosen: int64 tensor, the share's examples that are transformed.
        keys: int64 tensor of shape [count], which replaces the positions, or None.
    """

    seed: Tensor
    first: Tensor
    count: Tensor
    chosen: Tensor
    keys: Tensor | None = None

    def of(self, number: Any) -> TransformedRows:
        """Returns the same examples with another seed.

        Args:
            number: A whole number, from which the new seed is derived.
        """
        return replace(self, seed=fold(self.seed, number))

    @property
    def identity(self) -> Tensor:
        """The position or the key of each chosen example."""
        if self.keys is None:
            return self.first + self.chosen
        return tf.gather(self.keys, self.chosen)

    def uniform(self) -> Tensor:
        """Draws a number from 0 to 1 for each example of the share."""
        return self.numbers((), tf.float32, tf.raw_ops.StatelessRandomUniformV2)

    def numbers(self, shape: Any, dtype: Any, op: Callable[..., Any]) -> Tensor:
        """Draws numbers for each example of the share.

        Args:
            shape: The shape of an example's numbers.
            dtype: The dtype of the numbers.
            op: One of `tf.raw_ops` that computes them from a counter.

        Returns:
            Tensor of shape [count, *shape].
        """
        size = tf.concat([[self.count], tf.cast(tf.convert_to_tensor(shape), tf.int64)], 0)
        if self.keys is not None:
            keys = keyed.RowKeys(self.keys, tf.cast(self.seed, tf.int64))
            return keyed.BY_OP[op](keys, size, tf.zeros([2], tf.int32), tf.as_dtype(dtype))
        return uniform_rows(size, self.first, self.seed, tf.as_dtype(dtype), op)


class LayerDraws:
    """The draws of a layer, numbered in the order in which they are traced."""

    count = 0

    def seed(self) -> Tensor:
        """Returns the seed of the next draw."""
        self.count += 1
        return tf.constant([0, self.count], tf.int64)


class CountingDraws(LayerDraws):
    """Counts the draws that have a row for each example.

    Attributes:
        by_row: Number of these draws.
        mixes: Whether the layer shuffles the examples.
    """

    by_row = 0
    mixes = False


class ExampleDraws(LayerDraws):
    """Draws for one example."""

    def __init__(self, example_seed: Tensor) -> None:
        self._example_seed = example_seed

    def seed(self) -> Tensor:
        """Returns the seed of the next draw."""
        self.count += 1
        return fold(self._example_seed, self.count)


class RowDraws(LayerDraws):
    """Draws for all examples of the share, and returns the rows of the chosen ones."""

    def __init__(self, rows: TransformedRows) -> None:
        self._rows = rows

    def numbers(self, shape: Any, dtype: Any, op: Callable[..., Any]) -> Tensor:
        """Makes the next draw. `shape` is the shape that the layer asks for."""
        self.count += 1
        example_shape = tf.convert_to_tensor(shape)[1:]
        # Numbers are drawn for all examples of the share. So those of an example do not depend
        # on which others are chosen.
        numbers = self._rows.of(self.count).numbers(example_shape, dtype, op)
        return tf.gather(numbers, self._rows.chosen)


_current = threading.local()


def _draws() -> LayerDraws | None:
    return getattr(_current, "draws", None)


@contextlib.contextmanager
def drawing(draws: LayerDraws) -> Iterator[None]:
    """Makes a context in which the layers that this thread traces use these draws.

    Args:
        draws: The draws.
    """
    outer_draws = _draws()
    state = random.getstate()
    # AugMix uses Python's generator while it is traced. All workers need the same numbers.
    random.seed(0)
    _current.draws = draws
    with contextlib.ExitStack() as stack:
        for name, make in _REPLACEMENTS.items():
            stack.enter_context(replaced(_random, name, make(getattr(_random, name))))
        try:
            yield
        finally:
            _current.draws = outer_draws
            random.setstate(state)


# Each function below takes the original, and returns its replacement.


def _draw_seed(original: Callable[..., Any]) -> Callable[..., Any]:
    def draw_seed(seed: Any) -> Tensor:
        draws = _draws()
        return original(seed) if draws is None else draws.seed()

    return draw_seed


def _uniform(original: Callable[..., Any]) -> Callable[..., Any]:
    def uniform(
        shape: Any, minval: Any = 0.0, maxval: Any = 1.0, dtype: Any = None, seed: Any = None
    ) -> Tensor:
        draws = _draws()
        if not isinstance(draws, RowDraws):
            # The draw is only counted, or of one example, for which `draw_seed` gives the seed.
            return _count(original(shape, minval, maxval, dtype=dtype, seed=seed))
        dtype = dtype or keras.config.floatx()
        numbers = draws.numbers(shape, dtype, tf.raw_ops.StatelessRandomUniformV2)
        low = tf.cast(minval, dtype)
        return numbers * (tf.cast(maxval, dtype) - low) + low

    return uniform


def _normal(original: Callable[..., Any]) -> Callable[..., Any]:
    def normal(
        shape: Any, mean: Any = 0.0, stddev: Any = 1.0, dtype: Any = None, seed: Any = None
    ) -> Tensor:
        draws = _draws()
        if not isinstance(draws, RowDraws):
            return _count(original(shape, mean, stddev, dtype=dtype, seed=seed))
        dtype = dtype or keras.config.floatx()
        numbers = draws.numbers(shape, dtype, tf.raw_ops.StatelessRandomNormalV2)
        return numbers * tf.cast(stddev, dtype) + tf.cast(mean, dtype)

    return normal


def _randint(original: Callable[..., Any]) -> Callable[..., Any]:
    def randint(
        shape: Any, minval: Any, maxval: Any, dtype: Any = "int32", seed: Any = None
    ) -> Tensor:
        draws = _draws()
        if not isinstance(draws, RowDraws):
            return _count(original(shape, minval, maxval, dtype=dtype, seed=seed))
        # The remainder of 64 random bits. Its bias, at most (high - low) / 2^64, cannot be
        # seen.
        numbers = draws.numbers(shape, tf.int64, tf.raw_ops.StatelessRandomUniformFullIntV2)
        low, high = tf.cast(minval, tf.int64), tf.cast(maxval, tf.int64)
        return tf.cast(tf.math.floormod(numbers, high - low) + low, dtype)

    return randint


def _shuffle(original: Callable[..., Any]) -> Callable[..., Any]:
    def shuffle(x: Any, axis: int = 0, seed: Any = None) -> Tensor:
        draws = _draws()
        if isinstance(draws, CountingDraws) and tf.convert_to_tensor(x).shape[axis] == PROBE:
            draws.mixes = True
        return original(x, axis=axis, seed=seed)

    return shuffle


def _count(numbers: Tensor) -> Tensor:
    """Counts a draw if it has a row for each example. Returns its numbers."""
    draws = _draws()
    if isinstance(draws, CountingDraws) and numbers.shape.rank:
        draws.by_row += int(numbers.shape[0] == PROBE)
    return numbers


_REPLACEMENTS = {
    "draw_seed": _draw_seed,
    "uniform": _uniform,
    "normal": _normal,
    "randint": _randint,
    "shuffle": _shuffle,
}
