"""A callback that logs epsilon, and ends training before a budget is exceeded."""

from __future__ import annotations

from typing import Any, Protocol

import keras

from tfdist.errors import ArgumentError
from tfdist.privacy.accounting.arguments import check_number
from tfdist.privacy.accounting.ledger import Ledger, most_within
from tfdist.privacy.client_dp import ClientDP
from tfdist.privacy.settings import DPSGD
from tfdist.training import callback_kinds


class AccountedRun(Protocol):
    """The properties of a private `fit` that the callback uses."""

    planned_steps: int

    @property
    def privacy(self) -> DPSGD | ClientDP:
        """The settings."""

    @property
    def steps_made(self) -> int:
        """The number of steps so far, with those of earlier processes."""

    @property
    def restored_steps(self) -> int:
        """The number of steps of earlier processes."""

    def ledger(self, steps: int) -> Ledger:
        """Returns all private steps on the data, with `steps` steps of this `fit`."""


class PrivacyBudget(keras.callbacks.Callback):  # type: ignore[misc]
    """Shows the epsilon spent, and ends training before the step that would exceed a budget.

    For `tfdist.fit(..., privacy=tfdist.DPSGD(...))`. After each epoch `logs`, the progress bar
    and `History` contain "epsilon". It covers all steps on the data, also those of earlier
    `fit`s. It is computed coarsely, and may be some tenths of a percent too large. So training
    may end a few steps early, but never late.

    Args:
        max_epsilon: The largest epsilon of all steps, at the `delta` of the `DPSGD`. None is no
            limit.

    Raises:
        ArgumentError: `max_epsilon` is negative or no number.

    Example:
        >>> import keras, numpy as np, tfdist
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> x, y = np.ones((100, 4), "float32"), np.ones((100, 1), "float32")
        >>> history = tfdist.fit(
        ...     model, x, y, batch_size=10, epochs=50, verbose=0,
        ...     privacy=tfdist.DPSGD(l2_norm_clip=1.0, noise_multiplier=2.0, delta=1e-3),
        ...     callbacks=[tfdist.PrivacyBudget(max_epsilon=1.0)],
        ... )
        >>> max(history.history["epsilon"]) <= 1.0, history.privacy.ledger.steps < 500
        (True, True)
    """

    run: AccountedRun | None = None

    def __init__(self, max_epsilon: float | None = None) -> None:
        super().__init__()
        if max_epsilon is not None:
            check_number("max_epsilon", max_epsilon, 0)
        self.max_epsilon = max_epsilon
        self._affordable: int | None = None
        self._ledger_before: Ledger | None = None

    def _started(self) -> AccountedRun:
        if self.run is None:
            raise ArgumentError(
                "PrivacyBudget must be used in private training. Received: privacy=None. Pass "
                "privacy=tfdist.DPSGD(...) to tfdist.fit."
            )
        return self.run

    def on_train_begin(self, logs: Any = None) -> None:
        """Resets the callback."""
        self._started()
        self._affordable, self._ledger_before = None, None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Finds how many steps the budget allows, after callbacks have restored the model."""
        self._check()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Updates the number if a callback has loaded weights that were trained on the data."""
        self._check()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Ends training if the next steps would exceed the budget."""
        self._update()
        if self._affordable is None:
            return
        steps = self._started().steps_made
        if steps + self.model.steps_per_execution > self._affordable:
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Adds epsilon to the logs."""
        if logs is not None:
            logs["epsilon"] = self._epsilon(self._started().steps_made)
        self.on_train_batch_end(0)

    def _update(self) -> bool:
        """Finds how many steps the budget allows, and returns whether the number is new."""
        run = self._started()
        if self.max_epsilon is None or not run.planned_steps:
            return False
        ledger_before = run.ledger(0)
        if ledger_before is self._ledger_before or ledger_before == self._ledger_before:
            self._ledger_before = ledger_before
            return False
        self._ledger_before = ledger_before
        most_steps = run.planned_steps + run.restored_steps
        self._affordable = most_within(self._epsilon, self.max_epsilon, most_steps)
        return True

    def _check(self) -> None:
        """Refuses to continue if the budget does not allow the next steps."""
        if not self._update():
            return
        run = self._started()
        assert self._affordable is not None
        steps = run.steps_made
        if self._affordable < steps + min(self.model.steps_per_execution, run.planned_steps):
            raise ArgumentError(
                "`max_epsilon` must be large enough for the next steps. Received: "
                f"max_epsilon={self.max_epsilon!r}, with {self._epsilon(steps):.4g} spent "
                "before. Raise it, or add more noise."
            )

    def _epsilon(self, steps: int) -> float:
        run = self._started()
        assert run.privacy.delta is not None
        return run.ledger(steps).epsilon(
            run.privacy.delta,
            accountant=run.privacy.accountant,
            relation=run.privacy.relation,
            coarse=True,
        )


def budgets_among(callbacks: Any) -> list[PrivacyBudget]:
    """Lists the budgets among callbacks.

    Args:
        callbacks: As in `fit`, or a `CallbackList`.
    """
    return [c for c in callback_kinds.listed(callbacks) if isinstance(c, PrivacyBudget)]
