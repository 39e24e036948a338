"""What is known of the private steps behind a model's weights.

It is kept with the variables, with the layers that have them and with the model. So a model
made of another one's layers has it too, and so has a layer whose weights were replaced, such
as by `quantize`. It is in the files that Keras saves: see `tfdist._keras.saving`.
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

# By itself: this module may be imported while `_keras` is.
from tfdist._keras.saving import carry_in_files
from tfdist.errors import ArgumentError
from tfdist.privacy.accounting.arguments import check_count, check_type
from tfdist.privacy.accounting.ledger import Ledger

_ATTRIBUTE = "_tfdist_spent"
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class History:
    """Private steps that are in a model's weights.

    Attributes:
        ledger: The steps.
        secret: As in `Report`, of what its ledgers do not say.
        uncounted: As `uncounted_steps` in `Report`.
        changes: As in `Report`.
    """

    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    secret: bool = True
    uncounted: int = 0
    changes: int = 0

    def merged(self, other: History) -> History:
        """Gives what both know together.

        Args:
            other: Of the same weights, or of others that are now in the same model.
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
        """Gives it without the steps of a training.

        Args:
            run_id: As in `Phase`.
        """
        return dataclasses.replace(self, ledger=self.ledger.without(run_id))

    def to_dict(self) -> dict[str, Any]:
        """Gives what JSON can hold."""
        return {**vars(self), "ledger": self.ledger.to_dict(), "format": _FORMAT}

    @classmethod
    def from_dict(cls, saved: Any) -> History:
        """Reads what `to_dict` gave.

        Args:
            saved: The dict.

        Raises:
            ArgumentError: It is none.
        """
        check_type("a record of private steps", saved, dict, "a dict")
        if saved.get("format") != _FORMAT:
            raise ArgumentError(
                "What a file says of private steps must be read by the version of tfdist that "
                f"wrote it, or a later one. Received: format {saved.get('format')!r}."
            )
        secret, uncounted, changes = map(saved.get, ("secret", "uncounted", "changes"))
        check_type("secret", secret, bool, "True or False")
        check_count("uncounted", uncounted, 0)
        check_count("changes", changes, 0)
        return cls(Ledger.from_dict(saved.get("ledger")), secret, uncounted, changes)


class RunUnderWay(Protocol):
    """A private training that is under way."""

    def history(self) -> History:
        """Gives what is in the weights now."""

    def absorb(self, history: History) -> None:
        """Takes what a file says that was loaded meanwhile."""


@dataclasses.dataclass
class _Holder:
    """Shared by the variables that were trained together.

    Attributes:
        known: What is known, or the run that knows.
        optimizer: The id of the optimizer then.
        iterations: What it had made then.
    """

    known: History | RunUnderWay
    optimizer: int = 0
    iterations: int = 0

    @property
    def history(self) -> History:
        return self.known if isinstance(self.known, History) else self.known.history()


def of(model: Any) -> History:
    """Gives what is known of a model.

    Args:
        model: A `keras.Model`, or a layer.
    """
    found = History()
    for holder in _holders(model):
        found = found.merged(holder.history)
    return found


def check_idle(model: Any) -> None:
    """Refuses a model that trains privately now: two trainings cannot be counted at once.

    Args:
        model: A `keras.Model`.

    Raises:
        ArgumentError: It does.
    """
    if any(not isinstance(holder.known, History) for holder in _holders(model)):
        raise ArgumentError(
            "A model that trains privately must not be trained by a callback meanwhile: its "
            "steps could not be counted. Received: a `fit` within a `fit`. Train one after the "
            "other, or another model."
        )


def changed_since(model: Any) -> tuple[int, bool]:
    """Tells what other training than the private one has made of a model since.

    Args:
        model: A built `keras.Model`.

    Returns:
        The updates that its optimizer has made, as far as it counts them, and whether weights
        are not what they were.
    """
    updates = 0
    optimizer = getattr(model, "optimizer", None)
    for holder in _holders(model):
        if not isinstance(holder.known, History):
            continue
        made = _iterations(model)
        same = holder.optimizer == id(optimizer)
        updates = max(updates, made - holder.iterations if same else made)
    moved = any(
        vars(v)[_ATTRIBUTE][1] != _digest(v) for v in model.variables if _ATTRIBUTE in vars(v)
    )
    return max(0, updates), moved


def keep(model: Any, known: History | RunUnderWay) -> None:
    """Notes what is known, with the weights as they are.

    Args:
        model: A built `keras.Model`.
        known: What is known, or the run that will know.
    """
    _put(model, _Holder(known, id(getattr(model, "optimizer", None)), _iterations(model)))


@contextlib.contextmanager
def forgotten(model: Any) -> Iterator[None]:
    """Makes a context in which nothing is known of a model; what it makes known goes with it.

    Args:
        model: A `keras.Model`.
    """
    before = [(thing, vars(thing).pop(_ATTRIBUTE, None)) for thing in _places(model)]
    try:
        yield
    finally:
        for thing in _places(model):
            vars(thing).pop(_ATTRIBUTE, None)
        for thing, known in before:
            if known is not None:
                vars(thing)[_ATTRIBUTE] = known


def _put(model: Any, holder: _Holder) -> None:
    for thing in _places(model):
        is_variable = isinstance(thing, keras.Variable)
        vars(thing)[_ATTRIBUTE] = holder, _digest(thing) if is_variable else None


def _places(model: Any) -> list[Any]:
    """Lists all that what is known is kept with: any of them may be trained later."""
    things: list[Any] = [model]
    for layer in _keras.layers_of(model):
        weights = [v for v in layer.variables if not keras_layers.is_seed(v)]
        things += [*weights, layer] if weights else []
    return list({id(thing): thing for thing in things}.values())


def _holders(model: Any) -> Iterator[_Holder]:
    things = [*model.variables, *_keras.layers_of(model)]
    found = [vars(thing)[_ATTRIBUTE][0] for thing in things if _ATTRIBUTE in vars(thing)]
    yield from {id(holder): holder for holder in found}.values()


def _iterations(model: Any) -> int:
    optimizer = getattr(model, "optimizer", None)
    return 0 if optimizer is None else int(optimizer.iterations.numpy())


def _digest(variable: Any) -> bytes:
    value = np.ascontiguousarray(variable.numpy())
    return hashlib.blake2b(value.view(np.uint8).data, digest_size=16).digest()


def _written(model: Any) -> bytes | None:
    """Gives what a file of the model says."""
    history = of(model)
    return json.dumps(history.to_dict()).encode() if history != History() else None


def _read(model: Any, written: bytes) -> None:
    """Takes what the file said that a model was loaded from."""
    history = History.from_dict(json.loads(written))
    running = [h.known for h in _holders(model) if not isinstance(h.known, History)]
    for run in running:
        run.absorb(history)
    if not running:
        keep(model, of(model).merged(history))


carry_in_files("_tfdist_privacy", _written, _read)
