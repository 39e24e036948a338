"""The settings of secure sums, and the whole numbers that are summed."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tfdist.errors import ArgumentError

Tensor = Any
LEAST_WORKERS = 3
_DEFAULTS = {64: (32, 2.0**20), 32: (20, 8.0)}
_EXACT_IN_FLOAT32 = 2.0**24


@dataclass(frozen=True)
class FixedPoint:
    """Numbers as whole multiples of 2^-fraction_bits.

    Attributes:
        bits: Bits of a whole number.
        fraction_bits: Bits after the point.
        max_value: Larger values are clipped.
    """

    bits: int
    fraction_bits: int
    max_value: float

    @property
    def dtype(self) -> Any:
        """The type of the whole numbers."""
        return tf.int64 if self.bits == 64 else tf.int32

    def bits_for(self, replicas: int) -> int:
        """Returns the bits that a sum may need.

        Args:
            replicas: The number of replicas whose numbers are added up.
        """
        largest: int = replicas * math.ceil(self.max_value * 2**self.fraction_bits)
        return 1 + largest.bit_length()

    def encode(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Rounds values.

        Args:
            value: A float64 vector.

        Returns:
            The whole numbers, and how many values were clipped, a scalar int64. Values that
            are not finite become 0, and count as clipped.
        """
        outside = _outside(value, self.max_value)
        finite = tf.where(tf.math.is_finite(value), value, tf.zeros_like(value))
        clipped = tf.clip_by_value(finite, -self.max_value, self.max_value)
        scaled = tf.round(clipped * 2.0**self.fraction_bits)
        number = tf.cast(tf.cast(scaled, tf.int64), self.dtype)
        return number, tf.reduce_sum(outside)

    def decode(self, total: Tensor) -> Tensor:
        """Returns a sum of whole numbers as float64.

        Args:
            total: The sum.
        """
        return tf.cast(total, tf.float64) * 2.0**-self.fraction_bits


@dataclass(frozen=True)
class WideFixedPoint:
    """Numbers as several whole numbers each, for values of which no range is known.

    A value is the sum of its words, times a unit each: the last one's is 2^-fraction_bits, and
    each other one's 2^word_bits times that of the next.

    Attributes:
        words: Whole numbers of 64 bits that a value has.
        word_bits: Bits of each, without the sign. The others are for the sum.
        fraction_bits: Bits after the point.
    """

    words: int
    word_bits: int
    fraction_bits: int
    bits: int = 64

    @property
    def max_value(self) -> float:
        """Larger values have no words."""
        return 2.0 ** (self.words * self.word_bits - self.fraction_bits)

    def bits_for(self, replicas: int) -> int:
        """Returns the bits that a sum of words may need.

        Args:
            replicas: The number of replicas whose numbers are added up.
        """
        largest: int = replicas * 2**self.word_bits
        return 1 + largest.bit_length()

    def encode(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Rounds values.

        Args:
            value: A float64 vector.

        Returns:
            The words of the values, int64 of shape [words + 1, values], and how many values
            have none, since they are too large or not finite: a scalar int64. The last row
            has a 1 for these, and otherwise 0.
        """
        outside = _outside(value, self.max_value)
        rest = tf.where(outside > 0, tf.zeros_like(value), value) / self._units[0]
        words = []
        for _ in range(self.words):
            word = tf.round(rest)
            words.append(tf.cast(word, tf.int64))
            rest = (rest - word) * 2.0**self.word_bits  # exact
        return tf.stack([*words, outside]), tf.reduce_sum(outside)

    def decode(self, total: Tensor) -> Tensor:
        """Returns a sum of words as float64, NaN where a value of the sum has none.

        Args:
            total: The sum, of shape [words + 1, values].
        """
        *words, outside = tf.unstack(total)
        value = tf.zeros_like(words[0], tf.float64)
        for word, unit in zip(words, self._units, strict=True):
            # In this order, what large words cancel takes nothing from small ones.
            value += tf.cast(word, tf.float64) * unit
        return tf.where(tf.equal(outside, 0), value, tf.constant(math.nan, tf.float64))

    @property
    def _units(self) -> list[float]:
        bits = range((self.words - 1) * self.word_bits, -1, -self.word_bits)
        return [2.0 ** (each - self.fraction_bits) for each in bits]


# The state of metrics: sums of losses and counts of rows, up to the largest in float32.
STATE = WideFixedPoint(words=5, word_bits=40, fraction_bits=72)


def _outside(value: Tensor, max_value: float) -> Tensor:
    """Returns 1 for each value that is larger or not finite, otherwise 0, int64.

    Graphs turn `not a <= b` into `a > b`, which is not the same for NaN.
    """
    is_inside = tf.abs(value) <= max_value
    return tf.where(is_inside, tf.constant(0, tf.int64), tf.constant(1, tf.int64))


@dataclass(frozen=True, kw_only=True)
class SecureSum:
    """Secure sums: workers see the sum of all updates, and nothing of a single one.

    Each worker adds numbers to its update that look random, and that cancel in the sum over
    all workers. It agrees on them with each other worker by a key that nobody else can
    compute: k = HKDF(X25519(i, j), training | round | attempt | i | j), and ChaCha20 with the
    key k makes the numbers. Updates are rounded to whole multiples of 2^-fraction_bits and
    added modulo 2^bits, so the masks cancel exactly. Metrics are summed in the same way. All
    workers must complete a round. At least three are needed, since of two the sum tells each
    the other's update.

    `docs/federated.md` says against whom this protects.

    Args:
        bits: 64, or 32 for half the bytes.
        fraction_bits: Bits after the binary point. None is 32 with 64 bits, 20 with 32.
        max_value: Larger values of a worker's update are clipped. `History` has the part of
            clipped values as "secure_sum_clipped". None is 2^20 with 64 bits, 8 with 32.

    Raises:
        ArgumentError: An argument is not valid.

    Example:
        >>> import tfdist
        >>> tfdist.SecureSum().fraction_bits
        32

    Source:
        Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning",
        CCS 2017, section 4.0.1: masking with pairwise keys, where all members stay.
    """

    bits: int = 64
    fraction_bits: int | None = None
    max_value: float | None = None

    def __post_init__(self) -> None:
        if self.bits not in _DEFAULTS or isinstance(self.bits, bool):
            raise ArgumentError(f"`bits` must be 32 or 64. Received: bits={self.bits!r}.")
        fraction_bits, max_value = _DEFAULTS[self.bits]
        if self.fraction_bits is None:
            object.__setattr__(self, "fraction_bits", fraction_bits)
        if self.max_value is None:
            object.__setattr__(self, "max_value", max_value)
        fraction: Any = self.fraction_bits
        is_whole = isinstance(fraction, numbers.Integral) and not isinstance(fraction, bool)
        if not is_whole or not 0 <= fraction < self.bits:
            raise ArgumentError(
                f"`fraction_bits` must be a whole number from 0 to {self.bits - 1}. Received: "
                f"fraction_bits={fraction!r}."
            )
        most: Any = self.max_value
        is_number = isinstance(most, numbers.Real) and not isinstance(most, bool)
        if not is_number or not 0 < most < math.inf:
            raise ArgumentError(
                f"`max_value` must be a number above 0. Received: max_value={most!r}."
            )

    @property
    def of_updates(self) -> FixedPoint:
        """The numbers of a worker's update."""
        assert self.fraction_bits is not None
        assert self.max_value is not None
        return FixedPoint(self.bits, int(self.fraction_bits), float(self.max_value))

    @property
    def of_whole_numbers(self) -> FixedPoint:
        """The numbers of an update that consists of whole numbers already."""
        return FixedPoint(self.bits, 0, _EXACT_IN_FLOAT32)

    def check_width(self, replicas: int) -> None:
        """Refuses sums that could overflow.

        Args:
            replicas: The number of replicas whose numbers are added up.

        Raises:
            ArgumentError: A sum could need more than `bits` bits.
        """
        needed = self.of_updates.bits_for(replicas)
        if needed > self.bits:
            raise ArgumentError(
                "A secure sum must not overflow. Received: "
                f"bits={self.bits}, and {needed} bits that a sum over {replicas} replicas with "
                f"fraction_bits={self.fraction_bits} and max_value={self.max_value:g} may "
                "need. Use fewer `fraction_bits`, or a smaller `max_value`."
            )
        for numbers_ in (self.of_whole_numbers, STATE):
            if numbers_.bits_for(replicas) > numbers_.bits:
                raise ArgumentError(
                    f"A secure sum must have fewer replicas. Received: {replicas}. Use "
                    "bits=64, or fewer workers."
                )
