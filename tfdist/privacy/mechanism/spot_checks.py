"""Checks during training that the examples of a batch do not depend on each other.

Before training, `independence` has checked a few rows. A layer may mix examples only in larger
batches, after some steps, or once its weights have grown. So at the first step of each epoch,
and at a few random steps, four rows of the batch are computed again alone. If they add another
gradient than in the batch, the step is not made and training ends.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfdist._keras import ReplicaBatch, RowKeys
from tfdist._keras import layers as keras_layers
from tfdist.privacy.mechanism.contributions import Added, added, is_same, mixes, tolerance_for

Tensor = Any
MARK = "tfdist: examples depend on each other"
_ROWS = 4
_COARSE = 1e-2
# More than before training, which must not end because of rounding: gradients of trained models
# are differences of almost equal numbers.
_LEAST_TOLERANCE = 1e-3
_LEAST_PERIOD = 16  # the least number of steps between two checked first steps of epochs
_MEAN_PERIOD = 128  # the mean number of steps between random checks: 1 % of the time


class SpotChecks:
    """Compares some rows of a replica's batches with the same rows alone.

    Args:
        model: A compiled, built `keras.Model`.
        strategy: The strategy on whose replicas the model trains.
        most: The most rows that are computed at once. None is no limit.
    """

    def __init__(self, model: Any, strategy: Any, max_rows: int | None) -> None:
        self._model, self._strategy, self._max_rows = model, strategy, max_rows
        with keras_layers.in_float32(model):
            self._tolerance = max(tolerance_for(model), _LEAST_TOLERANCE)
        if tf.config.list_physical_devices("GPU"):
            # GPUs may round products of other shapes differently (TensorFloat-32).
            self._tolerance = max(self._tolerance, _COARSE)
        with tf.init_scope(), tf.device("CPU:0"):
            self._period = tf.Variable(tf.ones([], tf.int64), trainable=False)
            self._failed = tf.Variable(False, trainable=False)

    def begin(self, steps: int | None) -> None:
        """Begins a `fit`.

        Args:
            steps: The steps of an epoch, or None if unknown.
        """
        steps = steps or _LEAST_PERIOD
        # Whole epochs: the first step of an epoch is due, but not more often than every 16
        # steps.
        self._period.assign(-(-_LEAST_PERIOD // steps) * steps)
        self._failed.assign(False)

    def check(
        self,
        data: Any,
        batch: ReplicaBatch,
        stopping: Tensor,
        step: Tensor,
        l2_norm_clip: Any,
    ) -> tuple[Any, Tensor]:
        """Compares rows in some steps. A step whose rows differ is not made.

        Args:
            data: `x`, `y` and `sample_weight` of a replica's batch.
            batch: Its description, with the keys of the rows.
            stopping: The worker's signals to the other workers, see `StopState`.
            step: The number of steps of this `fit` before this one, by tfdist's own count.
            l2_norm_clip: The clipping norm of this step.

        Returns:
            `data`, and `stopping`, which requests a stop if the rows depend on each other.
        """
        assert batch.keys is not None
        has_passed = tf.cond(
            self._is_due(batch.keys, step) & (batch.rows > 1),
            lambda: self._passes(data, batch, l2_norm_clip),
            lambda: tf.constant(True),
        )
        if self._strategy.place.num_workers == 1:
            # A single worker can fail at once: `data` cannot be read before the assertion.
            with tf.control_dependencies([tf.debugging.Assert(has_passed, [MARK])]):
                return tf.nest.map_structure(_copied, data), tf.identity(stopping)
        # An assertion on one worker would leave the others waiting in a collective. So all
        # workers learn of the failure by the signals that each step sums, and stop together.
        with tf.device("CPU:0"):
            failed = tf.logical_or(self._failed.read_value(), ~has_passed)
            with tf.control_dependencies([self._failed.assign(failed)]):
                stops = tf.cast(~has_passed, stopping.dtype)
        return data, tf.concat([stopping[:1] + stops, stopping[1:]], 0)

    def requests(self, stopping: Tensor) -> Tensor:
        """Adds a stop to a worker's signals, if a comparison has failed.

        Args:
            stopping: As in `check`, whose own result cannot leave a loop.
        """
        if self._strategy.place.num_workers == 1:
            return stopping
        with tf.device("CPU:0"):
            stops = tf.cast(self._failed.read_value(), stopping.dtype)
        return tf.concat([stopping[:1] + stops, stopping[1:]], 0)

    def _is_due(self, keys: RowKeys, step: Tensor) -> Tensor:
        with tf.device("CPU:0"):
            period = self._period.read_value()
        uniform = tf.random.stateless_uniform([], tf.stack([keys.secret[0], step]))
        return (step % period == 0) | (uniform < 1.0 / _MEAN_PERIOD)

    def _passes(self, data: Any, batch: ReplicaBatch, l2_norm_clip: Any) -> Tensor:
        keys = batch.keys
        assert keys is not None
        rows = tf.size(keys.rows)
        if self._max_rows is not None:
            rows = tf.minimum(rows, self._max_rows)
        counting = tf.minimum(tf.cast(batch.rows, tf.int32), rows)
        seed = tf.stack([keys.secret[1], tf.cast(counting, tf.int64)])
        order = tf.argsort(tf.random.stateless_uniform([counting], seed))
        sample = tf.sort(order[: tf.maximum(1, tf.minimum(_ROWS, counting // 2))])
        ones = tf.ones(tf.shape(sample))
        weights = tf.scatter_nd(sample[:, None], ones, [rows])

        norm = tf.convert_to_tensor(l2_norm_clip, tf.float32)

        def compute(data: Any, row_keys: Any, weights: Tensor) -> Added:
            with keras_layers.in_float32(self._model):
                row_keys = RowKeys(row_keys, keys.secret)
                return added(self._model, data, row_keys, weights, norm)

        # The sizes of both batches are not static, so both share one trace.
        added_by = tf.function(compute, autograph=False)
        alone = added_by(_gathered(data, sample), keys.at(sample).rows, ones)
        numbers = tf.range(rows)
        among_all = added_by(_gathered(data, numbers), keys.at(numbers).rows, weights)
        return is_same(among_all, alone, ones, self._tolerance, l2_norm_clip)

    def raise_if_failed(self, error: Exception | None = None) -> None:
        """Ends a training in which a comparison failed, on all workers alike.

        Args:
            error: The error that ended the loop, or None.

        Raises:
            ArgumentError: A comparison failed.
        """
        if error is not None:
            failed = MARK in str(error)
        else:
            failed = any(self._strategy.gather_objects(bool(self._failed.numpy())))
        if failed:
            raise mixes(
                "some examples of a batch added another thing to the gradient when they were "
                "computed by themselves (that step was not made)"
            ) from None


def _gathered(data: Any, rows: Tensor) -> Any:
    return tf.nest.map_structure(
        lambda leaf: leaf if leaf is None else tf.gather(leaf, rows), data
    )


def _copied(leaf: Any) -> Any:
    if leaf is None:
        return None
    copy = tf.identity(leaf)
    if keras_layers.has_mask(leaf):
        keras_layers.give_mask(copy, keras_layers.mask_of(leaf))
    return copy
