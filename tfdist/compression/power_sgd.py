"""PowerSGD: low-rank compression of gradients, with error feedback."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfdist.compression.matrices import (
    is_compressed,
    matrix_shape,
    trained_variables,
    updated_by_rows,
)
from tfdist.compression.settings import PowerSGD
from tfdist.step.exchange import Contribution, Exchange, Sums
from tfdist.step.state import Role
from tfdist.strategies.base import Strategy

Tensor = Any
PLAIN, LEFT, RIGHT = "plain", "left", "right"
_SEED = 0x5EED
_TILT = 1e-3  # the length of the fixed part, over that of the vectors


@dataclass(frozen=True)
class LowRank:
    """Makes the exchange; see `ExchangeMaker`.

    Attributes:
        settings: The settings.
    """

    settings: PowerSGD

    def make(self, model: Any, strategy: Strategy) -> LowRankExchange:
        """Makes the exchange.

        Args:
            model: A built `keras.Model`.
            strategy: The strategy on whose replicas it trains.
        """
        return LowRankExchange(self.settings, model)


class Sent(NamedTuple):
    """A replica's compressed gradient.

    Attributes:
        matrix: The gradient plus the replica's residual, shape [m, n].
        basis: Orthonormal vectors of one side, shape [m, rank] or [n, rank].
        vectors: The product of the matrix and the basis, shape [n, rank] or [m, rank]. Only
            these are sent.
        side: The side of the basis.
    """

    matrix: Tensor
    basis: Tensor
    vectors: Tensor
    side: str

    def matrix_of(self, vectors: Tensor) -> Tensor:
        """Returns the product of the basis and some vectors.

        Args:
            vectors: Vectors of the side opposite to the basis.
        """
        pair = (self.basis, vectors) if self.side == LEFT else (vectors, self.basis)
        return tf.matmul(*pair, transpose_b=True)


class Factors:
    """The state of one matrix, and the compression of its gradient.

    A replica adds its residual to its gradient, which gives M. With orthonormal vectors P it
    sends Q = M^T P, and M - P Q^T is its new residual. All replicas update by P (sum of Q)^T.
    The next step uses the other side: its orthonormal vectors come from the sum of Q.

    Args:
        variable: A `keras.Variable` of at least two dimensions.
        settings: The settings.
        number: The variable's number, from which its first vectors are drawn.

    Attributes:
        left: `keras.Variable` of shape [m, rank].
        right: `keras.Variable` of shape [n, rank].
        residual: `keras.Variable` of shape [m, n]: the part of gradients that the replica has
            not sent yet.
    """

    def __init__(self, variable: Any, settings: PowerSGD, number: int) -> None:
        rows, columns = matrix_shape(variable.shape)
        rank = min(settings.rank, rows, columns)
        dtype = "float64" if variable.dtype == "float64" else "float32"
        self._settings = settings
        self._number = number
        self._fixed_parts: dict[int, Tensor] = {}
        self._shape = tuple(variable.shape)
        self._matrix = rows, columns
        name = variable.name

        def zeros(shape: tuple[int, ...], suffix: str) -> Any:
            return keras.Variable(
                np.zeros(shape), dtype=dtype, trainable=False, name=f"{name}_{suffix}"
            )

        self.left = zeros((rows, rank), "left")
        self.right = zeros((columns, rank), "right")
        self.residual = zeros((rows, columns), "residual")
        self.reset()

    def reset(self) -> None:
        """Sets the initial state of a training."""
        # Both sides are drawn. If the first gradients are not finite, that step stores nothing,
        # and the second step begins with the other side.
        for variable in (self.left, self.right):
            variable.assign(self._random_vectors(variable.shape[0], tf.constant(0, tf.int64)))
        self.residual.assign(tf.zeros(self.residual.shape, self.residual.dtype))

    def _random_vectors(self, size: int, step: Tensor) -> Tensor:
        """Draws vectors that are equal on all replicas. Their lengths do not matter."""
        seed = tf.stack([tf.constant(_SEED + self._number, tf.int64), step])
        # XLA, which compiles the step of a single replica, draws other real numbers from the
        # same seed, but the same whole numbers. A sum of four uniform ones is close to normal.
        bits = tf.random.stateless_uniform(
            [4, size, self.left.shape[-1]], seed, None, None, tf.int32, alg="philox"
        )
        return tf.reduce_sum(tf.cast(bits, self.left.dtype) / 2.0**31, 0)

    def _fixed(self, size: int) -> Tensor:
        """Returns fixed vectors, whose lengths together are `_TILT`.

        They are computed once, outside of the step. As a part of it, each replica's copy would
        be folded into a constant at another moment, and TensorFlow would then round the
        replicas' products differently.
        """
        with tf.init_scope():
            if size not in self._fixed_parts:
                vectors = self._random_vectors(size, tf.constant(0, tf.int64)).numpy()
                self._fixed_parts[size] = tf.constant(_TILT / np.linalg.norm(vectors) * vectors)
        return self._fixed_parts[size]

    def _tilted(self, vectors: Tensor) -> Tensor:
        """Adds a small part of fixed vectors.

        If the rank of the gradient is below the number of vectors, some vectors consist of
        rounding errors, which depend on the number of replicas. The QR decomposition would make
        them as long as the others. With the fixed part, they have a fixed direction.
        """
        return vectors + tf.norm(vectors) * self._fixed(vectors.shape[0])

    def compress(
        self, gradient: Tensor, side: str, step: Tensor, scale: Tensor | None = None
    ) -> Sent:
        """Compresses a replica's gradient.

        Args:
            gradient: The gradient, of the variable's shape.
            side: The side of the orthonormal vectors, `LEFT` or `RIGHT`.
            step: The number of steps made, scalar int64.
            scale: The factor of loss scaling in the gradient, or None. It changes between
                steps, so the residual is stored without it.
        """
        previous = self.left if side == LEFT else self.right
        vectors = tf.convert_to_tensor(previous)
        if self._settings.warm_start:
            vectors = self._tilted(vectors)
        else:
            vectors = self._random_vectors(vectors.shape[0], step)
        basis = tf.linalg.qr(vectors).q
        matrix = tf.reshape(tf.cast(gradient, self.residual.dtype), self._matrix)
        if scale is not None:
            matrix /= tf.cast(scale, matrix.dtype)
        matrix += tf.convert_to_tensor(self.residual)
        return Sent(matrix, basis, tf.matmul(matrix, basis, transpose_a=side == LEFT), side)

    def decompress(self, sent: Sent, summed: Tensor, scale: Tensor | None = None) -> Tensor:
        """Returns the gradient that all replicas apply.

        Args:
            sent: The compressed gradient of this replica.
            summed: The sum of the vectors of all replicas.
            scale: As in `compress`.

        Returns:
            Tensor of the variable's shape.
        """
        matrix = sent.matrix_of(summed)
        if scale is not None:
            matrix *= tf.cast(scale, matrix.dtype)
        return tf.reshape(matrix, self._shape)

    def keep(self, sent: Sent, summed: Tensor, counts: Tensor) -> None:
        """Stores the sum, and the residual of this replica.

        Args:
            sent: The compressed gradient of this replica.
            summed: The sum of the vectors of all replicas.
            counts: Scalar bool: whether the step counts. Otherwise nothing changes.
        """
        residual = sent.matrix - sent.matrix_of(sent.vectors)
        opposite = self.right if sent.side == LEFT else self.left
        for variable, value in ((self.residual, residual), (opposite, summed)):
            variable.assign(tf.where(counts, value, tf.convert_to_tensor(variable)))


class LowRankExchange(Exchange):
    """Exchanges low-rank parts of gradients, in one collective for each step.

    Args:
        settings: The settings.
        model: A built `keras.Model`.
    """

    acts_alone = True
    has_phases = True

    def __init__(self, settings: PowerSGD, model: Any) -> None:
        self._settings = settings
        by_rows = updated_by_rows(model)
        self._factors = {
            id(variable): Factors(variable, settings, number)
            for number, variable in enumerate(trained_variables(model))
            if is_compressed(variable, settings, by_rows)
        }
        self._count = keras.Variable(0, dtype="int64", trainable=False, name="power_sgd_steps")
        self._step: int | None = None

    @property
    def state(self) -> Sequence[tuple[Any, Role]]:
        """The variables that keep state between steps, with their roles."""
        state = [(self._count, Role.REPLICATED)]
        for factors in self._factors.values():
            state += [(factors.left, Role.REPLICATED), (factors.right, Role.REPLICATED)]
            state.append((factors.residual, Role.PER_REPLICA))
        return state

    def reset(self) -> None:
        """Resets all state at the beginning of a training."""
        self._count.assign(0)
        for factors in self._factors.values():
            factors.reset()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Returns a context for a training. `next_phase` then reads the number of steps."""
        self._step = None
        yield

    def next_phase(self) -> Hashable:
        """Returns the side of the next step's compression, or `PLAIN`."""
        if self._step is None:
            self._step = int(self._count.numpy())
        compressed_steps = self._step - self._settings.start_after
        if compressed_steps < 0 or not self._factors:
            return PLAIN
        return RIGHT if compressed_steps % 2 else LEFT

    def end_step(self) -> None:
        """Counts a step."""
        if self._step is not None:
            self._step += 1

    def reduce(
        self, strategy: Strategy, contribution: Contribution, phase: Hashable
    ) -> tuple[Sums, Callable[[Tensor], None]]:
        """Sums compressed gradients; see `Exchange`."""
        side, step = str(phase), tf.convert_to_tensor(self._count)
        compressed_gradients: dict[int, tuple[Factors, Sent]] = {}
        for i, (gradient, variable) in enumerate(
            zip(contribution.gradients, contribution.variables, strict=True)
        ):
            factors = self._factors.get(id(variable))
            if side == PLAIN or factors is None or not _is_whole(gradient, variable):
                continue
            compressed = factors.compress(gradient, side, step, contribution.loss_scales[i])
            compressed_gradients[i] = factors, compressed
        tensors = [
            compressed_gradients[i][1].vectors if i in compressed_gradients else gradient
            for i, gradient in enumerate(contribution.gradients)
        ]
        summed, others = strategy.reduce_step(
            tensors, contribution.others, contribution.share, contribution.variables
        )
        totals = list(summed)
        for i, (factors, compressed) in compressed_gradients.items():
            total = factors.decompress(compressed, summed[i], contribution.loss_scales[i])
            totals[i] = tf.cast(total, contribution.gradients[i].dtype)

        def keep(counts: Tensor) -> None:
            # The state changes only if all sums are finite. NaN would stay in the residual
            # forever. And if any gradient makes loss scaling skip a step, the sent parts of
            # that step are not applied, so they must stay in the residual.
            values = [t.values if isinstance(t, tf.IndexedSlices) else t for t in summed]
            finite = [tf.reduce_all(tf.math.is_finite(value)) for value in values]
            counts = tf.reduce_all(tf.stack([counts, *finite]))
            for i, (factors, compressed) in compressed_gradients.items():
                factors.keep(compressed, summed[i], counts)

        return (totals, others), keep

    def finish(self, counts: Tensor) -> None:
        """Counts a step."""
        self._count.assign_add(tf.cast(counts, tf.int64))


def _is_whole(gradient: Tensor, variable: Any) -> bool:
    """Returns whether a gradient has the shape of its variable, and is not sparse."""
    is_rows = isinstance(gradient, tf.IndexedSlices)
    return not is_rows and tuple(gradient.shape) == tuple(variable.shape)
