"""The exchange of replicas that each have a part of the optimizer's state, and of weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tfdist import _keras
from tfdist.errors import ArgumentError
from tfdist.sharding.cuts import Cut, cut_of
from tfdist.sharding.division import Division
from tfdist.sharding.slots import Slot, Slots
from tfdist.step.exchange import Contribution, Exchange, Sums
from tfdist.step.state import Sharded, optimizers_of
from tfdist.strategies.base import Strategy
from tfdist.strategies.packing import packs_of

Tensor = Any
_PACK_BYTES = 2**22  # docs/decisions/0018-packs-of-4-mib.md
# The smallest weights stay whole if all of them together have at most this part of the bytes:
# gathering a bias takes about as long as gathering a kernel.
_KEPT_WHOLE = 1 / 64


class ShardedExchange(Exchange):
    """Each replica gets its part of the gradients, and updates its part of the weights.

    A dense gradient is reduced and scattered; the updated parts of a weight are gathered. This
    moves as many bytes as an all-reduce. A sparse gradient is gathered, as without parts, and
    each replica takes its rows. It is a `_keras.Sharding`.

    Args:
        model: A built `keras.Model`.
        strategy: The strategy on whose replicas it trains.
        cuts_weights: Whether weights are in parts too.
        gathers_again: Whether whole weights are freed between the forward and the backward
            pass.
        named: The ids of the weights in parts, or None to choose them by their sizes.
        division: The layers that teams compute, if there are any.
    """

    def __init__(
        self,
        model: Any,
        strategy: Strategy,
        cuts_weights: bool = False,
        gathers_again: bool = False,
        named: set[int] | None = None,
        division: Division | None = None,
    ) -> None:
        self._gathers_again = gathers_again
        self._division = division or Division.none(strategy)
        self._strategy = strategy
        self._model = model
        self._cuts: dict[int, Cut] = {}  # of weights whose gradients are scattered
        self._slot_of: dict[int, Slot] = {}
        self._optimizers: set[int] = set()
        if cuts_weights:
            self._add_weights(named)
        for optimizer in optimizers_of(model):
            if len(_keras.with_nested([optimizer])) > 1 or not optimizer.built:
                continue  # the optimizers that it wraps are in the list too
            self._add(optimizer)
        self._slots = Slots(strategy, list(self._slot_of.values()), gathering=self)

    def _add_weights(self, named: set[int] | None) -> None:
        """Cuts the weights that a map names, or else all but the smallest ones."""
        weights = {id(v): v for v in _keras.weights_of_layers(self._model)}
        for optimizer in optimizers_of(self._model):
            weights |= {id(v): v for v in _keras.trained_variables(optimizer)}
        by_size = sorted(weights.values(), key=_keras.num_bytes)
        left = _KEPT_WHOLE * sum(map(_keras.num_bytes, by_size))
        if named is not None:
            by_size, left = [v for v in by_size if id(v) in named], 0
        for weight in by_size:
            left -= _keras.num_bytes(weight)
            cut = self._new_cut(weight)
            if left < 0 and cut is not None and tf.as_dtype(weight.dtype).is_floating:
                self._slot_of[id(weight)] = Slot(weight, cut, gathering=self)

    def _new_cut(self, weight: Any) -> Cut | None:
        own = self._division.cuts.get(id(weight))
        return own or cut_of(tuple(weight.shape), self._strategy.place.num_replicas)

    def _add(self, optimizer: Any) -> None:
        """Cuts the state of an optimizer."""
        _check(optimizer)
        for weight, variables in _keras.slots_in_parts(optimizer):
            cut = self._new_cut(weight)
            if cut is None or not (variables or id(weight) in self._slot_of):
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
                self._slot_of[id(variable)] = Slot(variable, cut)
        for variable in optimizer.variables:
            if id(variable) not in self._slot_of:
                _keras.fill(variable)

    @property
    def parts(self) -> Sequence[tuple[Any, Sharded]]:
        """The variables in parts."""
        return [(slot.variable, slot.cut.role) for slot in self._slot_of.values()]

    @property
    def part_bytes(self) -> tuple[int, int]:
        """Number of bytes of one replica's parts: of the optimizer's state, and of weights."""
        slots = self._slot_of.values()
        return (
            sum(slot.bytes for slot in slots if slot.gathering is None),
            sum(slot.bytes for slot in slots if slot.gathering is not None),
        )

    @property
    def cuts(self) -> dict[int, Cut]:
        """How each variable in parts is cut, by the id of the `keras.Variable`."""
        return {id(slot.variable): slot.cut for slot in self._slot_of.values()}

    @property
    def division(self) -> Division:
        """The layers that teams compute."""
        return self._division

    @property
    def slots(self) -> Slots:
        """The variables in parts."""
        return self._slots

    @property
    def arrangement(self) -> Hashable:
        """Whether weights are in parts now."""
        return self._slots.are_in_parts

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Makes a context in which the variables are in parts."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._slots.in_parts())
            stack.enter_context(_keras.updating_parts(self))
            stack.enter_context(self._division.computing())
            if self._gathers_again:
                stack.enter_context(_keras.regathered(self._model))
            _keras.register_parts_of_weights(optimizers_of(self._model))
            yield

    # --- the reduction --------------------------------------------------------------------

    def reduce(
        self, strategy: Strategy, contribution: Contribution, phase: Hashable
    ) -> tuple[Sums, Callable[[Tensor], None]]:
        """Sums the gradients. Of a dense one, each replica gets its part of the sum."""
        gradients, variables = contribution.gradients, contribution.variables
        divided = [i for i, v in enumerate(variables) if self.divides(v)]
        dense = [
            i
            for i, (gradient, variable) in enumerate(zip(gradients, variables, strict=True))
            if contribution.is_applied
            and self.takes_parts(variable)
            and not contribution.are_rows[i]
            and not isinstance(gradient, tf.IndexedSlices)
        ]
        cuts = {i: self._cuts[id(variables[i])] for i in dense}
        # Some have been scattered in the backward pass.
        scattered = [i for i in dense if tuple(gradients[i].shape) != cuts[i].part_shape]
        sums = list(gradients)
        # Before the others: the last layers' gradients come first.
        own = self.scatter([cuts[i] for i in scattered], [sums[i] for i in scattered])
        for i, part in zip(scattered, own, strict=True):
            sums[i] = part
        of_teams = self._division.links.sum_over_teams([sums[i] for i in divided])
        for i, gradient in zip(divided, of_teams, strict=True):
            sums[i] = gradient
            if id(variables[i]) not in self._cuts:  # its optimizer takes whole gradients
                (sums[i],) = self.gather([self._division.cuts[id(variables[i])]], [gradient])
        rest = [i for i in range(len(gradients)) if i not in cuts and i not in divided]
        reduced, others = strategy.reduce_step(
            [gradients[i] for i in rest],
            contribution.others,
            contribution.share,
            [variables[i] for i in rest],
        )
        for i, gradient in zip(rest, reduced, strict=True):
            sums[i] = gradient
        return (sums, others), lambda counts: None

    def scatter(self, cuts: Sequence[Cut], wholes: Sequence[Tensor]) -> list[Tensor]:
        """Sums whole tensors over all replicas. The running one gets its part of each sum."""
        own = list(wholes)
        for pack in packs_of(wholes, pack_bytes=_PACK_BYTES):
            stacked = [cuts[i].stacked(wholes[i]) for i in pack]
            summed = self._strategy.sum_of_part(_concatenated(stacked))
            parts = tf.split(summed, [cuts[i].part_size for i in pack])
            for i, part in zip(pack, parts, strict=True):
                own[i] = tf.reshape(part, cuts[i].part_shape)
        return own

    # --- for the replacements in Keras's optimizers -----------------------------------------

    def has_parts(self, optimizer: Any) -> bool:
        """Tells whether some of an optimizer's variables are in parts."""
        return id(optimizer) in self._optimizers

    def cut_of(self, variable: Any) -> Cut | None:
        """Returns the cut of a weight or of an optimizer's variable, or None."""
        slot = self._slot_of.get(id(variable))
        if slot is None or slot.gathering is not None:
            return self._cuts.get(id(variable))
        return slot.cut

    def takes_parts(self, variable: Any) -> bool:
        """Tells whether the optimizer of a weight takes this replica's part of its gradient."""
        return id(variable) in self._cuts and not self.divides(variable)

    def divides(self, variable: Any) -> bool:
        """Tells whether a team of replicas computes with the parts of a weight."""
        return id(variable) in self._division.cuts

    def own_gradient(self, variable: Any, whole: Tensor) -> Tensor:
        """Sums the gradient of a whole weight over a team, and returns the own part."""
        return self._division.own_gradient(variable, whole)

    def counted(self, variable: Any, square: Tensor) -> Tensor:
        """Returns what a part adds to a sum over all replicas, some of which have the same."""
        return self._division.counted(variable, square)

    def replica_id(self) -> Tensor:
        """Returns the number of the running replica's parts."""
        return self._strategy.replica_id()

    def local_numbers(self) -> Sequence[int]:
        """Returns the numbers of the parts of this process."""
        place = self._strategy.place
        return range(place.first_replica, place.first_replica + place.local_replicas)

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
        return self._slots.join(self._slot_of[id(variable)])

    def read(self, variable: Any) -> Any:
        """Returns the whole value of a variable as an array, if this process can have it."""
        return self._slots.read(variable)


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
