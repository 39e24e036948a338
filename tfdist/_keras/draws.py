"""What preprocessing layers draw, as a function of each example's place in the global batch.

In private training it is a function of what the example holds instead.

Keras's layers draw through `keras.src.backend.tensorflow.random`, whose functions take their
seed from `draw_seed`. They are replaced while a layer is traced, for the thread that does.
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
from keras.src import backend as _backend
from keras.src.backend.tensorflow import random as _random

from tfdist._keras import keyed
from tfdist._keras.random import uniform_rows
from tfdist._keras.replica import replaced
from tfdist._keras.traces import map_fn
from tfdist.errors import ArgumentError

Tensor = Any
_PROBE = 7919  # examples of a batch that is only traced; no layer has such a size
_fold = tf.random.experimental.stateless_fold_in
# Ops whose numbers depend on those drawn before, which differ between replicas.
_STATEFUL = ("Random", "Rng", "Multinomial", "TruncatedNormal", "ParameterizedTruncated")


@dataclass(frozen=True)
class Rows:
    """The examples of a global batch that a layer transforms.

    Attributes:
        seed: Integer tensor of shape [2], the same for the whole global batch.
        first: Scalar int64 tensor, where a share begins in it.
        count: Scalar int64 tensor, examples of the share.
        chosen: int64 tensor, which of the share's examples are transformed.
        keys: int64 of shape [count], in place of where examples are; None if they go by that.
    """

    seed: Tensor
    first: Tensor
    count: Tensor
    chosen: Tensor
    keys: Tensor | None = None

    def of(self, number: Any) -> Rows:
        """Gives the same examples with another seed.

        Args:
            number: Which; whole.
        """
        return replace(self, seed=_fold(self.seed, number))

    @property
    def identity(self) -> Tensor:
        """What the numbers of each chosen example follow from: its place, or its key."""
        if self.keys is None:
            return self.first + self.chosen
        return tf.gather(self.keys, self.chosen)

    def uniform(self) -> Tensor:
        """Draws a number from 0 to 1 for each example of the share, chosen or not."""
        return self.numbers((), tf.float32, tf.raw_ops.StatelessRandomUniformV2)

    def numbers(self, shape: Any, dtype: Any, op: Callable[..., Any]) -> Tensor:
        """Draws for each example of the share, chosen or not.

        Args:
            shape: Of what each example gets.
            dtype: Of the numbers.
            op: One of `tf.raw_ops` that makes them from a counter.

        Returns:
            Tensor of shape [count, *shape].
        """
        whole = tf.concat([[self.count], tf.cast(tf.convert_to_tensor(shape), tf.int64)], 0)
        if self.keys is not None:
            keys = keyed.RowKeys(self.keys, tf.cast(self.seed, tf.int64))
            return keyed.BY_OP[op](keys, whole, tf.zeros([2], tf.int32), tf.as_dtype(dtype))
        return uniform_rows(whole, self.first, self.seed, tf.as_dtype(dtype), op)


def transformed(layer: Any, spec: Any) -> Any:
    """Builds a layer, and finds the shape and dtype of what it makes of a batch.

    Args:
        layer: A `keras.Layer`.
        spec: `tf.TensorSpec` of a batch.

    Returns:
        A `tf.TensorSpec`.
    """
    symbol = keras.KerasTensor(spec.shape, _backend.standardize_dtype(spec.dtype))
    made = _backend.compute_output_spec(layer, symbol, training=True)
    return tf.TensorSpec((None, *made.shape[1:]), tf.as_dtype(made.dtype))


def draws_by_row(layer: Any, spec: Any) -> bool:
    """Tells whether a layer draws all its numbers anew for each example of a batch.

    Args:
        layer: A built `keras.Layer`.
        spec: `tf.TensorSpec` of a batch.

    Returns:
        False for one that decides once for a batch, as `RandomCrop` does.

    Raises:
        ArgumentError: It mixes examples, or draws numbers that no seed determines.
    """
    probing = _Probing()

    def probe(batch: Tensor) -> Tensor:
        with _drawing(probing):
            return layer(batch, training=True)

    traced = tf.function(probe, autograph=False).get_concrete_function(
        tf.TensorSpec((_PROBE, *spec.shape[1:]), spec.dtype)
    )
    definition = traced.graph.as_graph_def()
    name = type(layer).__name__
    if probing.mixes:
        raise mixes(name)
    functions = definition.library.function
    nodes = [*definition.node, *(node for f in functions for node in f.node_def)]
    wrong = sorted({node.op for node in nodes if node.op.startswith(_STATEFUL)})
    if wrong:
        raise ArgumentError(
            "A layer of `Augment` must draw by keras.random, from a SeedGenerator. "
            f"Received: {name}, which draws by TensorFlow's {wrong[0]}."
        )
    return probing.by_row == probing.draws


def mixes(name: str) -> ArgumentError:
    """Makes the error that says that a layer mixes examples.

    Args:
        name: The layer's class.
    """
    return ArgumentError(
        "A layer of `Augment` must treat each example by itself. Received: "
        f"{name}, which mixes the examples of a batch. Put it into the model."
    )


def transform(layer: Any, batch: Tensor, rows: Rows, by_row: bool) -> Tensor:
    """Applies a layer, its random numbers a function of `rows.seed` and each example's place.

    Args:
        layer: A built `keras.Layer`.
        batch: Tensor of shape [chosen, ...].
        rows: Which examples these are.
        by_row: What `draws_by_row` says. Otherwise one example is a batch.
    """
    if by_row:
        with _drawing(_ByRow(rows)):
            return layer(batch, training=True)

    def one(example_and_place: tuple[Tensor, Tensor]) -> Tensor:
        example, place = example_and_place
        with _drawing(_Single(_fold(rows.seed, place))):
            return layer(example[None], training=True)[0]

    made = transformed(layer, tf.TensorSpec((None, *batch.shape[1:]), batch.dtype))
    signature = tf.TensorSpec(made.shape[1:], made.dtype)
    return map_fn(one, (batch, rows.identity), fn_output_signature=signature)


class _How:
    """How a layer draws in this thread; the draws are numbered as they are traced."""

    draws = 0

    def seed(self) -> Tensor:
        """Gives the seed of the next draw."""
        self.draws += 1
        return tf.constant([0, self.draws], tf.int64)


class _Probing(_How):
    """Counts draws that have a row for each example."""

    by_row = 0
    mixes = False


class _Single(_How):
    """Draws for one example."""

    def __init__(self, of_example: Tensor) -> None:
        self._of_example = of_example

    def seed(self) -> Tensor:
        """Gives the seed of the next draw."""
        self.draws += 1
        return _fold(self._of_example, self.draws)


class _ByRow(_How):
    """Draws for all examples of the share, and gives the rows of the chosen ones."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def numbers(self, shape: Any, dtype: Any, op: Callable[..., Any]) -> Tensor:
        """Makes the next draw; `shape` is that of the batch as the layer sees it."""
        self.draws += 1
        of_each = tf.convert_to_tensor(shape)[1:]
        drawn = self._rows.of(self.draws).numbers(of_each, dtype, op)
        return tf.gather(drawn, self._rows.chosen)


_current = threading.local()


def _how() -> _How | None:
    return getattr(_current, "how", None)


@contextlib.contextmanager
def _drawing(how: _How) -> Iterator[None]:
    before = _how()
    state = random.getstate()
    random.seed(0)  # AugMix draws by it when it is traced: the same on every worker
    _current.how = how
    with contextlib.ExitStack() as stack:
        for name, make in _REPLACEMENTS.items():
            stack.enter_context(replaced(_random, name, make(getattr(_random, name))))
        try:
            yield
        finally:
            _current.how = before
            random.setstate(state)


# Each is given what stands in its place, which does the work where it has nothing to do.


def _draw_seed(before: Callable[..., Any]) -> Callable[..., Any]:
    def draw_seed(seed: Any) -> Tensor:
        how = _how()
        return before(seed) if how is None else how.seed()

    return draw_seed


def _uniform(before: Callable[..., Any]) -> Callable[..., Any]:
    def uniform(
        shape: Any, minval: Any = 0.0, maxval: Any = 1.0, dtype: Any = None, seed: Any = None
    ) -> Tensor:
        how = _how()
        if not isinstance(how, _ByRow):
            return _noted(before(shape, minval, maxval, dtype=dtype, seed=seed))
        dtype = dtype or keras.config.floatx()
        drawn = how.numbers(shape, dtype, tf.raw_ops.StatelessRandomUniformV2)
        low = tf.cast(minval, dtype)
        return drawn * (tf.cast(maxval, dtype) - low) + low

    return uniform


def _normal(before: Callable[..., Any]) -> Callable[..., Any]:
    def normal(
        shape: Any, mean: Any = 0.0, stddev: Any = 1.0, dtype: Any = None, seed: Any = None
    ) -> Tensor:
        how = _how()
        if not isinstance(how, _ByRow):
            return _noted(before(shape, mean, stddev, dtype=dtype, seed=seed))
        dtype = dtype or keras.config.floatx()
        drawn = how.numbers(shape, dtype, tf.raw_ops.StatelessRandomNormalV2)
        return drawn * tf.cast(stddev, dtype) + tf.cast(mean, dtype)

    return normal


def _randint(before: Callable[..., Any]) -> Callable[..., Any]:
    def randint(
        shape: Any, minval: Any, maxval: Any, dtype: Any = "int32", seed: Any = None
    ) -> Tensor:
        how = _how()
        if not isinstance(how, _ByRow):
            return _noted(before(shape, minval, maxval, dtype=dtype, seed=seed))
        drawn = how.numbers(shape, tf.int64, tf.raw_ops.StatelessRandomUniformFullIntV2)
        low, high = tf.cast(minval, tf.int64), tf.cast(maxval, tf.int64)
        return tf.cast(tf.math.floormod(drawn, high - low) + low, dtype)

    return randint


def _shuffle(before: Callable[..., Any]) -> Callable[..., Any]:
    def shuffle(x: Any, axis: int = 0, seed: Any = None) -> Tensor:
        how = _how()
        if isinstance(how, _Probing) and tf.convert_to_tensor(x).shape[axis] == _PROBE:
            how.mixes = True
        return before(x, axis=axis, seed=seed)

    return shuffle


def _noted(drawn: Tensor) -> Tensor:
    """Notes whether a draw has a row for each example."""
    how = _how()
    if isinstance(how, _Probing) and drawn.shape.rank:
        how.by_row += int(drawn.shape[0] == _PROBE)
    return drawn


_REPLACEMENTS = {
    "draw_seed": _draw_seed,
    "uniform": _uniform,
    "normal": _normal,
    "randint": _randint,
    "shuffle": _shuffle,
}
