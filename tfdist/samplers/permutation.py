"""Random orders that are functions of a key, and are computed only where they are needed."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]

DRAWN_UP_TO = 2**16
_ROUNDS = 8


def permute(positions: Rows, size: int, key: tuple[int, ...]) -> Rows:
    """Evaluates a pseudo-random permutation of range(size) at some positions.

    Up to 65536 values, the permutation is drawn as a whole and cached. Larger ones are a
    Feistel network on the bits of the position, which is applied again while its result is
    not below `size`. That is a bijection which needs no memory for any `size` (Mitchell et
    al., "Bandwidth-optimal random shuffling for GPUs", ACM TOPC 2022, section 4; Black and
    Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).

    Args:
        positions: int64 array with values in [0, size).
        size: The number of permuted values, at most 2**62.
        key: Whole numbers from 0 on that choose the permutation.

    Returns:
        int64 array of the shape of `positions`.
    """
    if size <= DRAWN_UP_TO:
        return _drawn_permutation(size, key)[positions]
    bits = int(size - 1).bit_length()
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS).astype(np.uint32)
    values = _feistel(positions, bits, keys)
    # More than half of all values of `bits` bits are below `size`, so each round brings more
    # than half of the rest inside.
    while len(outside := np.flatnonzero(values >= size)):
        values[outside] = _feistel(values[outside], bits, keys)
    return values


def generator(key: tuple[int, ...]) -> np.random.RandomState:
    """Makes a generator of random numbers that depend only on the key.

    NumPy guarantees that `RandomState` draws the same numbers in every version. It gives no
    such guarantee for `Generator`.

    Args:
        key: As in `permute`.
    """
    return np.random.RandomState(np.random.Philox(np.random.SeedSequence(key)))


@functools.lru_cache(maxsize=4)
def _drawn_permutation(size: int, key: tuple[int, ...]) -> Rows:
    permutation: Rows = generator(key).permutation(size)
    return permutation


def _feistel(values: Rows, bits: int, keys: NDArray[np.uint32]) -> Rows:
    """Applies a keyed bijection of range(2**bits); each round changes one half of the bits."""
    low_bits = bits // 2
    low = (values & ((1 << low_bits) - 1)).astype(np.uint32)
    high = (values >> low_bits).astype(np.uint32)
    for number, key in enumerate(keys):
        if number % 2:
            low ^= _top_bits_of_hash(high, key, low_bits)
        else:
            high ^= _top_bits_of_hash(low, key, bits - low_bits)
    joined: Rows = (high.astype(np.int64) << low_bits) | low
    return joined


def _top_bits_of_hash(half: Any, key: np.uint32, bits: int) -> Any:
    """Hashes 32-bit numbers with a key, two odd multipliers, and a shift between them."""
    mixed = half ^ key
    mixed *= np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0xC2B2AE35)
    mixed >>= np.uint32(32 - bits)
    return mixed
