"""A model on a strategy: its state where the replicas are, its functions traced once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tfdist import _keras, data
from tfdist.privacy.adaptive import forget
from tfdist.privacy.settings import Mechanism
from tfdist.privacy.step import PrivateStep
from tfdist.step.composition import found_in_steps
from tfdist.step.functions import Stop, make_functions
from tfdist.strategies.base import Functions, Place, Strategy
from tfdist.strategies.session import current
from tfdist.watchdog import here

_MEMORY = "_tfdist_prepared"
_SCOPE = "_tfdist_scope"


@dataclass
class Prepared:
    """A model's functions on a strategy, kept with it so that they are traced once."""

    model: Any
    strategy: Strategy
    place: Place
    compiled_state: tuple[Any, ...]
    variables: list[Any]
    held: contextlib.AbstractContextManager[None]
    functions: Functions
    stop: Stop
    private: PrivateStep | None = None
    _runs: bool = field(default=False, init=False)

    def trains(self, mechanism: Mechanism | None) -> bool:
        """Tells whether the train function does what a mechanism says, or is a plain one."""
        return mechanism == (None if self.private is None else self.private.mechanism)

    def fits(self, model: Any, strategy: Strategy) -> bool:
        """Tells whether the model was compiled or rebuilt since, or moved elsewhere."""
        return (
            self.strategy is strategy
            and self.place == strategy.place
            and _keras.is_compiled_as(model, self.compiled_state)
            and (self.strategy.is_plain or _ids(self.variables) == _ids(variables_of(model)))
        )

    @contextlib.contextmanager
    def running(self, source: data.Source) -> Iterator[None]:
        """Lets Keras's loop run the functions, and gives a plain model back.

        Args:
            source: The data they run on.
        """
        if self._runs:  # a callback evaluates the model that trains
            with self._functions():
                yield
            return
        stop = self.stop
        stop.requested = stop.agreed = stop.members_changed = stop.leaving = False
        marks = self.functions.marks
        here.counted = None if marks is None else marks.counted
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.strategy.explaining_losses())
            stack.enter_context(self.held)
            stack.enter_context(self._functions())
            has_servers = self.strategy.has_servers
            several = not self.strategy.is_plain or self.private is not None
            if has_servers or several or source.may_be_empty:
                stack.enter_context(_keras.replicated(has_servers))
            else:
                stack.enter_context(_keras.alone())
            stack.enter_context(self.functions.running())
            self._runs = True
            stack.callback(setattr, self, "_runs", False)
            yield

    def _functions(self) -> contextlib.AbstractContextManager[None]:
        return _keras.loop_functions(
            self.model,
            (data.Epoch, data.Share),
            train_function=here.making(self.functions.train, "training"),
            test_function=here.making(self.functions.test, "validation"),
            predict_function=here.making(self.functions.predict, "prediction"),
        )


def prepare(
    model: Any,
    strategy: Strategy,
    *,
    for_training: bool = False,
    mechanism: Mechanism | None = None,
) -> Prepared:
    """Gives a model's functions on a strategy, making them when it has none that fit.

    Args:
        model: A built `keras.Model`.
        strategy: Where its replicas are.
        for_training: Whether the train function will be used.
        mechanism: What private training does to the gradients.
    """
    known = vars(model).get(_MEMORY)
    usable = known is not None and known.fits(model, strategy)
    if usable and (not for_training or known.trains(mechanism)):
        return known  # type: ignore[no-any-return]
    stop = Stop()
    forget(model)
    private = None if mechanism is None else PrivateStep(model, mechanism, strategy)
    variables = variables_of(model)
    prepared = Prepared(
        model,
        strategy,
        strategy.place,
        _keras.compiled_state(model),
        variables,
        strategy.hold(variables, optimizers_of(model)),
        make_functions(model, strategy, stop, variables, private),
        stop,
        private,
    )
    vars(model)[_MEMORY] = prepared
    return prepared


def scoped(model: Any, strategy: Any) -> Any:
    """Takes a model out of the scope that it was made in, and remembers whose it was.

    Args:
        model: A `keras.Model`.
        strategy: As in `fit`.

    Returns:
        The strategy of the scope, if it has several replicas and none was named or chosen; else
        `strategy`.
    """
    scope = _keras.scope_of(model)
    if scope is not None:
        _keras.leave_scope(model, variables_of(model), optimizers_of(model))
        vars(model)[_SCOPE] = scope
    scope = vars(model).get(_SCOPE)
    is_open = isinstance(strategy, str) and strategy == "auto"
    if scope is None or not is_open or not current().strategy.is_plain:
        return strategy
    return scope if scope.num_replicas_in_sync > 1 else strategy


def _ids(things: list[Any]) -> list[int]:
    return [id(thing) for thing in things]


def optimizers_of(model: Any) -> list[Any]:
    """Lists a model's optimizers, those that only its steps know of included; each once.

    Args:
        model: A `keras.Model`.
    """
    found = [optimizer for step in found_in_steps(model) for optimizer in step.optimizers]
    return _keras.with_nested([*_keras.optimizers_of(model), *found])


def variables_of(model: Any) -> list[Any]:
    """Lists all state of a model: weights, seeds, optimizers', metrics'; each once.

    Args:
        model: A built `keras.Model`.
    """
    optimizers = optimizers_of(model)
    parts = [model.variables, *(o.variables for o in optimizers)]
    parts += [_keras.trained_variables(o) for o in optimizers]
    if model.compiled:
        parts.append(_keras.metric_variables(model))
    parts += [step.variables for step in found_in_steps(model)]
    return list({id(v): v for part in parts for v in part}.values())
