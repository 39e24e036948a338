"""Normal numbers from a key and a counter, compiled where that is faster.

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a counter
into words of 32 random bits; Box and Muller ("A note on the generation of random normal
deviates", 1958) turn three words into two normal numbers.

TensorFlow reads and writes memory once for each operation. XLA fuses all operations into one
loop, in which a processor computes several numbers at once, but only if every operation has a
vector form. Division, logarithm and cosine have none, so polynomials replace them here, and
32-bit words stay in the lower halves of 64 bits. This takes less than half of the time. The
numbers differ from TensorFlow's in the last places of a float64 only.
"""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

Tensor = Any
_PHILOX = tf.random.Algorithm.PHILOX.value
_WORTH_COMPILING = 2**14  # numbers; XLA takes some 0.2 s for each count that it meets
_COLUMNS = 1024  # of the compiled loop: XLA splits its rows over threads

# Of Philox4x32-10, from its paper.
_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85

_LOW = 2**32 - 1
_ONE = 0x3FF0000000000000  # bits of 1.0
_HALF_ROOT = 0x3FE6A09E667F3BCD  # bits of sqrt(1/2)
_QUARTER_TURN = math.pi / 2 * 2.0**-30  # over 2^30


def is_worth_compiling(count: int) -> bool:
    """Returns whether operations on `count` numbers are compiled. All replicas agree on it.

    Args:
        count: How many numbers.
    """
    accelerators = (tf.config.list_logical_devices(kind) for kind in ("GPU", "TPU"))
    return count >= _WORTH_COMPILING and not any(accelerators)


def at_once(count: int) -> int:
    """Rounds a count up to whole rows of the compiled loop, whose result is then not copied.

    Args:
        count: How many numbers are needed.
    """
    row = 2 * _COLUMNS
    return -(-count // row) * row if is_worth_compiling(count) else count


def standard_normal(count: int, key: Tensor, counter: Tensor) -> Tensor:
    """Computes normal numbers from a key and a counter.

    Args:
        count: How many numbers.
        key: uint64 of shape [1].
        counter: uint64 of shape [2], the low word first. The low word counts pairs of numbers.

    Returns:
        float64 tensor of shape [count]. See `from_words`.
    """
    pairs = -(-count // 2)
    if is_worth_compiling(count):
        rows = -(-pairs // _COLUMNS)
        pairs_of_rows = _compiled(key, counter, tf.range(rows, dtype=tf.int64) * _COLUMNS)
        numbers = tf.reshape(tf.bitcast(pairs_of_rows, tf.float64), [-1])
        return numbers if count == at_once(count) else numbers[:count]
    words = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[pairs, 4], key=key, counter=counter, alg=_PHILOX, dtype=tf.uint32
    )
    return from_words(tf.transpose(words)[:3])[:count]


def from_words(words: Tensor) -> Tensor:
    """Computes normal numbers from random words, by Box and Muller's method.

    A radius comes from 64 bits, so the largest one is sqrt(130 ln 2) = 9.49. A normal number
    is beyond it with a probability of less than 2^-64, counting both tails. The direction has
    32 bits.

    Args:
        words: uint32 of shape [3, n].

    Returns:
        float64 tensor of shape [2 n]. The two numbers of a radius are next to each other.
    """
    high, low, turn = tf.unstack(tf.cast(words, tf.float64))
    radius = tf.sqrt(-2.0 * tf.math.log(_uniform(high, low)))
    angle = (turn + 0.5) * _QUARTER_TURN - math.pi / 4
    pairs = tf.stack([radius * tf.cos(angle), radius * tf.sin(angle)], 1)
    return tf.reshape(pairs, [-1])


def _uniform(high: Tensor, low: Tensor) -> Tensor:
    # Uniform numbers near 0 become the tail of the normal distribution. Floats are finest near
    # 0, so the 64 bits are not reflected by 1 - u, which would round the tail away. The shift
    # by half a step keeps the logarithm finite.
    return high * 2.0**-32 + (low * 2.0**-64 + 2.0**-65)


def _pairs(key: Tensor, counter: Tensor, rows: Tensor) -> Tensor:
    """Returns pairs of normal numbers as complex128 of shape [rows, _COLUMNS]."""
    # The columns begin at `counter[0]`, an argument. XLA would compute constant columns while
    # compiling, with all that follows from them, and store the numbers in the program.
    columns = counter[0] + tf.cast(tf.range(_COLUMNS), tf.uint64)
    high, low, turn = _words(key[0], columns + tf.cast(rows, tf.uint64)[:, None], counter[1])
    uniform = _uniform(_as_float(high), _as_float(low))
    radius = tf.sqrt(-2.0 * _log(uniform))
    cosine, sine = _cosine_and_sine(turn)
    # A single result lets XLA use a single loop.
    return tf.complex(radius * cosine, radius * sine)


_compiled = tf.function(_pairs, autograph=False, jit_compile=True)


def _words(key: Tensor, low: Tensor, high: Tensor) -> list[Tensor]:
    """Returns the first three words of Philox4x32-10, each in the lower half of 64 bits."""
    keys = [key & _uint64(_LOW), _upper(key, 32)]
    zeros = tf.zeros_like(low)
    # Upper halves of the 64 bits are arbitrary between rounds, since each product masks them.
    state = [low, _upper(low, 32), zeros + high, zeros + _upper(high, 32)]
    for _ in range(_ROUNDS):
        first, second = (
            (word & _uint64(_LOW)) * _uint64(multiplier)
            for word, multiplier in zip(state[::2], _MULTIPLIERS, strict=True)
        )
        state = [
            _upper(second, 32) ^ state[1] ^ keys[0],
            second,
            _upper(first, 32) ^ state[3] ^ keys[1],
            first,
        ]
        keys = [k + _uint64(step) for k, step in zip(keys, _KEY_STEPS, strict=True)]
    return [word & _uint64(_LOW) for word in state[:3]]


def _log(value: Tensor) -> Tensor:
    """Returns the logarithm of positive, normal float64 numbers, within 5e-16 of itself.

    The logarithm is e ln 2 + ln m, with m from sqrt(1/2) to sqrt(2). ln m is the series of
    2 artanh(s) at s = (m - 1) / (m + 1).
    """
    bits = tf.bitcast(value, tf.uint64)
    exponent = _upper(bits + _uint64(_ONE - _HALF_ROOT), 52)
    mantissa = tf.bitcast(
        bits - tf.bitwise.left_shift(exponent, _uint64(52)) + _uint64(_ONE), tf.float64
    )
    divisor = mantissa + 1.0
    # The line is within 2 % of 1 / divisor. Each of Newton's steps squares the relative error.
    inverse = 0.9786 - 0.2404 * divisor
    for _ in range(4):
        inverse *= 2.0 - divisor * inverse
    s = (mantissa - 1.0) * inverse
    series = _polynomial(s * s, [1 / n for n in range(1, 21, 2)])
    return (_as_float(exponent) - 1023.0) * math.log(2.0) + 2.0 * s * series


def _cosine_and_sine(word: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine of an angle of 32 bits, within 2e-15, by their series."""
    fraction = word & _uint64(2**30 - 1)  # of a quarter turn, from -45 to 45 degrees
    angle = _as_float(fraction) * _QUARTER_TURN - (2.0**29 - 0.5) * _QUARTER_TURN
    signs = [(-1) ** (n // 2) / math.factorial(n) for n in range(17)]
    square = angle * angle
    cosine, sine = _polynomial(square, signs[::2]), angle * _polynomial(square, signs[1::2])
    is_turned = tf.equal(word & _uint64(2**30), _uint64(2**30))
    cosine, sine = tf.where(is_turned, -sine, cosine), tf.where(is_turned, cosine, sine)
    # The highest bit is the sign.
    flip = tf.bitwise.left_shift(_upper(word, 31), _uint64(63))
    turned = [tf.bitcast(tf.bitcast(v, tf.uint64) ^ flip, tf.float64) for v in (cosine, sine)]
    return turned[0], turned[1]


def _polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    value = tf.zeros_like(x) + coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value


def _as_float(word: Tensor) -> Tensor:
    """Converts whole numbers below 2^52 to float64.

    Processors have no vector instruction for it. The bits of 2^52 with a number in the lowest
    bits are the float64 2^52 + number.
    """
    return tf.bitcast(word | _uint64(0x4330000000000000), tf.float64) - 2.0**52


def _upper(word: Tensor, bits: int) -> Tensor:
    return tf.bitwise.right_shift(word, _uint64(bits))


def _uint64(value: int) -> Tensor:
    return tf.constant(value, tf.uint64)
