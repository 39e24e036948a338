"""What stands between a worker's train step and its optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfdist import _keras
from tfdist._keras import parts
from tfdist._keras.served import stateful
from tfdist.strategies.parameter_server.ledger import MOST_UPDATES, Ledger

Tensor = Any


class Updates:
    """Sends gradients to their servers, and applies them there.

    Args:
        model: The `keras.Model`.
        ledger: The first server's.
        number: Scalar int64 tensor, of the step.
    """

    def __init__(self, model: Any, ledger: Ledger, number: Tensor) -> None:
        self._ledger = ledger
        self._number = number
        self._at_once = _keras.has_own_train_step(model)
        self._waiting: list[Callable[[], None]] = []
        self._sent: list[Tensor] = []
        self._applied = 0

    def scale(self, optimizer: Any, loss: Tensor) -> Tensor:
        """Leaves the loss: a step's batch is the whole of it."""
        return loss

    def apply(
        self,
        optimizer: Any,
        grads: list[Tensor],
        update: Callable[[list[Tensor]], None],
        variables: Sequence[Any],
    ) -> None:
        """Sends gradients to their servers; applies them at the end of the step, or now."""
        sent = [_sent(g, v) for g, v in zip(grads, variables, strict=True)]
        self._sent += [s for s in sent if s is not None]
        self._waiting.append(lambda: update(sent))
        if self._at_once:
            self.finish(lambda: None)

    def finish(self, change: Callable[[], None]) -> None:
        """Applies what waits, with a change that belongs to it."""
        waiting, self._waiting = self._waiting, []

        def everything() -> None:
            for update in waiting:
                update()
            change()

        if self._applied == MOST_UPDATES:
            raise ValueError(f"A train step may have at most {MOST_UPDATES - 1} updates.")
        leaves = tf.nest.flatten(self._sent, expand_composites=True)
        with stateful(), tf.control_dependencies(leaves):
            self._ledger.once(self._number, self._applied, everything)
        self._applied += 1


def _sent(gradient: Tensor, variable: Any) -> Tensor:
    """Moves a gradient to where it will be applied, before anything is locked."""
    if gradient is None:
        return None
    value = variable._value
    if isinstance(value, parts.Split):
        sent = []
        for part, rows in zip(value.parts, value.cut(gradient), strict=True):
            with tf.device(part.device):
                sent.append(tf.nest.map_structure(tf.identity, rows, expand_composites=True))
        return value.join(sent)
    with tf.device(value.device):
        return tf.nest.map_structure(tf.identity, gradient, expand_composites=True)
