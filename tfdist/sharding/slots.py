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
from tfdist.sharding.ended import all_ended, all_here
from tfdist.strategies.base import Strategy

Tensor = Any
_LOST = (
    "tfdist: the weights were in parts on several processes, which cannot join them after an "
    "error. Resume from a checkpoint, or load weights that you saved before."
)
_ALL_READ_S = 20.0  # processes that run the same script read at about the same time


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
        if self.whole is None:
            self.whole = _keras.backing_variable(self.variable)
        if self.gathering is None:
            _keras.exchange_value(self.variable, self.part, self.cut.part_shape)
        else:
            self.show_whole(self.gathering)

    def show_whole(self, gathering: _keras.Gathering) -> None:
        """Lets the variable have its whole shape. Its value is gathered where it is read.

        Args:
            gathering: Joins the parts.
        """
        if self._backing is None or self._backing.whole is not self.whole:
            self._backing = _keras.InParts(
                self.variable, self.whole, self.part, self.cut, gathering
            )
        _keras.exchange_value(self.variable, self._backing, self.cut.shape)

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
        gathering: Joins the parts of variables that stay in parts.
    """

    def __init__(
        self, strategy: Strategy, slots: Sequence[Slot], gathering: _keras.Gathering
    ) -> None:
        self._strategy = strategy
        self._slots = slots
        self._gathering = gathering
        self._stay = False
        self._is_training = False
        self._token = ""
        self._by_id = {id(slot.variable): slot for slot in slots}
        self._collected: dict[int, Any] = {}

    @contextlib.contextmanager
    def in_parts(self) -> Iterator[None]:
        """Makes a context in which each replica has only its part of each variable.

        Where it ends, all processes gather the parts; but if some had no value before
        (`tfdist.deferred_weights`) and there are several processes, all stay in parts. If it
        ends by an error, another process may not come to that: then the state of a training
        on several processes is lost.

        Raises:
            StrategyError: The state was lost in an earlier training.
        """
        self._check_whole()
        self._token = self._agree()
        try:
            for slot in self._slots:
                if slot.is_whole:
                    self._cut(slot)
                else:  # since an earlier training
                    slot.take_apart()
            self._is_training = True
            yield
            self._end()
        except BaseException as error:
            is_alone = self._strategy.place.num_workers == 1
            cut = [slot for slot in self._slots if not slot.is_whole]
            are_all = len(cut) == len(self._slots)
            if is_alone or (are_all and all_ended(self._strategy, self._token, error)):
                self._end()
            else:
                for slot in cut:
                    slot.put_together(None)
                if any(slot.gathering is not None for slot in cut):
                    error.add_note(_LOST)
            raise
        finally:
            self._is_training = False

    @property
    def are_in_parts(self) -> bool:
        """Whether the variables are in parts now."""
        return self._is_training or any(not slot.is_whole for slot in self._slots)

    def _end(self) -> None:
        for slot in self._slots:
            if self._stay:
                slot.show_whole(self._gathering)
            elif not slot.is_whole:
                slot.put_together(self.join(slot))

    def _check_whole(self) -> None:
        lost = [
            slot.variable.path
            for slot in self._slots
            if slot.is_whole and _is_lost(slot.variable)
        ]
        if lost:
            raise StrategyError(
                "An optimizer must have its state. Received: an optimizer that has lost "
                f"{lost[0]!r} when an earlier training in parts ended by an error. Compile the "
                "model again, or resume from a checkpoint in a new process."
            )

    def _agree(self) -> str:
        """Takes the chief's values, or what makes those that no worker has made yet.

        Returns:
            A text that all processes have for this training alone.
        """
        makers = [_maker_of(slot.variable) for slot in self._slots]
        tokens, of_all = zip(
            *self._strategy.gather_objects((uuid.uuid4().hex, makers)), strict=True
        )
        old = []
        stay = False
        for slot, *of_slot in zip(self._slots, *of_all, strict=True):
            backing = _keras.deferred(slot.variable)
            if _keras.in_parts(slot.variable) is not None:  # since an earlier training
                stay = True
            elif any(maker is None for maker in of_slot):
                old.append(slot.variable)
            elif backing is not None:
                backing.initializer = of_slot[0]
                stay |= slot.gathering is not None
        self._stay |= stay and self._strategy.place.num_workers > 1
        for variable in old:
            _keras.fill(variable)
        self._strategy.agree(old)
        return str(tokens[0])

    def _cut(self, slot: Slot) -> None:
        place = self._strategy.place
        value = _keras.unfilled_value(slot.variable)
        numbers = range(place.first_replica, place.first_replica + place.local_replicas)
        if value is None:
            whole = _taken_value(slot.variable)
            # As copies: TensorFlow's slice would share, and keep, the memory of the whole.
            parts = [np.array(slot.cut.own(whole, number)) for number in numbers]
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
        if self._is_training:
            raise StrategyError(
                "A process can read a variable only if it has all of it. Received: a callback "
                f"that reads {variable.path!r}, which is in parts on several processes. "
                "Save by a keras.callbacks.ModelCheckpoint at the end of an epoch, pass "
                "`checkpoint=` to fit, or save after it."
            )
        # Processes that do not come would leave this one in the gather.
        name = f"read-{self._token}-{list(self._by_id).index(id(variable))}"
        if not all_here(self._strategy, name, _ALL_READ_S):
            raise StrategyError(
                "A variable that stays in parts after `fit` must be read on all processes, "
                f"which each have a part of it. Received: {variable.path!r} is read, and for "
                f"{_ALL_READ_S:.0f} s others did not read it. Let all of them read it, or save "
                "the model."
            )
        return self.join(slot)


def _is_lost(variable: Any) -> bool:
    """Tells whether a variable that is not in parts has no value, and cannot get one."""
    if _keras.in_parts(variable) is not None or _keras.deferred(variable) is not None:
        return False
    is_empty = _keras.is_lost(variable) or _keras.is_empty(variable)
    return is_empty and _keras.unfilled_value(variable) is None


def _maker_of(variable: Any) -> Any:
    """Returns what makes the value of a variable that has none yet: a number, or an object."""
    backing = _keras.deferred(variable)
    return _keras.unfilled_value(variable) if backing is None else backing.initializer


def _taken_value(variable: Any) -> Tensor:
    """Returns the value of a variable, whose `tf.Variable` backs it afterwards.

    The `tf.Variable` stays empty if it is, since a part is all that will be kept.
    """
    backing: Any = _keras.deferred(variable)
    if backing is not None:
        value = backing.initial_value()
    elif (backing := _keras.in_parts(variable)) is not None:
        value = tf.constant(backing.numpy())
        _keras.empty(backing.part)
    else:
        return tf.convert_to_tensor(variable)
    _keras.exchange_value(variable, backing.whole, tuple(value.shape))
    return value
