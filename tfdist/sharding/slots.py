"""Variables in parts while a training lasts: the optimizer's, and maybe the weights."""

from __future__ import annotations

import contextlib
import functools
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist import _keras
from tfdist.errors import StrategyError
from tfdist.sharding.cuts import Cut
from tfdist.sharding.ended import all_ended
from tfdist.strategies.base import Strategy

Tensor = Any
_LOST = (
    "tfdist: the weights were in parts on several processes, which cannot join them after an "
    "error. Resume from a checkpoint, or load weights that you saved before."
)


@dataclass
class Slot:
    """A variable, and its parts on this process's replicas.

    While it is in parts, the whole `tf.Variable` is empty: it takes no memory, and functions
    that were traced with it are still valid afterwards. So are the parts at other times.

    Attributes:
        variable: The `keras.Variable`.
        cut: How it is cut.
        gathering: Joins the parts of a weight, which is gathered where it is read. None for an
            optimizer's variable, which has the shape of a part while it is in parts.
        part: The `tf.Variable` of the parts, with a copy on each device of this process.
        whole: The `tf.Variable` of the whole value, while it is in parts.
    """

    variable: Any
    cut: Cut
    gathering: _keras.Gathering | None = None
    part: Any = field(default=None, init=False)
    whole: Any = field(default=None, init=False)
    _backing: Any = field(default=None, init=False)

    @property
    def bytes(self) -> int:
        """Number of bytes of one part."""
        return self.cut.part_size * int(tf.as_dtype(self.variable.dtype).size)

    @property
    def is_whole(self) -> bool:
        """Whether the variable is not in parts now."""
        return self.whole is None

    def take_apart(self) -> None:
        """Lets the parts back the variable."""
        if self.gathering is None:
            backing, shape = self.part, self.cut.part_shape
        else:
            if self._backing is None:
                self._backing = _keras.InParts(
                    self.variable, self.part, self.cut, self.gathering
                )
            backing, shape = self._backing, self.cut.shape
        self.whole = _keras.exchange_value(self.variable, backing, shape)

    def put_together(self, value: Any) -> None:
        """Lets the whole `tf.Variable` back the variable again.

        Args:
            value: Its value, or None if it is lost.
        """
        whole, self.whole = self.whole, None
        if value is None and self.gathering is not None:
            backing = _keras.LostWeight(self.variable, whole)
        else:
            backing = whole
        _keras.exchange_value(self.variable, backing, self.cut.shape)
        _keras.empty(self.part)
        if value is not None:
            _keras.refill(whole, [value])


class Slots:
    """Keeps variables in parts while a training lasts.

    Args:
        strategy: The strategy on whose replicas it trains.
        slots: The variables.
    """

    def __init__(self, strategy: Strategy, slots: Sequence[Slot]) -> None:
        self._strategy = strategy
        self._slots = slots
        self._by_id = {id(slot.variable): slot for slot in slots}
        self._collected: dict[int, Any] = {}

    @contextlib.contextmanager
    def in_parts(self) -> Iterator[None]:
        """Makes a context in which each replica has only its part of each variable.

        Where it ends, all processes gather the parts. If it ends by an error, another process
        may not come to that: then the state of a training on several processes is lost.

        Raises:
            StrategyError: The state was lost in an earlier training.
        """
        self._check_whole()
        token = self._agree()
        try:
            for slot in self._slots:
                self._cut(slot)
            yield
            for slot in self._slots:
                slot.put_together(self.join(slot))
        except BaseException as error:
            is_alone = self._strategy.place.num_workers == 1
            cut = [slot for slot in self._slots if not slot.is_whole]
            are_all = len(cut) == len(self._slots)
            gathers = is_alone or (are_all and all_ended(self._strategy, token, error))
            for slot in cut:
                slot.put_together(self.join(slot) if gathers else None)
            if not gathers and any(slot.gathering is not None for slot in cut):
                error.add_note(_LOST)
            raise

    def _check_whole(self) -> None:
        lost = [
            slot.variable.path
            for slot in self._slots
            if _keras.is_lost(slot.variable)
            or (_keras.is_empty(slot.variable) and _keras.unfilled_value(slot.variable) is None)
        ]
        if lost:
            raise StrategyError(
                "An optimizer must have its state. Received: an optimizer that has lost "
                f"{lost[0]!r} when an earlier training in parts ended by an error. Compile the "
                "model again, or resume from a checkpoint in a new process."
            )

    def _agree(self) -> str:
        """Takes the chief's values, unless an optimizer is new on all workers.

        Returns:
            A text that all processes have for this training alone.
        """
        are_new = [_keras.unfilled_value(slot.variable) is not None for slot in self._slots]
        tokens, news = zip(
            *self._strategy.gather_objects((uuid.uuid4().hex, are_new)), strict=True
        )
        everywhere = zip(*news, strict=True)
        old = [
            s.variable for s, new in zip(self._slots, everywhere, strict=True) if not all(new)
        ]
        for variable in old:
            _keras.fill(variable)
        self._strategy.agree(old)
        return str(tokens[0])

    def _cut(self, slot: Slot) -> None:
        place = self._strategy.place
        value = _keras.unfilled_value(slot.variable)
        numbers = range(place.first_replica, place.first_replica + place.local_replicas)
        if value is None:
            whole = tf.convert_to_tensor(slot.variable)
            parts = [slot.cut.own(whole, number) for number in numbers]
            del whole
        else:
            _keras.note_filled(slot.variable)
            filled = tf.fill(slot.cut.part_shape, tf.cast(value, slot.variable.dtype))
            parts = [filled] * place.local_replicas
        if slot.part is None:
            trainable = slot.gathering is not None and slot.variable.trainable
            slot.part = self._strategy.make_variable(parts[0], slot.variable.name, trainable)
        slot.take_apart()
        _keras.empty(slot.whole)
        _keras.refill(slot.part, parts)

    # --- whole values -------------------------------------------------------------------

    def join(self, slot: Slot) -> Any:
        """Returns a whole value. If there are other processes, all of them must call it.

        Args:
            slot: The variable, in parts.
        """
        with _keras.showing_parts([slot.variable]):
            parts = self._strategy.copies(slot.variable)
        if self._strategy.place.num_workers > 1:
            flat = np.concatenate([np.reshape(part, [-1]) for part in parts])
            with self._strategy.waiting_for("the parts of a variable"):
                parts = list(self._gathered(tf.constant(flat)).numpy())
        return slot.cut.joined_arrays(parts)

    @functools.cached_property
    def _gathered(self) -> Callable[[Tensor], Tensor]:
        strategy = self._strategy
        place = strategy.place

        def gathered(of_process: Tensor) -> Tensor:
            local = tf.reshape(of_process, [place.local_replicas, -1])

            def on_replica(parts: Tensor) -> Tensor:
                number = tf.cast(strategy.replica_id(), tf.int32) - place.first_replica
                return strategy.gather_parts(tf.gather(parts, number))

            return strategy.run(on_replica, local)

        traced: Callable[[Tensor], Tensor]
        traced = tf.function(gathered, autograph=False, reduce_retracing=True)
        return traced

    def collect(self) -> None:
        """Gathers whole values, for the chief to read. All processes must call it."""
        for slot in self._slots:
            whole = self.join(slot)
            if self._strategy.place.is_chief:
                self._collected[id(slot.variable)] = whole

    def drop_collected(self) -> None:
        """Frees what `collect` has gathered."""
        self._collected.clear()

    def read(self, variable: Any) -> Any:
        """Returns the whole value of a variable as an array, if this process can have it.

        Args:
            variable: A variable, in parts or not.

        Raises:
            StrategyError: Other processes have parts of it.
        """
        slot = self._by_id.get(id(variable))
        if slot is None or slot.is_whole:
            return variable.numpy()
        if id(variable) in self._collected:
            return self._collected[id(variable)]
        if self._strategy.place.num_workers == 1:
            return self.join(slot)
        raise StrategyError(
            "A process can read a variable only if it has all of it. Received: a callback "
            f"that reads {variable.path!r}, which is in parts on several processes. "
            "Save by a keras.callbacks.ModelCheckpoint at the end of an epoch, pass "
            "`checkpoint=` to fit, or save after it."
        )
