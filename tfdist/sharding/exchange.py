"""The exchange of replicas that each have a part of the optimizer's state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tfdist import _keras
from tfdist.errors import ArgumentError
from tfdist.sharding.cuts import Cut, cut_of
from tfdist.sharding.slots import Slot, Slots
from tfdist.step.exchange import Contribution, Exchange, Sums
from tfdist.step.state import Sharded, optimizers_of
from tfdist.strategies.base import Strategy
from tfdist.strategies.packing import packs_of

Tensor = Any
_PACK_BYTES = 2**22  # docs/decisions/0018-packs-of-4-mib.md


@dataclass(frozen=True)
class ShardedUpdates:
    """Makes the exchange; see `ExchangeMaker`."""

    def make(self, model: Any, strategy: Strategy) -> ShardedExchange:
        """Makes the exchange.

        Args:
            model: A built `keras.Model`.
            strategy: The strategy on whose replicas it trains.
        """
        return ShardedExchange(model, strategy)


class ShardedExchange(Exchange):
    """Each replica gets its part of the gradients, and updates its part of the weights.

    A dense gradient is reduced and scattered; the updated parts of a weight are gathered. This
    moves as many bytes as an all-reduce. A sparse gradient is gathered, as without parts, and
    each replica takes its rows. It is a `_keras.Sharding`.

    Args:
        model: A built `keras.Model`.
        strategy: The strategy on whose replicas it trains.
    """

    def __init__(self, model: Any, strategy: Strategy) -> None:
        self._strategy = strategy
        replicas = strategy.place.num_replicas
        self._cuts: dict[int, Cut] = {}  # of weights whose gradients are scattered
        self._slots: dict[int, Slot] = {}
        self._optimizers: set[int] = set()
        for optimizer in optimizers_of(model):
            if len(_keras.with_nested([optimizer])) > 1 or not optimizer.built:
                continue  # the optimizers that it wraps are in the list too
            _check(optimizer)
            for weight, variables in _keras.slots_in_parts(optimizer):
                cut = cut_of(tuple(weight.shape), replicas)
                if cut is None or not variables:
                    continue
                self._optimizers.add(id(optimizer))
                if _keras.is_elementwise(optimizer):
                    self._cuts[id(weight)] = cut
                elif id(weight) in self._cuts:
                    raise ArgumentError(
                        "A weight must be trained by optimizers of one kind. Received: "
                        f"{weight.path!r} of several optimizers, of which {optimizer.name!r} "
                        "needs whole gradients. Leave `Zero` out."
                    )
                for variable in variables:
                    self._slots[id(variable)] = Slot(variable, cut)
            for variable in optimizer.variables:
                if id(variable) not in self._slots:
                    _keras.fill(variable)
        self._held = Slots(strategy, list(self._slots.values()))

    @property
    def parts(self) -> Sequence[tuple[Any, Sharded]]:
        """The optimizer's variables in parts."""
        return [(slot.variable, slot.cut.role) for slot in self._slots.values()]

    @property
    def part_bytes(self) -> int:
        """Number of bytes of all parts on one replica."""
        return sum(slot.bytes for slot in self._slots.values())

    @property
    def held(self) -> Slots:
        """The optimizer's variables."""
        return self._held

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Makes a context in which the optimizer's variables are in parts."""
        with self._held.in_parts(), _keras.updating_parts(self):
            yield

    # --- the reduction --------------------------------------------------------------------

    def reduce(
        self, strategy: Strategy, contribution: Contribution, phase: Hashable
    ) -> tuple[Sums, Callable[[Tensor], None]]:
        """Sums the gradients. Of a dense one, each replica gets its part of the sum."""
        gradients, variables = contribution.gradients, contribution.variables
        scattered = [
            i
            for i, (gradient, variable) in enumerate(zip(gradients, variables, strict=True))
            if contribution.is_applied
            and id(variable) in self._cuts
            and not contribution.are_rows[i]
            and not isinstance(gradient, tf.IndexedSlices)
        ]
        sums = list(gradients)
        # Before the others: the last layers' gradients come first.
        self._scatter(sums, scattered, [self._cuts.get(id(v)) for v in variables])
        rest = [i for i in range(len(gradients)) if i not in set(scattered)]
        reduced, others = strategy.reduce_step(
            [gradients[i] for i in rest],
            contribution.others,
            contribution.share,
            [variables[i] for i in rest],
        )
        for i, gradient in zip(rest, reduced, strict=True):
            sums[i] = gradient
        return (sums, others), lambda counts: None

    def _scatter(
        self, sums: list[Tensor], scattered: Sequence[int], cuts: Sequence[Cut | None]
    ) -> None:
        """Replaces gradients by this replica's parts of their sums."""
        for pack in packs_of([sums[i] for i in scattered], pack_bytes=_PACK_BYTES):
            indices = [scattered[number] for number in pack]
            chosen = [cut for i in indices if (cut := cuts[i]) is not None]
            stacked = [cut.stacked(sums[i]) for i, cut in zip(indices, chosen, strict=True)]
            own = self._strategy.sum_of_part(_concatenated(stacked))
            parts = tf.split(own, [cut.part_size for cut in chosen])
            for i, cut, part in zip(indices, chosen, parts, strict=True):
                sums[i] = tf.reshape(part, cut.part_shape)

    # --- for the replacements in Keras's optimizers -----------------------------------------

    def has_parts(self, optimizer: Any) -> bool:
        """Tells whether some of an optimizer's variables are in parts."""
        return id(optimizer) in self._optimizers

    def cut_of(self, variable: Any) -> Cut | None:
        """Returns the cut of a weight or of an optimizer's variable, or None."""
        slot = self._slots.get(id(variable))
        return self._cuts.get(id(variable)) if slot is None else slot.cut

    def replica_id(self) -> Tensor:
        """Returns the number of the running replica's parts."""
        return self._strategy.replica_id()

    def packs(self, variables: Sequence[Any]) -> list[list[int]]:
        """Groups variables into packs, whose parts are gathered together."""
        packs: list[list[int]] = [[]]
        size = 0
        for i in reversed(range(len(variables))):  # the last layers' gradients come first
            size += _keras.num_bytes(variables[i])
            if packs[-1] and size > _PACK_BYTES:
                packs.append([])
                size = _keras.num_bytes(variables[i])
            packs[-1].append(i)
        return packs

    def gather(self, cuts: Sequence[Any], parts: Sequence[Tensor]) -> list[Tensor]:
        """Gathers whole tensors from the parts of all replicas."""
        wholes = list(parts)
        for pack in packs_of(parts):  # of one dtype each
            flat = [tf.reshape(parts[i], [-1]) for i in pack]
            stacked = self._strategy.gather_parts(_concatenated(flat))
            sizes = [cuts[i].part_size for i in pack]
            for i, of_one in zip(pack, tf.split(stacked, sizes, 1), strict=True):
                wholes[i] = cuts[i].joined(of_one)
        return wholes

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a small tensor over all replicas."""
        return self._strategy.sum_in_branch(tensor)

    def join(self, variable: Any) -> Any:
        """Returns the whole value of an optimizer's variable. All processes must call it."""
        return self._held.join(self._slots[id(variable)])

    def read(self, variable: Any) -> Any:
        """Returns the whole value of an optimizer's variable as an array."""
        return self._held.read(variable)


def _check(optimizer: Any) -> None:
    """Refuses an optimizer whose code may read state that is in parts."""
    if type(optimizer).__module__.partition(".")[0] not in ("keras", "tfdist"):
        raise ArgumentError(
            "`Zero` needs one of Keras's own optimizers, whose use of their state it knows. "
            f"Received: {type(optimizer).__name__}. Compile with a class of keras.optimizers, "
            "or leave `Zero` out."
        )


def _concatenated(tensors: Sequence[Tensor]) -> Tensor:
    """Joins tensors along their last axis. A single one is not copied."""
    return tensors[0] if len(tensors) == 1 else tf.concat(tensors, -1)
