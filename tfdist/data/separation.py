"""Checks that no example of a stream comes back earlier than `min_separation` allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist._keras import dataset_orders, pipelines
from tfdist.errors import ArgumentError

Tensor = Any
_MANY = 2**18  # fingerprints in memory; with more rows, a fixed part of all fingerprints
_FEWEST = 8  # different rows of a batch that does not come twice by chance


@dataclass(slots=True)
class _Occurrences:
    """The steps that had rows with the same values.

    Attributes:
        number: The number of the last pass with such rows.
        steps: The steps of this pass.
        before: The steps of the pass before it that had such rows.
    """

    number: int
    steps: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)


class SeparationCheck:
    """Compares the fingerprints of rows and batches with those of earlier steps.

    Different examples may have the same values. So the check compares the first of them in a
    pass with the first in the pass before, the second with the second, and so on. No other
    pairing has larger distances, so data that keeps `min_separation` always passes. Within a
    pass, the check compares whole batches.

    It finds mistakes. It does not find data that was made to deceive it, nor rows that get
    other random numbers each time. So `check_places` refuses shuffles before training.

    Args:
        separation: The least number of steps between two steps with the same example; None if
            each example comes once.
        steps_made: Returns the number of steps that the training has made.
    """

    def __init__(self, separation: int | None, steps_made: Callable[[], int]) -> None:
        self._separation = separation
        self._steps_made = steps_made
        self._number = self._first = 0
        self._rows: dict[int, _Occurrences] = {}
        self._batches: dict[int, int] = {}
        self._every = 1
        self.problem: str | None = None

    def begin_pass(self) -> None:
        """Called before the data is drawn, from its beginning or a checkpoint's position."""
        self._number += 1
        self._first = self._steps_made()
        self._batches = {}

    def watching(self, batches: Any) -> Any:
        """Adds the check to a `tf.data.Dataset` of batches.

        Args:
            batches: The dataset.
        """

        def look(index: Tensor, batch: Any) -> Any:
            fingerprints = _fingerprints(batch)
            if fingerprints is None:
                return batch
            is_good = tf.numpy_function(self._see, [index, fingerprints], tf.bool)
            with tf.control_dependencies([is_good]):
                return tf.nest.map_structure(tf.identity, batch, expand_composites=True)

        pairs = batches.enumerate()
        return pairs.map(tf.autograph.experimental.do_not_convert(look))

    def _see(self, index: np.int64, fingerprints: Any) -> np.bool_:
        """Checks the fingerprints of a batch, uint64 of shape [rows]."""
        step = self._first + int(index)
        whole = hash(fingerprints.tobytes())
        last = self._batches.get(whole)
        self._batches[whole] = step
        if last is not None and len(np.unique(fingerprints)) >= _FEWEST:
            self._compare(last, step, "a batch")
        for fingerprint in fingerprints[fingerprints % np.uint64(self._every) == 0].tolist():
            occurrences = self._rows.setdefault(fingerprint, _Occurrences(self._number))
            if occurrences.number != self._number:
                occurrences.number = self._number
                occurrences.before, occurrences.steps = occurrences.steps, []
            earlier = occurrences.before[len(occurrences.steps) :]
            occurrences.steps.append(step)
            if earlier:
                self._compare(earlier[0], step, "an example")
        while len(self._rows) > _MANY:
            self._every *= 2
            self._rows = {m: s for m, s in self._rows.items() if m % self._every == 0}
        return np.bool_(True)

    def _compare(self, last: int, step: int, subject: str) -> None:
        if self._separation is not None and step - last >= self._separation:
            return
        promised = "once" if self._separation is None else f"every {self._separation} steps"
        # Batches are drawn ahead, so several may fail. The first one is the one to report.
        self.problem = self.problem or (
            "An example must not come back earlier than was promised, or it is less protected "
            f"than epsilon says. Received: {subject} of step {last + 1} again in step "
            f"{step + 1}; promised was {promised} at most. Do not shuffle or repeat the data "
            "set, or pass a `min_separation` that it keeps to."
        )
        raise ArgumentError(self.problem)


def _fingerprints(batch: Any) -> Tensor:
    """Returns a fingerprint of each row of a batch, or None if no leaf has rows."""
    parts = [
        tf.raw_ops.Fingerprint(data=leaf, method="farmhash64")
        for leaf in tf.nest.flatten(batch)
        if isinstance(leaf, tf.Tensor) and leaf.shape.rank not in (None, 0)
    ]
    if not parts:
        return None
    of_rows = tf.raw_ops.Fingerprint(data=tf.concat(parts, 1), method="farmhash64")
    return tf.bitcast(of_rows, tf.uint64)


def check_places(dataset: Any, separation: int | None, comes_again: bool = False) -> None:
    """Refuses a data set in which an example may decide about others, or come too early.

    Args:
        dataset: A `tf.data.Dataset` of batches.
        separation: As in `SeparationCheck`.
        comes_again: Whether the data set is drawn more than once.

    Raises:
        ArgumentError: It may.
    """
    problem = pipelines.misplaced(dataset, separation is not None)
    if problem is not None:
        operation, remedy = problem
        raise ArgumentError(
            "An example of DPFTRL must go into the same batch whatever the others hold, and "
            "once in a pass unless `min_separation` says how often. Received: a "
            f"tf.data.Dataset with {operation}. {remedy}"
        )
    if separation is None:
        return
    reordering = dataset_orders.reordering(dataset, comes_again)
    if reordering is not None:
        data = f"a tf.data.Dataset with {reordering.operation}"
        check_shuffled(data, reordering.remedy, separation, reordering.in_one_batch)


def check_shuffled(data: str, remedy: str, separation: int, in_one_batch: bool) -> None:
    """Refuses a promise that shuffled data cannot keep.

    Args:
        data: The data, as a part of a sentence.
        remedy: What keeps the order, a sentence.
        separation: As in `SeparationCheck`.
        in_one_batch: Whether an example may come twice in a batch.

    Raises:
        ArgumentError: Always, except if the promise is 1 and an example comes once in a batch.
    """
    if separation == 1 and not in_one_batch:
        return
    how, other = "in steps that follow each other", " Or pass min_separation=1."
    if in_one_batch:
        how, other = "twice in a batch", ""
    raise ArgumentError(
        "An example must not come back earlier than was promised, or it is less protected than "
        f"epsilon says. Received: min_separation={separation}, and {data}, by which an example "
        f"may come {how}. {remedy}{other}"
    )
