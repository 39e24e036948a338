"""A model on a strategy: its state where the replicas are, its functions traced once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tfdist import _keras, data
from tfdist.step.exchange import Exchange, ExchangeMaker
from tfdist.step.functions import make_functions
from tfdist.step.own_step import OwnStep, StepMaker
from tfdist.step.signals import Stop
from tfdist.step.state import TrainState, optimizers_of, variables_of
from tfdist.strategies.base import Functions, Place, Strategy
from tfdist.strategies.session import current
from tfdist.strategies.whole import as_whole
from tfdist.watchdog import here


@dataclass
class Prepared:
    """A model's functions on a strategy, kept with it so that they are traced once."""

    model: Any
    strategy: Strategy
    place: Place
    compiled_state: tuple[Any, ...]
    state: TrainState
    placed_variables: contextlib.AbstractContextManager[None]
    functions: Functions
    stop: Stop
    own_step: OwnStep | None = None
    maker: StepMaker | None = None
    exchange: Exchange | None = None
    exchange_maker: ExchangeMaker | None = None
    _runs: bool = field(default=False, init=False)

    def fits(self, model: Any, strategy: Strategy) -> bool:
        """Tells whether the model was compiled or rebuilt since, or moved elsewhere."""
        return (
            self.strategy is strategy
            and self.place == strategy.place
            and _keras.is_compiled_as(model, self.compiled_state)
            and (self.strategy.is_plain or self.state.is_of(model))
        )

    def begin_training(self) -> None:
        """Brings what an extension keeps between steps to where a training begins."""
        if self.exchange is not None:
            self.exchange.reset()

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
        timers = self.functions.timers
        here.data_counts = None if timers is None else timers.counted
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.strategy.explaining_losses())
            stack.enter_context(self.placed_variables)
            stack.enter_context(self._functions())
            has_servers = self.strategy.has_servers
            is_extended = self.own_step is not None or self.exchange is not None
            needs_reduction = not self.strategy.is_plain or is_extended
            if has_servers or needs_reduction or source.may_be_empty:
                stack.enter_context(_keras.replicated(has_servers))
            else:
                stack.enter_context(_keras.alone())
            stack.enter_context(self.functions.running())
            for part in (self.own_step, self.exchange):
                if part is not None:
                    stack.enter_context(part.running())
            self._runs = True
            stack.callback(setattr, self, "_runs", False)
            yield

    def _functions(self) -> contextlib.AbstractContextManager[None]:
        return _keras.loop_functions(
            self.model,
            (data.Epoch, data.Share),
            train_function=here.recording(self.functions.train, "training"),
            test_function=here.recording(self.functions.test, "validation"),
            predict_function=here.recording(self.functions.predict, "prediction"),
        )


def prepare(
    model: Any,
    strategy: Strategy,
    *,
    for_training: bool = False,
    maker: StepMaker | None = None,
    exchange_maker: ExchangeMaker | None = None,
) -> Prepared:
    """Gives a model's functions on a strategy, making them when it has none that fit.

    Args:
        model: A built `keras.Model`.
        strategy: Where its replicas are.
        for_training: Whether the train function will be used.
        maker: Of the step that takes the place of Keras's, if there is one.
        exchange_maker: Of what is put around the reduction, if something is.
    """
    previous = _keras.attached(model).prepared
    usable = previous is not None and previous.fits(model, strategy)
    if usable and (
        not for_training or (previous.maker, previous.exchange_maker) == (maker, exchange_maker)
    ):
        return previous  # type: ignore[no-any-return]
    stop = Stop()
    _keras.attached(model).clip_optimizer = None
    own_step = None if maker is None else maker.make(model, strategy)
    exchange = _exchange(previous, model, strategy, exchange_maker)
    of_extensions = () if exchange is None else tuple(exchange.state)
    state = TrainState(tuple(variables_of(model)), of_extensions)
    # Where each process computes whole batches, all have the chief's residuals, too.
    agreed = state.variables if as_whole(strategy) else state.replicated
    prepared = Prepared(
        model,
        strategy,
        strategy.place,
        _keras.compiled_state(model),
        state,
        strategy.hold(state.variables, optimizers_of(model)),
        make_functions(model, strategy, stop, agreed, own_step, exchange),
        stop,
        own_step,
        maker,
        exchange,
        exchange_maker,
    )
    _keras.attached(model).prepared = prepared
    return prepared


def _exchange(
    previous: Prepared | None, model: Any, strategy: Strategy, maker: ExchangeMaker | None
) -> Exchange | None:
    """Makes what is put around the reduction; one with state outlives a change of replicas."""
    if maker is None:
        return None
    if (
        previous is not None
        and previous.exchange is not None
        and previous.exchange_maker == maker
    ):
        is_same = _keras.is_compiled_as(
            model, previous.compiled_state
        ) and previous.state.is_of(model)
        if previous.exchange.state and is_same:
            return previous.exchange
    exchange = maker.make(model, strategy)
    alone = strategy.place.num_replicas == 1
    return None if alone and not exchange.acts_alone else exchange


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
        _keras.attached(model).scope = scope
    scope = _keras.attached(model).scope
    is_open = isinstance(strategy, str) and strategy == "auto"
    if scope is None or not is_open or not current().strategy.is_plain:
        return strategy
    return scope if scope.num_replicas_in_sync > 1 else strategy
