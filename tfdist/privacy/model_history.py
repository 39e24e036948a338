"""The history of private steps behind a model's weights.

The history is attached to the variables, to the layers that own them and to the model. So it
stays with layers that are used in another model, and with a layer whose weights are replaced,
such as by `quantize`. Files that Keras saves contain it: see `tfdist._keras.saving`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any, Protocol

import keras
import numpy as np

from tfdist import _keras
from tfdist._keras import layers as keras_layers

# A separate import: this module may be imported while `_keras` is being imported.
from tfdist._keras.saving import carry_in_files
from tfdist.errors import ArgumentError
from tfdist.privacy.accounting.arguments import check_count, check_type
from tfdist.privacy.accounting.ledger import Ledger

_ATTRIBUTE = "_tfdist_spent"
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class History:
    """The private steps in a model's weights.

    Attributes:
        ledger: The steps.
        secret: Whether all random numbers that the ledger does not record were secret.
        uncounted: As `uncounted_steps` in `Report`.
        changes: As in `Report`.
    """

    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    secret: bool = True
    uncounted: int = 0
    changes: int = 0

    def merged(self, other: History) -> History:
        """Merges two histories.

        Args:
            other: A history of the same weights, or of other weights of the same model.
        """
        return History(
            self.ledger.merged(other.ledger),
            self.secret and other.secret,
            max(self.uncounted, other.uncounted),
            max(self.changes, other.changes),
        )

    @property
    def is_secret(self) -> bool:
        """Whether all random numbers came from the operating system."""
        return self.secret and self.ledger.secret

    def without(self, run_id: str) -> History:
        """Returns the history without the steps of a training.

        Args:
            run_id: As in `Phase`.
        """
        return dataclasses.replace(self, ledger=self.ledger.without(run_id))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {**vars(self), "ledger": self.ledger.to_dict(), "format": _FORMAT}

    @classmethod
    def from_dict(cls, saved: Any) -> History:
        """Reads the result of `to_dict`.

        Args:
            saved: The dict.

        Raises:
            ArgumentError: `saved` is not such a dict.
        """
        check_type("a record of private steps", saved, dict, "a dict")
        if saved.get("format") != _FORMAT:
            raise ArgumentError(
                "The private steps in a file must be read by the version of tfdist that wrote "
                f"it, or a later one. Received: format {saved.get('format')!r}. Install a "
                "later version of tfdist."
            )
        secret, uncounted, changes = map(saved.get, ("secret", "uncounted", "changes"))
        check_type("secret", secret, bool, "True or False")
        check_count("uncounted", uncounted, 0)
        check_count("changes", changes, 0)
        return cls(Ledger.from_dict(saved.get("ledger")), secret, uncounted, changes)


class RunUnderWay(Protocol):
    """A private training in progress."""

    def history(self) -> History:
        """Returns the history of the current weights."""

    def absorb(self, history: History) -> None:
        """Adds the history of a file that was loaded during the training."""

    def settle(self) -> None:
        """Adds what a callback has done to the weights, before it has ended."""


@dataclasses.dataclass
class _Holder:
    """The history that variables share which were trained together.

    Attributes:
        source: The history, or the training in progress that has it.
        optimizer: The id of the optimizer when the history was attached.
        iterations: The count of that optimizer at that time.
    """

    source: History | RunUnderWay
    optimizer: int = 0
    iterations: int = 0

    @property
    def history(self) -> History:
        return self.source if isinstance(self.source, History) else self.source.history()


def of(model: Any) -> History:
    """Returns the history of a model.

    Args:
        model: A `keras.Model`, or a layer.
    """
    history = History()
    for holder in _holders(model):
        history = history.merged(holder.history)
    return history


def check_idle(model: Any) -> None:
    """Refuses a model in private training. Two trainings cannot be counted at once.

    Args:
        model: A `keras.Model`.

    Raises:
        ArgumentError: The model is in private training.
    """
    if any(not isinstance(holder.source, History) for holder in _holders(model)):
        raise trained_meanwhile("a `fit` within a `fit`")


def trained_meanwhile(received: str) -> ArgumentError:
    """Makes the error about a callback that trains a model in private training.

    Args:
        received: What it does.
    """
    return ArgumentError(
        "A callback must not train the model that is in private training: these steps could "
        f"not be counted. Received: {received}. Train it after this `fit`, or train another "
        "model."
    )


def changed_since(model: Any) -> tuple[int, bool]:
    """Finds changes of a model since its last private training.

    Args:
        model: A built `keras.Model`.

    Returns:
        The number of updates of its optimizer, as far as it counts them, and whether any
        weight has changed.
    """
    updates = 0
    optimizer = getattr(model, "optimizer", None)
    for holder in _holders(model):
        if not isinstance(holder.source, History):
            continue
        iterations = _iterations(model)
        is_same = holder.optimizer == id(optimizer)
        updates = max(updates, iterations - holder.iterations if is_same else iterations)
    attached = [(v, *vars(v)[_ATTRIBUTE]) for v in model.variables if _ATTRIBUTE in vars(v)]
    moved = any(
        known != digest(variable)
        for variable, holder, known in attached
        if isinstance(holder.source, History)  # training in progress notes changes itself
    )
    return max(0, updates), moved


def with_changes(model: Any, history: History, explained: int = 0) -> History:
    """Adds the changes of a model since its last private training, which no ledger has.

    Args:
        model: A built `keras.Model`.
        history: Its history, with steps that are known from elsewhere.
        explained: The updates that `DPSGD.spent` explains, if the model itself has no record.
    """
    updates, is_changed = changed_since(model)
    uncounted = history.uncounted + updates
    if not any(holder.history.ledger.phases for holder in _holders(model)):
        # No private step is in these weights, whatever other processes have made.
        made = _iterations(model) + sum(map(_iterations, _trained_parts(model)))
        uncounted = max(history.uncounted, made - explained)
    changes = history.changes + (is_changed and not updates)
    return dataclasses.replace(history, uncounted=uncounted, changes=changes)


def pass_on(model: Any, copy: Any) -> None:
    """Attaches the history of a model to another model that gets its weights.

    Every function of tfdist that copies weights calls it.

    Args:
        model: A built `keras.Model`.
        copy: The other model, with the copied weights.
    """
    history = with_changes(model, of(model))
    if history != History():
        keep(copy, of(copy).merged(history))


def keep(model: Any, source: History | RunUnderWay) -> None:
    """Attaches a history to a model, with digests of its current weights.

    Args:
        model: A built `keras.Model`.
        source: The history, or the training in progress that has it.
    """
    _attach(model, _Holder(source, id(getattr(model, "optimizer", None)), _iterations(model)))


@contextlib.contextmanager
def forgotten(model: Any) -> Iterator[None]:
    """Detaches a model's history in a context. History of the context is dropped at its end.

    Args:
        model: A `keras.Model`.
    """
    attached = [(owner, vars(owner).pop(_ATTRIBUTE, None)) for owner in _places(model)]
    try:
        yield
    finally:
        for owner in _places(model):
            vars(owner).pop(_ATTRIBUTE, None)
        for owner, value in attached:
            if value is not None:
                vars(owner)[_ATTRIBUTE] = value


def _attach(model: Any, holder: _Holder) -> None:
    for owner in _places(model):
        is_variable = isinstance(owner, keras.Variable)
        vars(owner)[_ATTRIBUTE] = holder, digest(owner) if is_variable else None


def _places(model: Any) -> list[Any]:
    """Lists the objects to which history is attached. Any of them may be trained later."""
    owners: list[Any] = [model]
    for layer in _keras.layers_of(model):
        # Seeds are shared and change in each step, and hold nothing of the data.
        weights = [v for v in layer.variables if not keras_layers.is_seed(v)]
        owners += [*weights, layer] if weights else []
    return list({id(owner): owner for owner in owners}.values())


def _holders(model: Any) -> Iterator[_Holder]:
    owners = [*model.variables, *_keras.layers_of(model)]
    holders = [vars(owner)[_ATTRIBUTE][0] for owner in owners if _ATTRIBUTE in vars(owner)]
    yield from {id(holder): holder for holder in holders}.values()


def _trained_parts(model: Any) -> list[Any]:
    """Lists models within a model that have optimizers of their own, such as a teacher."""
    layers = _keras.layers_of(model)
    parts = [layer for layer in layers if isinstance(layer, keras.Model) and layer is not model]
    own = getattr(model, "optimizer", None)  # a model that is not compiled has none
    return [part for part in parts if getattr(part, "optimizer", None) is not own]


def _iterations(model: Any) -> int:
    optimizer = getattr(model, "optimizer", None)
    return 0 if optimizer is None else int(optimizer.iterations.numpy())


def digest(variable: Any) -> bytes:
    """Returns a fingerprint of a variable's value.

    Args:
        variable: A `keras.Variable`.
    """
    value = np.ascontiguousarray(variable.numpy())
    return hashlib.blake2b(value.view(np.uint8).data, digest_size=16).digest()


def _serialized(model: Any) -> bytes | None:
    """Returns the history for a file of the model, or None if it is empty."""
    for holder in _holders(model):
        if not isinstance(holder.source, History):
            holder.source.settle()
    history = of(model)
    if history == History():
        return None
    # A file has the model's weights as they are now, with all that was done to them.
    return json.dumps(with_changes(model, history).to_dict()).encode()


def _attach_serialized(model: Any, serialized: bytes) -> None:
    """Attaches the history of a file to the model that was loaded from it."""
    history = History.from_dict(json.loads(serialized))
    running = [h.source for h in _holders(model) if not isinstance(h.source, History)]
    for run in running:
        run.absorb(history)
    if not running:
        keep(model, of(model).merged(history))


carry_in_files("_tfdist_privacy", _serialized, _attach_serialized)
