"""Samplers: which examples make up a global step, as a function of the seed and the step.

Nothing else decides it: not a worker's history, its rank, or the number of workers. So
every replica finds the same rows, takes its slice, and a run that is resumed at step t,
on any number of workers, goes on with the examples it would have seen. A sampler deals in
row numbers, as NumPy arrays; it never sees the data.
"""

from __future__ import annotations

import abc
import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


class Sampler(abc.ABC):
    """Chooses the rows of each global step.

    Example:
        >>> from dataclasses import dataclass
        >>> import numpy as np
        >>> @dataclass(frozen=True)
        ... class WithReplacement(Sampler):
        ...     def rows(self, step, *, num_rows, batch_size, seed):
        ...         rng = np.random.default_rng((seed, step))
        ...         return rng.integers(num_rows, size=batch_size)
        >>> WithReplacement().rows(5, num_rows=10, batch_size=4, seed=0).shape
        (4,)

    Attributes:
        may_be_empty: Whether a step may have no rows: then it updates with gradients of 0.
    """

    may_be_empty: ClassVar[bool] = False

    def steps_per_epoch(self, num_rows: int, batch_size: int) -> int:
        """Says how many steps make an epoch.

        Args:
            num_rows: Examples in the data, at least 1.
            batch_size: Examples of a full global batch, at least 1.

        Returns:
            Steps until every example was drawn once; the last batch may be smaller.
        """
        return -(-num_rows // batch_size)

    @abc.abstractmethod
    def rows(self, step: int, *, num_rows: int, batch_size: int, seed: int) -> Rows:
        """Gives the rows of one global batch.

        Args:
            step: The steps before this one since training began.
            num_rows: Examples in the data.
            batch_size: Examples of a full global batch.
            seed: Another seed, below 2**63, gives another order.

        Returns:
            int64 array of shape [n], values in [0, num_rows); n >= 1, unless the sampler
            sets `may_be_empty`.
        """

    def batches(
        self, first: int, count: int, *, num_rows: int, batch_size: int, seed: int
    ) -> list[Rows]:
        """Gives the rows of several steps; override it where together is cheaper.

        Args:
            first: The first step.
            count: How many steps.
            num_rows: As in `rows`.
            batch_size: As in `rows`.
            seed: As in `rows`.
        """
        settings = {"num_rows": num_rows, "batch_size": batch_size, "seed": seed}
        return [self.rows(step, **settings) for step in range(first, first + count)]


@dataclass(frozen=True)
class Sequential(Sampler):
    """Takes rows in the order they have."""

    def rows(self, step: int, *, num_rows: int, batch_size: int, seed: int) -> Rows:
        """Gives the rows of one global batch; see `Sampler.rows`."""
        start = step % self.steps_per_epoch(num_rows, batch_size) * batch_size
        return np.arange(start, min(start + batch_size, num_rows))


@dataclass(frozen=True)
class Uniform(Sampler):
    """Draws every row once an epoch, in an order of its own each epoch. The default.

    The order is a pseudo-random permutation, evaluated where it is needed; see `permute`.

    Args:
        by_batch: Keep the rows of a batch together and shuffle the batches, as Keras's
            `shuffle="batch"` does, for data that is slow to read out of order.
    """

    by_batch: bool = False

    def rows(self, step: int, *, num_rows: int, batch_size: int, seed: int) -> Rows:
        """Gives the rows of one global batch; see `Sampler.rows`."""
        return self.batches(step, 1, num_rows=num_rows, batch_size=batch_size, seed=seed)[0]

    def batches(
        self, first: int, count: int, *, num_rows: int, batch_size: int, seed: int
    ) -> list[Rows]:
        """Gives the rows of several steps, permuting each epoch's positions at once."""
        steps = self.steps_per_epoch(num_rows, batch_size)
        found: list[Rows] = []
        while len(found) < count:
            epoch, start = divmod(first + len(found), steps)
            stop = min(steps, start + count - len(found))
            key = (seed, epoch)
            if self.by_batch:
                chosen = permute(np.arange(start, stop), steps, key)
                edges = [(b * batch_size, min((b + 1) * batch_size, num_rows)) for b in chosen]
                found += [np.arange(begin, end) for begin, end in edges]
            else:
                positions = np.arange(start * batch_size, min(stop * batch_size, num_rows))
                rows = permute(positions, num_rows, key)
                found += np.split(rows, range(batch_size, len(rows), batch_size))
        return found


_SMALL = 2**16
_ROUNDS = 8


def permute(positions: Rows, size: int, key: tuple[int, int]) -> Rows:
    """Evaluates a pseudo-random permutation of range(size) at some positions.

    Up to 65536 values it is a drawn one, kept for the next call. Beyond, it is a Feistel
    network on the bits of the position, applied again while the result is not below `size`:
    a bijection that needs no memory, however large `size` is (Mitchell et al.,
    "Bandwidth-optimal random shuffling for GPUs", ACM TOPC 2022, section 4; Black and
    Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).

    Args:
        positions: int64 array, values in [0, size).
        size: How many values are permuted, at most 2**62.
        key: Two whole numbers from 0 on that choose the permutation.

    Returns:
        int64 array of the shape of `positions`.
    """
    if size <= _SMALL:
        return _drawn_permutation(size, key)[positions]
    bits = int(size - 1).bit_length()
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS).astype(np.uint32)
    values = _feistel(positions, bits, keys)
    while len(outside := np.flatnonzero(values >= size)):
        values[outside] = _feistel(values[outside], bits, keys)
    return values


@functools.lru_cache(maxsize=4)
def _drawn_permutation(size: int, key: tuple[int, int]) -> Rows:
    # RandomState is frozen: another version of NumPy draws the same, as a Generator need not.
    generator = np.random.RandomState(np.random.Philox(np.random.SeedSequence(key)))
    drawn: Rows = generator.permutation(size)
    return drawn


def _feistel(values: Rows, bits: int, keys: NDArray[np.uint32]) -> Rows:
    """Applies a keyed bijection of range(2**bits): each round changes one half by the other."""
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
    """Hashes 32-bit numbers: a key, two odd multipliers, and a shift between them."""
    mixed = half ^ key
    mixed *= np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0xC2B2AE35)
    mixed >>= np.uint32(32 - bits)
    return mixed


def from_shuffle(shuffle: bool | str) -> Sampler:
    """Translates the `shuffle` argument of `fit`.

    Args:
        shuffle: True, False or "batch".
    """
    if shuffle == "batch":
        return Uniform(by_batch=True)
    return Uniform() if shuffle else Sequential()
