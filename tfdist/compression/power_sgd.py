"""PowerSGD: gradients of matrices travel as vectors, what is lost is added to the next ones."""

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
_TILT = 1e-3


@dataclass(frozen=True)
class LowRank:
    """Makes the exchange; see `ExchangeMaker`.

    Attributes:
        settings: What the user asked for.
    """

    settings: PowerSGD

    def make(self, model: Any, strategy: Strategy) -> LowRankExchange:
        """Makes the exchange.

        Args:
            model: A built `keras.Model`.
            strategy: Where its replicas are.
        """
        return LowRankExchange(self.settings, model)


class Sent(NamedTuple):
    """What a replica sends of a gradient.

    Attributes:
        matrix: Shape [m, n]: the gradient, and what the replica had not sent before.
        basis: Orthonormal vectors of one side, shape [m, rank] or [n, rank].
        vectors: What travels: the matrix times these, shape [n, rank] or [m, rank].
        side: The side of the basis.
    """

    matrix: Tensor
    basis: Tensor
    vectors: Tensor
    side: str

    def matrix_of(self, vectors: Tensor) -> Tensor:
        """Gives the matrix that vectors stand for.

        Args:
            vectors: Of the other side than the basis.
        """
        pair = (self.basis, vectors) if self.side == LEFT else (vectors, self.basis)
        return tf.matmul(*pair, transpose_b=True)


class Factors:
    """What is kept for one matrix, and how its gradient is compressed.

    A replica adds what it has not sent yet to its gradient: M. With orthonormal vectors P it
    sends Q = M^T P and keeps M - P Q^T. All replicas update by P (sum of Q)^T. In the next step
    the sides are exchanged.

    Args:
        variable: A `keras.Variable` of at least two dimensions.
        settings: What the user asked for.
        number: Of the variable, from which its first vectors are drawn.

    Attributes:
        left: `keras.Variable` of shape [m, rank].
        right: `keras.Variable` of shape [n, rank].
        residual: `keras.Variable` of shape [m, n]: what a replica has not sent yet.
    """

    def __init__(self, variable: Any, settings: PowerSGD, number: int) -> None:
        rows, columns = matrix_shape(variable.shape)
        rank = min(settings.rank, rows, columns)
        dtype = "float64" if variable.dtype == "float64" else "float32"
        self._settings = settings
        self._number = number
        self._shape = tuple(variable.shape)
        self._matrix = rows, columns
        name = variable.name

        def zeros(shape: tuple[int, ...], what: str) -> Any:
            return keras.Variable(
                np.zeros(shape), dtype=dtype, trainable=False, name=f"{name}_{what}"
            )

        self.left = zeros((rows, rank), "left")
        self.right = zeros((columns, rank), "right")
        self.residual = zeros((rows, columns), "residual")
        self.reset()

    def reset(self) -> None:
        """Brings everything to where a training begins."""
        # Both sides: where the first gradients are not finite, the second step has the other.
        for variable in (self.left, self.right):
            variable.assign(self._drawn(variable.shape[0], tf.constant(0, tf.int64)))
        self.residual.assign(tf.zeros(self.residual.shape, self.residual.dtype))

    def _drawn(self, size: int, step: Tensor) -> Tensor:
        """Draws vectors, the same on all replicas; their lengths do not matter."""
        seed = tf.stack([tf.constant(_SEED + self._number, tf.int64), step])
        # Real numbers of the same seed are others under XLA, which has one replica of a
        # compiled model; whole numbers are not. A sum of a few is close to normal.
        bits = tf.random.stateless_uniform(
            [4, size, self.left.shape[-1]], seed, None, None, tf.int32, alg="philox"
        )
        return tf.reduce_sum(tf.cast(bits, self.left.dtype) / 2.0**31, 0)

    def _tilted(self, vectors: Tensor) -> Tensor:
        """Turns vectors a little to fixed ones.

        Where the gradient's rank is below that of the vectors, one of them is rounding errors,
        other ones on each number of replicas. Made orthonormal, they would be of length one.
        """
        fixed = self._drawn(vectors.shape[0], tf.constant(0, tf.int64))
        return vectors + _TILT * tf.norm(vectors) / tf.norm(fixed) * fixed

    def compress(
        self, gradient: Tensor, side: str, step: Tensor, scale: Tensor | None = None
    ) -> Sent:
        """Gives what a replica sends of its gradient.

        Args:
            gradient: Of the variable's shape.
            side: `LEFT` or `RIGHT`: of which side the vectors are known.
            step: Scalar int64: the steps made.
            scale: By which the loss was multiplied. Scales change from step to step, so what
                is kept is divided by it.
        """
        known = self.left if side == LEFT else self.right
        vectors = tf.convert_to_tensor(known)
        if self._settings.warm_start:
            vectors = self._tilted(vectors)
        else:
            vectors = self._drawn(vectors.shape[0], step)
        basis = tf.linalg.qr(vectors).q
        matrix = tf.reshape(tf.cast(gradient, self.residual.dtype), self._matrix)
        if scale is not None:
            matrix /= tf.cast(scale, matrix.dtype)
        matrix += tf.convert_to_tensor(self.residual)
        return Sent(matrix, basis, tf.matmul(matrix, basis, transpose_a=side == LEFT), side)

    def decompress(self, sent: Sent, summed: Tensor, scale: Tensor | None = None) -> Tensor:
        """Gives the gradient that all replicas apply.

        Args:
            sent: By this replica.
            summed: What all sent, added up.
            scale: As `compress` got it.

        Returns:
            Tensor of the variable's shape.
        """
        matrix = sent.matrix_of(summed)
        if scale is not None:
            matrix *= tf.cast(scale, matrix.dtype)
        return tf.reshape(matrix, self._shape)

    def keep(self, sent: Sent, summed: Tensor, counts: Tensor) -> None:
        """Keeps the sum, and what this replica has not sent.

        Args:
            sent: By this replica.
            summed: What all sent, added up.
            counts: Scalar bool: whether the step counts; else nothing is changed.
        """
        rest = sent.matrix - sent.matrix_of(sent.vectors)
        other = self.right if sent.side == LEFT else self.left
        for variable, value in ((self.residual, rest), (other, summed)):
            variable.assign(tf.where(counts, value, tf.convert_to_tensor(variable)))


class LowRankExchange(Exchange):
    """Exchanges low-rank parts of gradients, in one collective a step.

    Args:
        settings: What the user asked for.
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
        """What is kept between steps."""
        found = [(self._count, Role.REPLICATED)]
        for factors in self._factors.values():
            found += [(factors.left, Role.REPLICATED), (factors.right, Role.REPLICATED)]
            found.append((factors.residual, Role.PER_REPLICA))
        return found

    def reset(self) -> None:
        """Forgets an earlier training."""
        self._count.assign(0)
        for factors in self._factors.values():
            factors.reset()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Counts steps from what the state says when the first one is made."""
        self._step = None
        yield

    def next_phase(self) -> Hashable:
        """Says from which side gradients are compressed, if they are."""
        if self._step is None:
            self._step = int(self._count.numpy())
        since = self._step - self._settings.start_after
        if since < 0 or not self._factors:
            return PLAIN
        return RIGHT if since % 2 else LEFT

    def end_step(self) -> None:
        """Counts a step."""
        if self._step is not None:
            self._step += 1

    def reduce(
        self, strategy: Strategy, given: Contribution, phase: Hashable
    ) -> tuple[Sums, Callable[[Tensor], None]]:
        """Sums what is sent of each gradient; see `Exchange`."""
        side, step = str(phase), tf.convert_to_tensor(self._count)
        sent: dict[int, tuple[Factors, Sent]] = {}
        for i, (gradient, variable) in enumerate(
            zip(given.gradients, given.variables, strict=True)
        ):
            factors = self._factors.get(id(variable))
            if side == PLAIN or factors is None or not _is_whole(gradient, variable):
                continue
            own = factors.compress(gradient, side, step, given.loss_scales[i])
            sent[i] = factors, own
        travelling = [
            sent[i][1].vectors if i in sent else gradient
            for i, gradient in enumerate(given.gradients)
        ]
        summed, others = strategy.reduce_step(
            travelling, given.others, given.share, given.variables
        )
        totals = list(summed)
        for i, (factors, own) in sent.items():
            total = factors.decompress(own, summed[i], given.loss_scales[i])
            totals[i] = tf.cast(total, given.gradients[i].dtype)

        def keep(counts: Tensor) -> None:
            # What is not finite would stay in the residual for ever; and where loss scaling
            # skips a step, because of any gradient, what was sent in it is not applied.
            values = [t.values if isinstance(t, tf.IndexedSlices) else t for t in summed]
            finite = [tf.reduce_all(tf.math.is_finite(value)) for value in values]
            counts = tf.reduce_all(tf.stack([counts, *finite]))
            for i, (factors, own) in sent.items():
                factors.keep(own, summed[i], counts)

        return (totals, others), keep

    def finish(self, counts: Tensor) -> None:
        """Counts a step."""
        self._count.assign_add(tf.cast(counts, tf.int64))


def _is_whole(gradient: Tensor, variable: Any) -> bool:
    """Tells whether a gradient is one of all of a variable, not of some of its rows."""
    is_rows = isinstance(gradient, tf.IndexedSlices)
    return not is_rows and tuple(gradient.shape) == tuple(variable.shape)
