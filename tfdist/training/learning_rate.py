"""Callbacks that adapt the learning rate to a larger batch, for every strategy."""

from __future__ import annotations

import math
from typing import Any

import keras

from tfdist.errors import ArgumentError

_RULES = ("linear", "sqrt")


class RateCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """The base of callbacks that set the learning rate.

    Attributes:
        num_replicas: Number of replicas. `tfdist.fit` sets it; it is 1 in Keras's own `fit`.
    """

    num_replicas = 1

    @property
    def rate(self) -> Any:
        """The optimizer's learning rate, a `keras.Variable`.

        Raises:
            ArgumentError: The learning rate is a schedule, which sets each step's rate itself.
        """
        rate = self.model.optimizer.learning_rate
        if isinstance(rate, keras.Variable):
            return rate
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        config = optimizer.get_config().get("learning_rate")
        kind = config.get("class_name") if isinstance(config, dict) else "function"
        raise ArgumentError(
            f"`{type(self).__name__}` needs an optimizer with a number as learning rate. "
            f"Received: learning_rate={str(kind).strip('_')}, a schedule. Put the factor into "
            "the schedule instead."
        )


class LearningRateScaling(RateCallback):
    """Scales the learning rate during `fit`, for a larger batch.

    The linear rule keeps the total size of an epoch's updates when their number falls (Goyal
    et al., "Accurate, Large Minibatch SGD", 2017, section 2.1). The square-root rule keeps
    the variance of the updates, and suits Adam (Krizhevsky, "One weird trick", 2014, section
    5; Malladi et al., "On the SDEs and scaling rules for adaptive gradient algorithms", 2022).

    Args:
        factor: The batch size divided by the batch size for which you chose the learning
            rate. None takes the number of replicas, for a `batch_size` that you multiplied
            by this number.
        rule: "linear" or "sqrt".

    Raises:
        ArgumentError: An argument is invalid, or the learning rate is a schedule.

    Example:
        >>> import keras, numpy as np, tfdist
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(optimizer=keras.optimizers.SGD(0.25), loss="mse")
        >>> x, y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")
        >>> scaling = tfdist.LearningRateScaling(factor=4, rule="sqrt")
        >>> history = tfdist.fit(model, x, y, callbacks=[scaling], verbose=0)
        >>> float(model.optimizer.learning_rate)
        0.25
    """

    scales_rate_by_replicas = True

    def __init__(self, factor: float | None = None, rule: str = "linear") -> None:
        super().__init__()
        if rule not in _RULES:
            raise ArgumentError(f"`rule` must be one of {_RULES}. Received: rule={rule!r}.")
        if factor is not None and not factor > 0:
            raise ArgumentError(f"`factor` must be above 0. Received: factor={factor!r}.")
        self.factor = factor
        self.rule = rule
        self._applied = 1.0

    def on_train_begin(self, logs: Any = None) -> None:
        """Scales the rate. `tfdist.fit` runs callbacks that restore a rate after this one."""
        factor = float(self.num_replicas if self.factor is None else self.factor)
        self._applied = factor if self.rule == "linear" else math.sqrt(factor)
        self.rate.assign(self.rate * self._applied)

    def on_train_end(self, logs: Any = None) -> None:
        """Removes the factor. Changes by other callbacks remain."""
        self.rate.assign(self.rate / self._applied)


class LearningRateWarmup(RateCallback):
    """Raises the learning rate step by step from a small value, during the first epochs.

    Training with a large batch and a large rate can diverge while the weights change fast
    (Goyal et al., 2017, section 2.2). SGD's momentum is corrected for the changing rate
    (section 3, remark 2). Callbacks that change or save the rate between epochs see the full
    rate.

    Args:
        epochs: Number of epochs, from epoch 0 on. It may be a fraction.
        start: The first rate, as a fraction of the full rate; 1 / the number of replicas if
            None.
        momentum_correction: Whether to scale SGD's velocity as the rate changes.

    Raises:
        ArgumentError: An argument is out of its range, or the rate is a schedule.

    Example:
        >>> import keras, numpy as np, tfdist
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(optimizer=keras.optimizers.SGD(0.5), loss="mse")
        >>> x, y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")
        >>> warmup = tfdist.LearningRateWarmup(epochs=2, start=0.1)
        >>> history = tfdist.fit(model, x, y, epochs=2, callbacks=[warmup], verbose=0)
        >>> float(model.optimizer.learning_rate)
        0.5
    """

    def __init__(
        self, epochs: float = 5, start: float | None = None, momentum_correction: bool = True
    ) -> None:
        super().__init__()
        if not epochs > 0:
            raise ArgumentError(f"`epochs` must be above 0. Received: epochs={epochs!r}.")
        if start is not None and not 0 < start <= 1:
            raise ArgumentError(
                f"`start` must be above 0 and at most 1. Received: start={start!r}."
            )
        self.epochs = epochs
        self.start = start
        self.momentum_correction = momentum_correction
        self._epoch = 0
        self._full_rate: Any = None  # while a smaller rate is set

    def on_train_begin(self, logs: Any = None) -> None:
        """Raises for a schedule before the first step."""
        self._full_rate = None
        _ = self.rate

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Notes the epoch."""
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Sets the rate of this step."""
        if self._epoch >= self.epochs:
            return
        if self._full_rate is None:
            self._full_rate = self.rate.numpy()
        factor = self._factor(batch)
        self.rate.assign(self._full_rate * factor)
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        if (
            self.momentum_correction
            and isinstance(optimizer, keras.optimizers.SGD)
            and optimizer.momentum
        ):
            change = factor / self._factor(batch - 1)
            for velocity in getattr(optimizer, "momentums", ()):  # none before its first step
                velocity.assign(velocity * change)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Sets the full rate for callbacks that change or save it between epochs."""
        if self._full_rate is not None:
            self.rate.assign(self._full_rate)
            self._full_rate = None

    def _factor(self, batch: int) -> float:
        steps = self.params.get("steps") or 1
        progress = min(1.0, max(0.0, self._epoch + batch / steps) / self.epochs)
        start = 1.0 / self.num_replicas if self.start is None else self.start
        return float(start + (1.0 - start) * progress)
