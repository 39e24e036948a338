"""A model on a strategy: its variables on the replicas, and its functions, traced once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from tfdist import _keras, data
from tfdist.errors import StrategyError
from tfdist.step.exchange import Exchange, ExchangeMaker
from tfdist.step.functions import make_functions
from tfdist.step.own_round import OwnRound, RoundMaker
from tfdist.step.own_step import OwnStep, StepMaker
from tfdist.step.signals import StopState
from tfdist.step.state import TrainState, optimizers_of, variables_of
from tfdist.strategies.base import Functions, Place, Strategy
from tfdist.strategies.session import connected_by, current, is_left_open
from tfdist.strategies.whole import as_whole
from tfdist.watchdog import here


@dataclass
class PreparedModel:
    """A model's functions on a strategy. The model keeps them, so they are traced once.

    Attributes:
        model: The `keras.Model`.
        strategy: The strategy on whose replicas it runs.
        place: The strategy's place at that time. An elastic run changes it.
        compiled_state: Differs if the model has been compiled again.
        state: All variables, with their roles.
        placed_variables: A context in which the variables are on the replicas.
        functions: The functions for Keras's loop.
        stop: The state that the functions share with callbacks.
        own_step: An extension's step, or None.
        maker: The maker of `own_step`.
        exchange: An extension's exchange, or None.
        exchange_maker: The maker of `exchange`.
        own_round: An extension's rounds, or None.
        round_maker: The maker of `own_round`.
    """

    model: Any
    strategy: Strategy
    place: Place
    compiled_state: tuple[Any, ...]
    state: TrainState
    placed_variables: contextlib.AbstractContextManager[None]
    functions: Functions
    stop: StopState
    own_step: OwnStep | None = None
    maker: StepMaker | None = None
    exchange: Exchange | None = None
    exchange_maker: ExchangeMaker | None = None
    own_round: OwnRound | None = None
    round_maker: RoundMaker | None = None
    _runs: bool = field(default=False, init=False)

    def fits(self, model: Any, strategy: Strategy) -> bool:
        """Returns whether the functions still fit: no compile, rebuild or move came since."""
        return (
            self.strategy is strategy
            and self.place == strategy.place
            and _keras.is_compiled_as(model, self.compiled_state)
            and (self.strategy.is_plain or self.state.is_of(model))
        )

    def begin_training(self) -> None:
        """Resets the state that an extension keeps between steps."""
        for part in (self.exchange, self.own_round):
            if part is not None:
                part.reset()

    def end_training(self) -> None:
        """Drops what holds the data of a training: rounds, which no other training can use."""
        if self.own_round is not None:
            # Rounds hold the data of this training, which would stay in memory as long as the
            # model.
            self.functions = replace(self.functions, train=_dropped)
            self.own_round, self.round_maker = None, _Dropped()

    @contextlib.contextmanager
    def running(self, source: data.Source, trains: bool = False) -> Iterator[None]:
        """Lets Keras's loop run the functions. The model is a plain one again afterwards.

        Args:
            source: The data of the call.
            trains: Whether the loop trains.
        """
        if self._runs:  # a callback evaluates the model that trains
            with self._functions():
                yield
            return
        stop = self.stop
        stop.requested = stop.agreed = stop.members_changed = False
        stop.leaving = stop.saving = False
        timers = self.functions.timers
        here.data_counts = None if timers is None else timers.counts
        # The order matters when the contexts end: Keras gets its functions back before the
        # variables leave the replicas, and a lost worker is explained after both.
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.strategy.explaining_losses())
            stack.enter_context(self.placed_variables)
            stack.enter_context(self._functions())
            has_servers = self.strategy.has_servers
            parts = (self.own_step, self.exchange, self.own_round)
            is_extended = any(part is not None for part in parts)
            needs_reduction = not self.strategy.is_plain or is_extended
            if has_servers or needs_reduction or source.may_be_empty:
                stack.enter_context(_keras.replicated(has_servers))
            else:
                stack.enter_context(_keras.alone())
            stack.enter_context(self.functions.running())
            for part in parts:
                if part is not None:
                    stack.enter_context(part.running())
            if trains and self.exchange is not None:
                stack.enter_context(self.exchange.training())
            self._runs = True
            stack.callback(setattr, self, "_runs", False)
            yield

    def _functions(self) -> contextlib.AbstractContextManager[None]:
        return _keras.loop_functions(
            self.model,
            (data.Epoch, data.Share),
            None if self.own_step is None else self.own_step.refuse_other_data,
            train_function=here.recording(self.functions.train, "training"),
            test_function=here.recording(self.functions.test, "validation"),
            predict_function=here.recording(self.functions.predict, "prediction"),
        )


class _Dropped:
    """Stands for the maker of rounds that are not there any more. It equals no other."""

    def make(self, model: Any, strategy: Strategy, exchange: Exchange | None) -> NoReturn:
        """Is never called."""
        raise NotImplementedError


def _dropped(epoch: Any) -> NoReturn:
    raise NotImplementedError


def prepare(
    model: Any,
    strategy: Strategy,
    *,
    for_training: bool = False,
    maker: StepMaker | None = None,
    exchange_maker: ExchangeMaker | None = None,
    round_maker: RoundMaker | None = None,
) -> PreparedModel:
    """Returns a model's functions on a strategy, and makes them if it has none that fit.

    Args:
        model: A built `keras.Model`.
        strategy: The strategy on whose replicas it runs.
        for_training: Whether the train function will be used.
        maker: Makes the step that replaces Keras's, or None.
        exchange_maker: Makes the exchange that wraps the reduction, or None.
        round_maker: Makes the rounds of local steps that replace Keras's step, or None.
    """
    makers = (maker, exchange_maker, round_maker)
    previous = _keras.attached(model).prepared
    usable = previous is not None and previous.fits(model, strategy)
    # A callback that evaluates names no extension. It must get the functions of the training
    # that is running, not replace them.
    if usable and (
        not for_training
        or (previous.maker, previous.exchange_maker, previous.round_maker) == makers
    ):
        return previous  # type: ignore[no-any-return]
    strategy.examine(model)
    stop = StopState()
    # That of an earlier private training would count as one of the optimizers of this one.
    _keras.attached(model).clip_optimizer = None
    own_step = None if maker is None else maker.make(model, strategy)
    exchange = _exchange(previous, model, strategy, exchange_maker)
    own_round = None if round_maker is None else round_maker.make(model, strategy, exchange)
    with_state = [part for part in (exchange, own_round) if part is not None]
    of_extensions = tuple(pair for part in with_state for pair in part.state)
    optimizers = [*optimizers_of(model), *(own_round.optimizers if own_round else ())]
    parts = () if exchange is None else tuple(exchange.parts)
    state = TrainState(tuple(variables_of(model)), of_extensions, parts)
    in_parts = {id(variable) for variable, _ in parts}  # the exchange holds these itself
    if for_training:
        _check_parts(state, in_parts)
    placed = [v for v in state.variables if id(v) not in in_parts]
    # Processes with whole batches also take the chief's residuals.
    agreed = state.variables if as_whole(strategy) else state.replicated
    prepared = PreparedModel(
        model,
        strategy,
        strategy.place,
        _keras.compiled_state(model),
        state,
        strategy.hold(placed, optimizers),
        make_functions(model, strategy, stop, agreed, own_step, exchange, own_round),
        stop,
        own_step,
        maker,
        exchange,
        exchange_maker,
        own_round,
        round_maker,
    )
    _keras.attached(model).prepared = prepared
    return prepared


def _check_parts(state: TrainState, in_parts: set[int]) -> None:
    """Refuses to train a weight that is in parts since an earlier training, as a whole one."""
    for variable in state.of_model:
        if _keras.in_parts(variable) is not None and id(variable) not in in_parts:
            raise StrategyError(
                "A model whose weights stay in parts must be trained in parts again. Received: "
                f"{variable.path!r}, which is in parts since an earlier `fit`. Pass the same "
                "tfdist.Zero(stage=3), or save the model and load it."
            )


def _exchange(
    previous: PreparedModel | None, model: Any, strategy: Strategy, maker: ExchangeMaker | None
) -> Exchange | None:
    """Makes the exchange. One with state is kept if only the number of replicas changes."""
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


def take_out_of_scope(model: Any, strategy: Any) -> Any:
    """Takes a model out of the `tf.distribute` scope in which it was made.

    Args:
        model: A `keras.Model`.
        strategy: As in `fit`.

    Returns:
        The strategy of the scope, if it has several replicas and you have not named or chosen
        another one. Otherwise `strategy`.
    """
    scope = _keras.scope_of(model)
    if scope is not None:
        _keras.leave_scope(model, variables_of(model), optimizers_of(model))
        _keras.attached(model).scope = scope
    scope = _keras.attached(model).scope
    if scope is None or not is_left_open(strategy) or not current().strategy.is_plain:
        return strategy
    return strategy if scope.num_replicas_in_sync == 1 else connected_by(strategy, scope)
