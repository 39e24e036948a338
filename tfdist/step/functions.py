"""The train, test and predict steps that every strategy runs.

A step is Keras's own `train_step`, which runs on each replica's share of the global batch.
One exact reduction follows. Each replica's loss is scaled by its part of the batch, so the
sum of the gradients needs no division. Metrics are summed as state, in the same collective.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tfdist import _keras
from tfdist.data import Epoch, Share
from tfdist.errors import MembersChanged, StrategyError
from tfdist.step.agreement import GOES_ON
from tfdist.step.exchange import Exchange
from tfdist.step.own_round import OwnRound
from tfdist.step.own_step import OwnStep
from tfdist.step.replica_steps import Logs, ReplicaSteps, Result
from tfdist.step.signals import StopState, Tensor, heed
from tfdist.step.timers import StepTimers
from tfdist.strategies.base import Functions, Strategy
from tfdist.strategies.whole import Whole, as_whole


def make_functions(
    model: Any,
    strategy: Strategy,
    stop: StopState,
    variables: Sequence[Any] = (),
    own_step: OwnStep | None = None,
    exchange: Exchange | None = None,
    own_round: OwnRound | None = None,
) -> Functions:
    """Builds the functions of a model on a strategy; they are traced when first called.

    Args:
        model: A compiled, built `keras.Model`, its variables held by the strategy.
        strategy: The strategy on whose replicas they run.
        stop: The state that is shared with the callback that sets `requested`.
        variables: The variables that processes with whole batches take from the chief.
        own_step: Replaces Keras's train step.
        exchange: Wraps the reduction of gradients.
        own_round: Makes several local steps in place of a train step.

    Returns:
        The functions for `_keras.loop_functions`.

    Raises:
        StrategyError: Both an extension and the strategy replace the train step.
    """
    own_functions = strategy.own_functions(model)
    if own_functions is not None and own_step is not None:
        raise StrategyError(
            "An extension that replaces Keras's train step needs a strategy that splits one "
            f"global batch. Received: strategy {strategy.name!r}, which has functions of its "
            "own. Use another strategy."
        )
    if own_functions is not None:
        return own_functions
    replica = ReplicaSteps(model, strategy, own_step, exchange)
    whole_batch = as_whole(strategy)
    if whole_batch is not None and whole_batch.has_company:
        return _with_whole_batches(whole_batch, replica, stop, variables, exchange)

    def arrangement() -> Hashable:
        return None if exchange is None else exchange.arrangement

    # One process waits for nobody. A chief with servers has no place for clocks in its steps.
    timers = StepTimers() if strategy.place.num_workers > 1 else None
    return Functions(
        train=_over_epoch(
            model,
            strategy,
            replica.train if own_round is None else own_round.train,
            stop,
            timers,
            own_step,
            exchange,
            compiles=own_step is None and own_round is None,
        ),
        test=_over_epoch(
            model, strategy, replica.test, StopState(), timers, arrangement=arrangement
        ),
        predict=_over_shares(model, strategy, replica.predict, arrangement),
        timers=timers,
    )


def _with_whole_batches(
    strategy: Whole,
    replica: ReplicaSteps,
    stop: StopState,
    variables: Sequence[Any],
    exchange: Exchange | None,
) -> Functions:
    """Builds the functions of processes that all compute whole batches.

    Such a step needs no reduction of gradients. The processes exchange the signals before it,
    and take the chief's state after it, so that float errors cannot drive them apart.
    """
    model = replica.model
    train = _over_epoch(model, strategy, replica.train, StopState(), None, exchange=exchange)
    test = _over_epoch(model, strategy, replica.test, StopState(), None)

    def train_and_share(epoch: Epoch) -> Logs:
        with strategy.waiting_for(f"step {epoch.steps_taken + 1}"):
            stopped, members_changed, leaves, saves = strategy.sums(stop.requests()).numpy()
        stop.leaving, stop.saving = bool(leaves), bool(saves)
        if members_changed:
            raise MembersChanged("Processes came, or are about to go.")
        if stopped:
            stop.agreed = True
            raise StopIteration
        logs = train(epoch)
        with strategy.waiting_for(f"the end of step {epoch.steps_taken}"):
            strategy.take_chiefs(variables)
        return logs

    def test_and_share(epoch: Epoch) -> Logs:
        logs = test(epoch)
        with strategy.waiting_for(f"the end of step {epoch.steps_taken}"):
            strategy.take_chiefs(_keras.metric_variables(model))
        return logs

    predict = _over_shares(model, strategy, replica.predict)
    return Functions(train=train_and_share, test=test_and_share, predict=predict)


def _trace(model: Any, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    function = tf.autograph.experimental.do_not_convert(function)
    if model.run_eagerly:
        return function
    traced: Callable[..., Any] = tf.function(function, reduce_retracing=True, **options)
    # Rounds of federated training are traced anew in each `fit`, since they hold its data.
    return _keras.without_retracing_warning(traced)  # type: ignore[no-any-return]


ReplicaStep = Callable[[Any, Tensor, Hashable], Result]


@dataclass(frozen=True)
class _TracedSteps:
    """Traced functions that draw batches from an iterator and make steps of one kind.

    Attributes:
        one_step: Makes one step, from an iterator and the result of `StopState.requests`.
        several_steps: Makes steps one after the other, from an iterator, the number of steps
            and the result of `StopState.requests`.
    """

    one_step: Callable[[Any, Tensor], Result]
    several_steps: Callable[[Any, Tensor, Tensor], Result]


def _traced_steps(
    model: Any,
    strategy: Strategy,
    step: ReplicaStep,
    timers: StepTimers | None,
    own_step: OwnStep | None,
    compiles: bool,
    phase: Hashable,
) -> _TracedSteps:
    """Wraps a replica's step into functions of an iterator.

    An extension's own step or round may get batches of another size each time, so it is not
    compiled here. It compiles the parts that it can.
    """

    def after_data(share: Share, stopping: Tensor) -> Result:
        # Drawing fails when the data ends. The step must wait for it: a step that fails must
        # not have changed anything.
        with tf.control_dependencies(tf.nest.flatten(share, expand_composites=True)[:1]):
            return step(share, stopping, phase)

    noise = _keras.OwnNoise(strategy.place.worker_index)

    def on_replicas(share: Share, stopping: Tensor) -> Result:
        with noise.drawing():
            if own_step is not None:
                own_step.begin(share)
            result: Result = strategy.run(after_data, share, stopping)
            if own_step is not None:
                own_step.end(tf.equal(result[1].status, GOES_ON))
        return result

    alone = strategy.place.num_replicas == 1
    # XLA cannot compile the collectives of several replicas.
    compiled = alone and model.jit_compile and compiles and strategy.compiles
    compiled_step = _trace(model, on_replicas, jit_compile=compiled)

    def one_step(iterator: Any, stopping: Tensor) -> Result:
        if timers is None:
            unmarked: Result = compiled_step(strategy.next_share(iterator), stopping)
            return unmarked
        share = timers.draw(strategy.next_share, iterator)
        result: Result = compiled_step(share, stopping)
        timers.note_step(result, result[1].reducing)
        return result

    def several_steps(iterator: Any, steps: Tensor, stopping: Tensor) -> Result:
        def next_step(completed: Tensor, _: Any) -> tuple[Tensor, Result]:
            return completed + 1, one_step(iterator, stopping)

        # The first step runs outside of the loop, which needs the types of its results.
        started = (tf.constant(1), one_step(iterator, stopping))
        _, last = tf.while_loop(lambda completed, _: completed < steps, next_step, started)
        return last  # type: ignore[no-any-return]

    return _TracedSteps(_trace(model, one_step), _trace(model, several_steps))


def _over_epoch(
    model: Any,
    strategy: Strategy,
    step: ReplicaStep,
    stop: StopState,
    timers: StepTimers | None,
    own_step: OwnStep | None = None,
    exchange: Exchange | None = None,
    compiles: bool = True,
    arrangement: Callable[[], Hashable] = lambda: None,
) -> Callable[[Epoch], Logs]:
    """Wraps a replica's step into a function of an epoch, `steps_per_execution` at a time."""

    @functools.cache
    def of_phase(phase: Hashable, arranged: Hashable) -> _TracedSteps:
        return _traced_steps(model, strategy, step, timers, own_step, compiles, phase)

    def make_step(epoch: Epoch, stopping: Tensor) -> Result:
        phase = None if exchange is None else exchange.next_phase()
        result = of_phase(phase, arrangement()).one_step(epoch.iterator, stopping)
        if exchange is not None:
            exchange.end_step()
        return result

    # Python's loop is chosen if a loop in the graph would be slower or wrong: the chief sends
    # each round of it to all servers, and steps of several phases are several graphs.
    has_phases = exchange is not None and exchange.has_phases
    loops_here = model.run_eagerly or strategy.has_servers or has_phases

    def function(epoch: Epoch) -> Logs:
        # The position counts an execution's steps before they are drawn, on all workers alike.
        # Steps that an earlier process made are only counted.
        steps = epoch.pass_made(epoch.take(model.steps_per_execution))
        if steps == 0:
            return epoch.logs
        if stop.members_changed and strategy.place.num_workers == 1:
            raise MembersChanged("Other processes are ready to join.")
        stopping = stop.requests()
        completed = 0
        with epoch.drawing(), strategy.waiting_for(f"step {epoch.steps_taken}"):
            if model.steps_per_execution == 1:
                logs, signals = make_step(epoch, stopping)
            # If the data ends in a graph's loop, nobody knows how many steps it has made.
            elif loops_here or epoch.may_end_early:
                try:
                    for completed in range(steps):  # noqa: B007, needed where data ends
                        logs, signals = make_step(epoch, stopping)
                except tf.errors.OutOfRangeError:
                    if not completed:
                        raise
                    steps = completed
            else:
                several_steps = of_phase(None, arrangement()).several_steps
                logs, signals = several_steps(epoch.iterator, tf.constant(steps), stopping)
        # All workers heed the signals of the same step, and before any callback sees its logs.
        if strategy.place.num_workers > 1:
            heed(signals, stop, strategy, epoch)
        epoch.note_progress(steps)
        return logs

    return function


def _over_shares(
    model: Any,
    strategy: Strategy,
    step: Callable[..., Any],
    arrangement: Callable[[], Hashable] = lambda: None,
) -> Callable[[list[Share]], Any]:
    noise = _keras.OwnNoise(strategy.place.worker_index)

    def predict_share(share: Share) -> Any:
        with noise.drawing():
            return strategy.run(step, share)

    @functools.cache
    def traced(arranged: Hashable) -> Callable[..., Any]:
        return _trace(model, predict_share)

    def function(shares: list[Share]) -> Any:
        one_step = traced(arrangement())
        with strategy.waiting_for("a step"):
            outputs = [one_step(share) for share in shares]
        return tf.nest.map_structure(lambda *parts: tf.concat(parts, 0), *outputs)

    return function
