"""Gives each worker its own random numbers of TensorFlow and NumPy, within a step.

All workers have the same seeds, so that their scripts draw the same numbers for data. Within a
step, the numbers must differ. Otherwise all shares of a batch would have the same noise.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context as _context

_STRIDE = 0x9E3779B1  # large, so that no seed meets another seed that a user chooses


def generator() -> Any:
    """Returns TensorFlow's generator of seeds, or None. Each seeding creates a new object."""
    return getattr(_context.context(), "_rng", None)


class OwnNoise:
    """The generators of one worker's steps.

    Args:
        worker: The worker's index. Worker 0 draws the numbers of a single process.
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
        # An eager step draws from the generators themselves. The ops of a traced step get their
        # seeds from the seed of the graph, so that seed is moved instead.
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
        script_state: Any = np.random.get_state()
        seeds = generator()
        script_seeds = None if seeds is None else seeds.getstate()
        if self._numpy is None:
            # Derived from the script's own state, so that a script that seeds NumPy is
            # repeatable.
            seed = (int(script_state[1][0]) + self._worker * _STRIDE) % 2**31
            self._numpy = np.random.RandomState(seed).get_state()
            self._tensorflow = random.Random(seed).getstate()
        np.random.set_state(self._numpy)
        if seeds is not None:
            seeds.setstate(self._tensorflow)
        try:
            yield
        finally:
            self._numpy = np.random.get_state()
            np.random.set_state(script_state)
            if seeds is not None:
                self._tensorflow = seeds.getstate()
                seeds.setstate(script_seeds)
