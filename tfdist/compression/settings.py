"""The settings of compression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tfdist.errors import ArgumentError

HALF = ("bf16", "fp16")


@dataclass(frozen=True)
class PowerSGD:
    """Compresses gradients of matrices to a low rank, with error feedback.

    A kernel counts as a matrix of m rows (the product of all its dimensions but the last) and
    n columns. In its place, each step exchanges either n or m vectors of `rank` numbers. A
    replica adds the part of a gradient that it could not send to its next gradient. Without
    this error feedback, training converges to other weights. The method is linear, so in exact
    arithmetic the weights do not depend on the number of replicas. Warm starts amplify
    rounding: after tens to hundreds of steps, weights on 1 and 2 replicas differ by up to 1e-2.

    Args:
        rank: The rank of the compressed gradients, at least 1. A matrix whose smaller
            dimension is not larger than this is not compressed.
        start_after: Number of first steps without compression.
        min_ratio: The least factor by which compression must reduce the bytes of a matrix.
            Other matrices, vectors and sparse gradients are not compressed.
        warm_start: Whether a step begins with the vectors of the step before. Otherwise each
            step draws new vectors. This does not amplify rounding, but is less exact, and does
            not train with momentum: on digits with 0.9, it failed at each rate tried.

    Raises:
        ArgumentError: A number is out of its range.

    Example:
        >>> import tfdist
        >>> tfdist.PowerSGD(rank=4).ratio(1000, 500)
        166.66666666666666

    Source:
        Vogels, Karimireddy and Jaggi, "PowerSGD: Practical low-rank gradient compression for
        distributed optimization", NeurIPS 2019, algorithm 1 and 2; in the form of its authors'
        implementation that makes one multiplication a step, from alternating sides.
    """

    rank: int = 2
    start_after: int = 100
    min_ratio: float = 2.0
    warm_start: bool = True

    def __post_init__(self) -> None:
        _check_whole("rank", self.rank, 1)
        _check_whole("start_after", self.start_after, 0)
        is_number = isinstance(self.min_ratio, int | float)
        if not is_number or isinstance(self.min_ratio, bool) or not self.min_ratio >= 0:
            raise ArgumentError(
                "`min_ratio` of `PowerSGD` must be a number of at least 0. Received: "
                f"min_ratio={self.min_ratio!r}."
            )
        if not isinstance(self.warm_start, bool):
            raise ArgumentError(
                "`warm_start` of `PowerSGD` must be True or False. Received: "
                f"warm_start={self.warm_start!r}."
            )

    def ratio(self, rows: int, columns: int) -> float:
        """Returns the factor by which a matrix shrinks, on average over two steps.

        Args:
            rows: Number of rows of the matrix.
            columns: Number of columns of the matrix.
        """
        rank = min(self.rank, rows, columns)
        return rows * columns / (rank * (rows + columns) / 2)


Compression = str | PowerSGD | None


def check(compression: Any) -> Compression:
    """Checks the argument `compression`, and returns it.

    Args:
        compression: As in `fit`.

    Raises:
        ArgumentError: `compression` is not valid.
    """
    if compression is None or isinstance(compression, PowerSGD):
        return compression
    if isinstance(compression, str) and compression in HALF:
        return compression
    raise ArgumentError(
        "`compression` must be None, 'bf16', 'fp16' or a tfdist.PowerSGD. Received: "
        f"compression={compression!r}."
    )


def _check_whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ArgumentError(
            f"`{name}` of `PowerSGD` must be a whole number of at least {least}. Received: "
            f"{name}={value!r}."
        )
