"""TensorFlow's and NumPy's own random numbers in a step: other ones on each worker.

All workers begin with the same seeds, so that what their scripts draw for data is the same.
What a step draws must differ, or the noise of a batch would come as often as there are workers.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context as _context

_STRIDE = 0x9E3779B1  # far from what users choose


def generator() -> Any:
    """Gives the generator of TensorFlow's seeds: another object after each seeding, or None."""
    return getattr(_context.context(), "_rng", None)


class OwnNoise:
    """The generators of one worker's steps.

    Args:
        worker: Its number; the first one's noise is what one process would draw.
    """

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._numpy: Any = None
        self._tensorflow: Any = None

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Makes a context in which a step is traced, or runs eagerly."""
        if self._worker == 0:
            yield
        elif tf.executing_eagerly():
            with self._swapped():
                yield
        else:
            graph = tf.compat.v1.get_default_graph()
            seed = graph.seed
            graph.seed = None if seed is None else (seed + self._worker * _STRIDE) % 2**31
            try:
                yield
            finally:
                graph.seed = seed

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        theirs: Any = np.random.get_state()
        seeds = generator()
        before = None if seeds is None else seeds.getstate()
        if self._numpy is None:
            seed = (int(theirs[1][0]) + self._worker * _STRIDE) % 2**31
            self._numpy = np.random.RandomState(seed).get_state()
            self._tensorflow = random.Random(seed).getstate()
        np.random.set_state(self._numpy)
        if seeds is not None:
            seeds.setstate(self._tensorflow)
        try:
            yield
        finally:
            self._numpy = np.random.get_state()
            np.random.set_state(theirs)
            if seeds is not None:
                self._tensorflow = seeds.getstate()
                seeds.setstate(before)
