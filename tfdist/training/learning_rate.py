"""Callbacks that fit the learning rate to a larger batch, for every strategy."""

from __future__ import annotations

import math
from typing import Any

import keras

from tfdist.errors import ArgumentError

_RULES = ("linear", "sqrt")


class RateCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """What both callbacks need.

    Attributes:
        num_replicas: Set by `tfdist.fit`; 1 under Keras's own `fit`.
    """

    num_replicas = 1

    @property
    def rate(self) -> Any:
        """The optimizer's learning rate, a `keras.Variable`.

        Raises:
            ArgumentError: It is a schedule, which has its own idea of each step's rate.
        """
        rate = self.model.optimizer.learning_rate
        if isinstance(rate, keras.Variable):
            return rate
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        given = optimizer.get_config().get("learning_rate")
        kind = given.get("class_name") if isinstance(given, dict) else "function"
        raise ArgumentError(
            f"`{type(self).__name__}` needs an optimizer with a number as learning rate. "
            f"Received: learning_rate={str(kind).strip('_')}, a schedule. Put the factor into "
            "the schedule instead."
        )


class LearningRateScaling(RateCallback):
    """Multiplies the learning rate while `fit` runs, because the batch is larger.

    The linear rule keeps the size of an epoch's updates when their number falls (Goyal et
    al., "Accurate, Large Minibatch SGD", 2017, section 2.1). The square-root rule keeps the
    variance of the updates, and suits Adam (Krizhevsky, "One weird trick", 2014, section 5;
    Malladi et al., "On the SDEs and scaling rules for adaptive gradient algorithms", 2022).

    Args:
        factor: How many times larger the batch is than the one for which the rate was
            chosen; the number of replicas if None, which is right when `batch_size` was
            multiplied by it.
        rule: "linear" or "sqrt".

    Raises:
        ArgumentError: An argument is none of these, or the rate is a schedule.

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
        """Multiplies the rate; `tfdist.fit` lets callbacks that restore one come after."""
        factor = float(self.num_replicas if self.factor is None else self.factor)
        self._applied = factor if self.rule == "linear" else math.sqrt(factor)
        self.rate.assign(self.rate * self._applied)

    def on_train_end(self, logs: Any = None) -> None:
        """Gives the rate back as it was, but for what other callbacks made of it."""
        self.rate.assign(self.rate / self._applied)


class LearningRateWarmup(RateCallback):
    """Raises the learning rate from a small one during the first epochs, step by step.

    A large batch diverges at a large rate while the weights change fast (Goyal et al.,
    2017, section 2.2). SGD's momentum is corrected for the changing rate (section 3,
    remark 2). Callbacks that change or save the rate between epochs see the whole rate.

    Args:
        epochs: How long, from epoch 0 on; may be a fraction.
        start: The part of the rate to begin with; 1 / the number of replicas if None.
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
        self._whole: Any = None  # the rate to arrive at, while another one is set

    def on_train_begin(self, logs: Any = None) -> None:
        """Refuses a schedule before any work."""
        self._whole = None
        _ = self.rate

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Notes where training stands."""
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Sets the rate of this step."""
        if self._epoch >= self.epochs:
            return
        if self._whole is None:
            self._whole = self.rate.numpy()
        factor = self._factor(batch)
        self.rate.assign(self._whole * factor)
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
        """Shows the whole rate to callbacks that change or save it between epochs."""
        if self._whole is not None:
            self.rate.assign(self._whole)
            self._whole = None

    def _factor(self, batch: int) -> float:
        steps = self.params.get("steps") or 1
        progress = min(1.0, max(0.0, self._epoch + batch / steps) / self.epochs)
        start = 1.0 / self.num_replicas if self.start is None else self.start
        return float(start + (1.0 - start) * progress)
