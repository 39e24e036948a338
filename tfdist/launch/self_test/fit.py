"""The straight line through times of a collective: a latency, and a rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """An operation on n bytes takes `latency_s + n / bytes_per_s` seconds.

    Attributes:
        latency_s: Seconds of an operation on no bytes.
        bytes_per_s: Bytes in each further second.
    """

    latency_s: float
    bytes_per_s: float

    def seconds(self, size: float) -> float:
        """Returns the time of an operation.

        Args:
            size: Number of bytes.
        """
        return self.latency_s + size / self.bytes_per_s


def fit_line(points: Sequence[tuple[float, float]]) -> Line:
    """Fits the line with the smallest sum of squared relative errors (alpha-beta model).

    Relative errors, since times of small and of large tensors differ by factors of thousands.
    With `u = 1/t` and `v = n/t`, it is the least-squares solution of `a * u + b * v = 1`.

    Args:
        points: Sizes in bytes and times in seconds, both positive; two sizes or more.

    Returns:
        The line; neither its latency nor its slope is negative.

    Raises:
        ValueError: There are fewer than two sizes.

    Example:
        >>> round(fit_line([(1000, 0.002), (1_001_000, 1.002)]).latency_s, 9)
        0.001
    """
    if len({size for size, _ in points}) < 2:
        raise ValueError("two sizes are needed")
    u = [1 / seconds for _, seconds in points]
    v = [size / seconds for size, seconds in points]
    uu, uv, vv = _dot(u, u), _dot(u, v), _dot(v, v)
    su, sv = sum(u), sum(v)
    determinant = uu * vv - uv * uv
    latency = (su * vv - sv * uv) / determinant
    slope = (sv * uu - su * uv) / determinant
    if latency < 0:
        latency, slope = 0.0, sv / vv
    elif slope <= 0:
        # Times do not grow with sizes: the rate is at least that of the largest tensor.
        latency = su / uu
        size, seconds = max(points)
        slope = seconds / size
    return Line(latency, 1 / slope)


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
