"""Sends a worker's gradients to the servers, and applies the optimizers there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfdist import _keras
from tfdist._keras.parts import Split, parts_of
from tfdist._keras.served import stateful
from tfdist.strategies.packing import packs_of
from tfdist.strategies.parameter_server.update_log import MAX_UPDATES, UpdateLog

Tensor = Any
# Elements. Up to this size, the copy that packing needs costs less than a call of its own.
LARGEST_PACKED = 2**18


class ServerUpdates:
    """Sends gradients to their servers, and applies them there.

    Args:
        model: The `keras.Model`.
        update_log: The log on the first server.
        number: Scalar int64 tensor, the step number.
    """

    def __init__(self, model: Any, update_log: UpdateLog, number: Tensor) -> None:
        self._update_log = update_log
        self._number = number
        self._applies_at_once = _keras.has_own(model, "train_step")
        self._pending_updates: list[Callable[[], None]] = []
        self._gradients: list[Tensor] = []
        self._applied = 0

    def scale(self, optimizer: Any, loss: Tensor) -> Tensor:
        """Returns the loss as it is: a worker computes a whole global batch."""
        return loss

    def apply(
        self,
        optimizer: Any,
        grads: list[Tensor],
        update: Callable[[list[Tensor]], None],
        variables: Sequence[Any],
    ) -> None:
        """Sends gradients to their servers.

        `finish` applies them at the end of the step. In a custom train step they are applied
        now, since the step may read the updated weights.
        """
        on_servers = _to_servers(grads, variables, self._update_log.server)
        self._gradients += [gradient for gradient in on_servers if gradient is not None]
        self._pending_updates.append(lambda: update(on_servers))
        if self._applies_at_once:
            self.finish(lambda: None, self._number)

    def finish(
        self, change: Callable[[], None], number: Tensor, arrivals: Sequence[Tensor] = ()
    ) -> None:
        """Applies the pending updates and a further change in one section.

        Args:
            change: Assigns variables.
            number: The step number, on any device.
            arrivals: Tensors that `change` needs, on the server already.
        """
        updates, self._pending_updates = self._pending_updates, []

        def apply() -> None:
            for update in updates:
                update()
            change()

        if self._applied == MAX_UPDATES:
            raise ValueError(f"A train step may have at most {MAX_UPDATES - 1} updates.")
        # All tensors arrive before the lock is taken, so that it is held only shortly.
        tensors = tf.nest.flatten([self._gradients, list(arrivals)], expand_composites=True)
        with stateful(), tf.control_dependencies(tensors):
            self._update_log.once(number, self._applied, apply)
        self._applied += 1


def move_packed(tensors: Sequence[Tensor], device: str) -> list[Tensor]:
    """Moves tensors to a server. Small tensors of one type are packed into one.

    Args:
        tensors: Dense tensors, or `tf.IndexedSlices`.
        device: The server's device.
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


def _to_servers(grads: Sequence[Tensor], variables: Sequence[Any], server: str) -> list[Tensor]:
    """Moves gradients to the servers of their variables, before the lock is taken."""
    # By server, so that the small gradients of a server travel in one message.
    by_device: dict[str, list[tuple[int, int, Tensor]]] = {}
    for index, (gradient, variable) in enumerate(zip(grads, variables, strict=True)):
        if gradient is None:
            continue
        value = _keras.backing_variable(variable)
        rows = value.cut(gradient) if isinstance(value, Split) else [gradient]
        for number, (part, piece) in enumerate(zip(parts_of(variable), rows, strict=True)):
            by_device.setdefault(part.device, []).append((index, number, piece))
    moved: list[dict[int, Tensor]] = [{} for _ in grads]
    for device, pieces in by_device.items():
        tensors = move_packed([piece for *_, piece in pieces], device)
        for (index, number, _), tensor in zip(pieces, tensors, strict=True):
            moved[index][number] = tensor
    with tf.device(server):
        return [
            _keras.backing_variable(variable).join([parts[i] for i in range(len(parts))])
            if parts and isinstance(_keras.backing_variable(variable), Split)
            else parts.get(0)
            for parts, variable in zip(moved, variables, strict=True)
        ]
