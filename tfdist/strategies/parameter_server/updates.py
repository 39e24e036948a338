"""What stands between a worker's train step and its optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfdist import _keras
from tfdist._keras.parts import Split, parts_of
from tfdist._keras.served import stateful
from tfdist.strategies.packing import packs_of
from tfdist.strategies.parameter_server.update_log import MOST_UPDATES, UpdateLog

Tensor = Any
LARGEST_PACKED = 2**18  # elements: what packing copies costs less than a call of its own


class ServerUpdates:
    """Sends gradients to their servers, and applies them there.

    Args:
        model: The `keras.Model`.
        ledger: The first server's.
        number: Scalar int64 tensor, of the step.
    """

    def __init__(self, model: Any, ledger: UpdateLog, number: Tensor) -> None:
        self._ledger = ledger
        self._number = number
        self._at_once = _keras.has_own(model, "train_step")
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
        sent = _sent(grads, variables, self._ledger.server)
        self._sent += [s for s in sent if s is not None]
        self._waiting.append(lambda: update(sent))
        if self._at_once:
            self.finish(lambda: None, self._number)

    def finish(
        self, change: Callable[[], None], number: Tensor, needed: Sequence[Tensor] = ()
    ) -> None:
        """Applies what waits, with a change that belongs to it.

        Args:
            change: Assigns variables.
            number: Of the step, on the server already or not.
            needed: What it needs, on the server already.
        """
        waiting, self._waiting = self._waiting, []

        def everything() -> None:
            for update in waiting:
                update()
            change()

        if self._applied == MOST_UPDATES:
            raise ValueError(f"A train step may have at most {MOST_UPDATES - 1} updates.")
        leaves = tf.nest.flatten([self._sent, list(needed)], expand_composites=True)
        with stateful(), tf.control_dependencies(leaves):
            self._ledger.once(number, self._applied, everything)
        self._applied += 1


def sent_together(tensors: Sequence[Tensor], device: str) -> list[Tensor]:
    """Moves tensors to a server; small ones of one type travel as one.

    Args:
        tensors: Dense tensors, or `tf.IndexedSlices`.
        device: The server's.
    """
    moved = list(tensors)
    for indices in packs_of(tensors, LARGEST_PACKED):
        if len(indices) == 1:
            (index,) = indices
            with tf.device(device):
                moved[index] = tf.nest.map_structure(
                    tf.identity, moved[index], expand_composites=True
                )
            continue
        shapes = [moved[index].shape for index in indices]
        flat = tf.concat([tf.reshape(moved[index], [-1]) for index in indices], 0)
        with tf.device(device):
            parts = tf.split(tf.identity(flat), [shape.num_elements() for shape in shapes])
            for index, part, shape in zip(indices, parts, shapes, strict=True):
                moved[index] = tf.reshape(part, shape)
    return moved


def _sent(grads: Sequence[Tensor], variables: Sequence[Any], server: str) -> list[Tensor]:
    """Moves gradients to where they will be applied, before anything is locked."""
    pieces: dict[str, list[tuple[int, int, Tensor]]] = {}
    for index, (gradient, variable) in enumerate(zip(grads, variables, strict=True)):
        if gradient is None:
            continue
        value = _keras.backing_variable(variable)
        rows = value.cut(gradient) if isinstance(value, Split) else [gradient]
        for number, (part, piece) in enumerate(zip(parts_of(variable), rows, strict=True)):
            pieces.setdefault(part.device, []).append((index, number, piece))
    moved: list[dict[int, Tensor]] = [{} for _ in grads]
    for device, there in pieces.items():
        sent = sent_together([piece for *_, piece in there], device)
        for (index, number, _), tensor in zip(there, sent, strict=True):
            moved[index][number] = tensor
    with tf.device(server):
        return [
            _keras.backing_variable(variable).join([found[i] for i in range(len(found))])
            if found and isinstance(_keras.backing_variable(variable), Split)
            else found.get(0)
            for found, variable in zip(moved, variables, strict=True)
        ]
