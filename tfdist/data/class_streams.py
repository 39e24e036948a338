"""Global batches from a stream for each class; a sampler chooses the class of each draw."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist.data import leaves
from tfdist.data.batches import Batches
from tfdist.data.by_class import ByClass, streams
from tfdist.data.epochs import DataPosition
from tfdist.data.source import FOREVER, without_autograph
from tfdist.errors import ArgumentError
from tfdist.samplers import ByQuota, Rows, Sampler

Tensor = Any
_DRAWS_AT_ONCE = 2**15


class ClassStreams(Batches):
    """Global batches drawn from a stream for each class.

    Args:
        data: The data.
        sampler: Chooses the class of each draw.
        batch_size: Examples of a global batch.
        seed: The sampler's seed.
        steps: Steps an epoch, or None for all of the sampler's draws.
        transform: Applied to each batch.
    """

    def __init__(
        self,
        data: ByClass,
        sampler: Sampler,
        batch_size: int,
        seed: int,
        steps: int | None,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        if not isinstance(sampler, ByQuota) or sampler.labels is not None:
            raise ArgumentError(
                "`sampler` must be ClassBalanced, Undersample or Oversample without labels to "
                f"draw from a tf.data.Dataset. Received: a sampler of type "
                f"{type(sampler).__name__}. Let the dataset yield the labels as y."
            )
        self._spec = tf.nest.map_structure(leaves.spec, data.batches()[0].element_spec)
        self._streams, counts = streams(data, steps)
        if counts is None:
            if steps is None or getattr(sampler, "alpha", None) != 1:
                raise ArgumentError(
                    "A dataset that is not counted can be drawn from by ClassBalanced(), and "
                    "with `steps_per_epoch`. Received: a sampler of type "
                    f"{type(sampler).__name__} and steps_per_epoch={steps}."
                )
            edges = np.arange(len(self._streams) + 1) * max(
                steps * batch_size, len(self._streams)
            )
            counts = np.diff(edges // len(self._streams))
            self._lengths = np.full_like(counts, FOREVER)
        else:
            self._lengths = counts
        self._drawing = sampler.of_classes(counts)
        # At most the draws of an epoch: in longer epochs a single draw costs no more.
        self._at_once = min(_DRAWS_AT_ONCE, max(batch_size, self._drawing.draws_per_epoch))
        num_steps = -(-self._drawing.draws_per_epoch // batch_size)
        super().__init__(None if steps else num_steps, steps, transform)
        self.batch_size = batch_size
        self._seed = seed

    spans_passes = True

    def position_after(self, steps: int) -> DataPosition:
        """Returns the position of a new call of `fit`: after the draws of the last epoch."""
        if self.batches is None and self.requested_steps is not None:
            return DataPosition(
                num_drawn=-(-steps // self.requested_steps) * self.requested_steps
            )
        return super().position_after(steps)

    def stream(self, position: DataPosition) -> Any:
        """Builds the stream of global batches from a position on."""
        passes = position.number * (self.batches or 0)
        first = (passes + position.num_drawn) * self.batch_size
        # Each class's stream skips the examples that were drawn before this position.
        rounds = first // self._drawing.draws_per_epoch
        before = self._drawing.quotas * rounds + self._count(
            rounds * self._drawing.draws_per_epoch, first
        )

        def choose(start: np.int64) -> Rows:
            return self._drawing.between(int(start), int(start) + self._at_once, self._seed)

        @without_autograph
        def choose_tensors(start: Tensor) -> Tensor:
            numbers = tf.numpy_function(choose, [start], tf.int64)
            return tf.ensure_shape(numbers, [self._at_once])

        choices = tf.data.Dataset.range(first, FOREVER, self._at_once).map(choose_tensors, 1)
        endless_streams = [
            stream.repeat().skip(int(number))
            for stream, number in zip(self._streams, before % self._lengths, strict=True)
        ]
        examples = tf.data.Dataset.choose_from_datasets(
            endless_streams, choices.prefetch(1).unbatch(), stop_on_empty_dataset=True
        )
        return examples.batch(self.batch_size, drop_remainder=True)

    def spec(self) -> Any:
        """Returns the shapes and dtypes of a batch."""
        return self._spec

    def fingerprint(self) -> str:
        """Returns a text that differs if batches, class sizes or the sampler's draws differ."""
        draws = self._drawing.between(0, self._at_once, self._seed).tobytes()
        digest = hashlib.sha256(self._lengths.tobytes() + draws).hexdigest()[:12]
        return f"{super().fingerprint()} of {len(self._streams)} classes, {digest}"

    def _count(self, begin: int, end: int) -> Rows:
        """Counts the draws of each class in the range from `begin` to before `end`."""
        counts = np.zeros_like(self._lengths)
        for start in range(begin, end, _DRAWS_AT_ONCE):
            stop = min(end, start + _DRAWS_AT_ONCE)
            numbers = self._drawing.between(start, stop, self._seed)
            counts += np.bincount(numbers, minlength=len(counts))
        return counts
