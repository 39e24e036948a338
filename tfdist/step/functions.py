"""The train, test and predict steps that every strategy runs.

A step is Keras's own `train_step`, run on each replica's share of the global batch, with
one exact reduction: each replica's loss is scaled by its part of the batch, so gradients
are summed and need no division; metrics are summed as state; both travel together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from tfdist import _keras
from tfdist._keras import ReplicaBatch
from tfdist.data import Epoch, Share, no_groups
from tfdist.errors import DisagreementError, MembersChanged, StrategyError
from tfdist.step.exchange import Exchange
from tfdist.step.own_step import OwnStep
from tfdist.step.reduction import (
    DISAGREED,
    GOES_ON,
    MEMBERS_CHANGED,
    STOPPED,
    MetricState,
    ReducedUpdates,
    StepAgreement,
)
from tfdist.step.timers import StepTimers
from tfdist.strategies.base import Functions, Strategy
from tfdist.strategies.whole import Whole

Tensor = Any
Logs = dict[str, Tensor]


@dataclass
class Stop:
    """Whether a callback of this or of another worker asked to stop.

    Attributes:
        requested: Set by this worker's callbacks; goes out with the next step.
        agreed: Set when a step learned of a request: that step changed nothing, on any
            worker, so all of them stop after the one before.
        members_changed: Set when an elastic run's launcher said that processes came or go.
        preempted: Set when this worker has to leave; goes out with the next step.
        leaving: Set when a step learned of that: all workers leave after it.
    """

    requested: bool = False
    agreed: bool = False
    members_changed: bool = False
    preempted: bool = False
    leaving: bool = False

    def asked(self) -> Tensor:
        """Gives what this worker tells the others: float32 of shape [3]."""
        return tf.constant(
            [float(one) for one in (self.requested, self.members_changed, self.preempted)]
        )


class Signals(NamedTuple):
    """What the workers tell each other at every step, in the gradients' collective.

    Attributes:
        status: Scalar int32; see `StepAgreement`.
        check: This worker's `Share.check`.
        leaving: Scalar bool; see `StepAgreement`.
        reducing: Scalar float64, seconds that this worker's reduction took; no signal.
    """

    status: Tensor
    check: Tensor
    leaving: Tensor
    reducing: Tensor


def _no_signals() -> Signals:
    return Signals(tf.constant(0), tf.zeros([4]), tf.constant(False), tf.zeros([], tf.float64))


def _signals(agreement: StepAgreement, share: Share) -> Signals:
    return Signals(agreement.status, share.check, agreement.leaving, agreement.seconds)


def make_functions(
    model: Any,
    strategy: Strategy,
    stop: Stop,
    variables: Sequence[Any] = (),
    own_step: OwnStep | None = None,
    exchange: Exchange | None = None,
) -> Functions:
    """Builds the functions of a model on a strategy; they are traced when first called.

    Args:
        model: A compiled, built `keras.Model`, its variables held by the strategy.
        strategy: Where its replicas are.
        stop: Shared with the callback that sets `requested` and reads `agreed`.
        variables: All state of the model.
        own_step: Takes the place of Keras's train step.
        exchange: Is put around the reduction of gradients.

    Returns:
        The functions for `_keras.loop_functions`.

    Raises:
        StrategyError: A step of an extension's own is not possible there.
    """
    own = strategy.own_functions(model)
    if own is not None and own_step is not None:
        raise StrategyError(
            "Private training must be synchronous: a gradient of weights that others have "
            f"changed meanwhile is not accounted for. Received: {strategy.name} with steps of "
            "its own. Use strategy=tfdist.ParameterServer(synchronous=True)."
        )
    if own is not None:
        return own
    replica = _Replica(model, strategy, own_step, exchange)
    if isinstance(strategy, Whole) and strategy.has_company:
        return _in_company(strategy, replica, stop, variables, exchange)
    # One process has nobody to wait for, and servers' steps no place for the clocks.
    timers = StepTimers() if strategy.place.num_workers > 1 else None
    return Functions(
        train=_over_epoch(model, strategy, replica.train, stop, timers, own_step, exchange),
        test=_over_epoch(model, strategy, replica.test, Stop(), timers),
        predict=_over_shares(model, strategy, replica.predict),
        timers=timers,
    )


def _in_company(
    strategy: Whole,
    replica: _Replica,
    stop: Stop,
    variables: Sequence[Any],
    exchange: Exchange | None,
) -> Functions:
    """Builds the functions of processes that all compute whole batches."""
    model = replica.model
    train = _over_epoch(model, strategy, replica.train, Stop(), None, exchange=exchange)
    test = _over_epoch(model, strategy, replica.test, Stop(), None)

    def trained(epoch: Epoch) -> Logs:
        with strategy.waiting_for(f"step {epoch.steps_taken + 1}"):
            stopped, changed, leaves = strategy.sums(stop.asked()).numpy()
        stop.leaving = bool(leaves)
        if changed:
            raise MembersChanged("Processes came, or are about to go.")
        if stopped:
            stop.agreed = True
            raise StopIteration
        logs = train(epoch)
        with strategy.waiting_for(f"the end of step {epoch.steps_taken}"):
            strategy.take_chiefs(variables)
        return logs

    def tested(epoch: Epoch) -> Logs:
        logs = test(epoch)
        with strategy.waiting_for(f"the end of step {epoch.steps_taken}"):
            strategy.take_chiefs(_keras.metric_variables(model))
        return logs

    predict = _over_shares(model, strategy, replica.predict)
    return Functions(train=trained, test=tested, predict=predict)


def _traced(model: Any, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    function = tf.autograph.experimental.do_not_convert(function)
    if model.run_eagerly:
        return function
    traced: Callable[..., Any] = tf.function(function, reduce_retracing=True, **options)
    return traced


Result = tuple[Logs, Signals]
ReplicaStep = Callable[[Share, Tensor, Hashable], Result]


@dataclass(frozen=True)
class _TracedSteps:
    """Functions of an iterator that draw and make steps of one kind.

    Attributes:
        one: Makes one step, given what `Stop.asked` gives.
        several: Makes as many as it is told, one after the other.
    """

    one: Callable[[Any, Tensor], Result]
    several: Callable[[Any, Tensor, Tensor], Result]


def _traced_steps(
    model: Any,
    strategy: Strategy,
    step: ReplicaStep,
    timers: StepTimers | None,
    own_step: OwnStep | None,
    phase: Hashable,
) -> _TracedSteps:
    """Wraps a replica's step into functions of an iterator.

    The batches of a step of an extension's own may be of another size each time, so such a step
    compiles what it can for itself.
    """

    def after_data(share: Share, stopping: Tensor) -> Result:
        # When the data is over, drawing fails, and then nothing must have been changed.
        with tf.control_dependencies(tf.nest.flatten(share, expand_composites=True)[:1]):
            return step(share, stopping, phase)

    noise = _keras.OwnNoise(strategy.place.worker_index)

    def one_step(share: Share, stopping: Tensor) -> Result:
        with noise.drawing():
            if own_step is not None:
                own_step.begin(share)
            result: Result = strategy.run(after_data, share, stopping)
            if own_step is not None:
                own_step.end(tf.equal(result[1].status, GOES_ON))
        return result

    alone = strategy.place.num_replicas == 1
    compiled = alone and model.jit_compile and own_step is None
    compiled_step = _traced(model, one_step, jit_compile=compiled)

    def one(iterator: Any, stopping: Tensor) -> Result:
        if timers is None:
            unmarked: Result = compiled_step(strategy.next_share(iterator), stopping)
            return unmarked
        share = timers.draw(strategy.next_share, iterator)
        result: Result = compiled_step(share, stopping)
        timers.note_step(result, result[1].reducing)
        return result

    def several(iterator: Any, steps: Tensor, stopping: Tensor) -> Result:
        def again(done: Tensor, _: Any) -> tuple[Tensor, Result]:
            return done + 1, one(iterator, stopping)

        started = (tf.constant(1), one(iterator, stopping))
        _, last = tf.while_loop(lambda done, _: done < steps, again, started)
        return last  # type: ignore[no-any-return]

    return _TracedSteps(_traced(model, one), _traced(model, several))


def _over_epoch(
    model: Any,
    strategy: Strategy,
    step: ReplicaStep,
    stop: Stop,
    timers: StepTimers | None,
    own_step: OwnStep | None = None,
    exchange: Exchange | None = None,
) -> Callable[[Epoch], Logs]:
    """Wraps a replica's step into a function of an epoch, `steps_per_execution` at a time."""
    of_phase = functools.cache(
        functools.partial(_traced_steps, model, strategy, step, timers, own_step)
    )

    def make_one(epoch: Epoch, stopping: Tensor) -> Result:
        phase = None if exchange is None else exchange.next_phase()
        result = of_phase(phase).one(epoch.iterator, stopping)
        if exchange is not None:
            exchange.end_step()
        return result

    # A loop in a graph on several processes goes over all of them each round.
    has_phases = exchange is not None and exchange.has_phases
    loops_here = model.run_eagerly or strategy.has_servers or has_phases

    def function(epoch: Epoch) -> Logs:
        steps = epoch.pass_made(epoch.take(model.steps_per_execution))
        if steps == 0:
            return epoch.logs
        if stop.members_changed and strategy.place.num_workers == 1:
            raise MembersChanged("Other processes are ready to join.")
        stopping = stop.asked()
        made = 0
        with epoch.drawing(), strategy.waiting_for(f"step {epoch.steps_taken}"):
            if model.steps_per_execution == 1:
                logs, signals = make_one(epoch, stopping)
            # A loop in a graph in which data ends does not say how many steps it has made.
            elif loops_here or epoch.may_end_early:
                try:
                    for made in range(steps):  # noqa: B007, needed where data ends
                        logs, signals = make_one(epoch, stopping)
                except tf.errors.OutOfRangeError:
                    if not made:
                        raise
                    steps = made
            else:
                several = of_phase(None).several
                logs, signals = several(epoch.iterator, tf.constant(steps), stopping)
        if strategy.place.num_workers > 1:
            _heed(signals, stop, strategy, epoch)
        epoch.note_progress(steps)
        return logs

    return function


def _heed(signals: Signals, stop: Stop, strategy: Strategy, epoch: Epoch) -> None:
    """Does what the other workers' signals ask for, on all workers alike."""
    stop.leaving = bool(signals.leaving)
    status = int(signals.status)
    if status == STOPPED:
        stop.agreed = True
        raise StopIteration
    if status == MEMBERS_CHANGED:
        raise MembersChanged("Processes came, or are about to go.")
    if status == DISAGREED:
        checks = strategy.gather_objects([int(part) for part in signals.check])
        listed = ", ".join(f"worker {i}: {check}" for i, check in enumerate(checks))
        raise DisagreementError(
            "All workers must draw the same batches in the same order. Received batches with "
            f"different checksums at step {epoch.steps_taken}: {listed}. The step changed "
            f"nothing. {_remedy(epoch.suspects)}"
        )


def _remedy(suspects: Sequence[str]) -> str:
    if not suspects:
        return "Seed what a generator or PyDataset draws, and sort what it lists."
    return (
        f"The data set has {', '.join(suspects)}: seed them, and let them depend on nothing "
        "that differs between workers, such as the time, the order of files or of a set."
    )


def _over_shares(
    model: Any, strategy: Strategy, step: Callable[..., Any]
) -> Callable[[list[Share]], Any]:
    noise = _keras.OwnNoise(strategy.place.worker_index)

    def predicted(share: Share) -> Any:
        with noise.drawing():
            return strategy.run(step, share)

    one_step = _traced(model, predicted)

    def function(shares: list[Share]) -> Any:
        with strategy.waiting_for("a step"):
            outputs = [one_step(share) for share in shares]
        return tf.nest.map_structure(lambda *parts: tf.concat(parts, 0), *outputs)

    return function


class _Replica:
    """One replica's steps."""

    def __init__(
        self,
        model: Any,
        strategy: Strategy,
        own_step: OwnStep | None,
        exchange: Exchange | None,
    ) -> None:
        self.model = model
        self.strategy = strategy
        self.own_step = own_step
        self.exchange = exchange
        self.alone = strategy.place.num_replicas == 1
        self.takes_part = own_step is not None or exchange is not None
        self.train_step, self.test_step = model.train_step, model.test_step
        if not self.alone or self.takes_part:
            self.train_step = _keras.step_of(model, "train_step")
        if not self.alone:
            self.test_step = _keras.step_of(model, "test_step")
        self.elements = sum(math.prod(v.shape) for v in model.trainable_variables)

    def train(self, share: Share, stopping: Tensor, phase: Hashable) -> Result:
        """Updates the weights, once."""
        if share.total is None and self.takes_part:  # the whole of a stream's batch
            count = tf.shape(tf.nest.flatten(share.data)[0], tf.int64)[0]
            nothing = tf.constant(0, tf.int64)
            share = Share(share.data, count, count, nothing, tf.zeros([4]), no_groups())
        if share.total is None:
            return self.train_step(share.data), _no_signals()
        with _keras.on_replica(self._batch(share)) as batch:
            own_step = self.own_step
            if own_step is not None:
                data, stopping = own_step.begin_step(share.data, batch, stopping)
                share = share._replace(data=data)
            exchange = None if self.exchange is None else (self.exchange, phase)
            agreement = StepAgreement(self.strategy, share, stopping, self.elements, exchange)
            updates = ReducedUpdates(
                self.model, batch, agreement, self.strategy, are_parts=own_step is not None
            )
            batch.metrics = metrics = MetricState(not _keras.has_own(self.model, "train_step"))
            batch.updates = updates
            if own_step is None:
                logs = self.train_step(share.data)
            else:
                logs = own_step.train_step(share.data, batch, share.groups)
            batch.updates = batch.metrics = None
            updates.finish(metrics)
            return self._logs(batch, logs), _signals(agreement, share)

    def test(self, share: Share, stopping: Tensor, phase: Hashable) -> Result:
        """Adds a share to the metrics."""
        if self.alone:
            return self.test_step(share.data), _no_signals()
        with _keras.on_replica(self._batch(share)) as batch:
            agreement = StepAgreement(self.strategy, share, stopping)
            batch.metrics = metrics = MetricState(not _keras.has_own(self.model, "test_step"))
            logs = self.test_step(share.data)
            batch.metrics = None
            _, changes = agreement.reduce(batch, [], metrics.changes(batch))
            metrics.assign(changes)
            return self._logs(batch, logs), _signals(agreement, share)

    def predict(self, share: Share) -> Any:
        """Gives the outputs for the whole global batch, in its order."""
        if self.alone:
            return self.model.predict_step(share.data)
        with _keras.on_replica(self._batch(share)):
            outputs = self.model.predict_step(share.data)
            # A share without examples has one row all the same.
            return tf.nest.map_structure(
                lambda output: self.strategy.all_gather(output[: share.rows]), outputs
            )

    def _batch(self, share: Share) -> ReplicaBatch:
        return ReplicaBatch(
            share.rows,
            share.total,
            share.offset,
            self.strategy.all_reduce_sum,
            self.strategy.all_gather,
        )

    def _logs(self, batch: ReplicaBatch, logs: Logs) -> Logs:
        """Gives the results of reduced metrics, and the mean of what else a step returned."""
        leaves = tf.nest.flatten(logs)
        of_metrics = [batch.metric_of(leaf) for leaf in leaves]
        metrics = {id(found[0]): found[0] for found in of_metrics if found is not None}
        results = {key: tf.nest.flatten(one.result()) for key, one in metrics.items()}
        others = [
            tf.cast(leaf, tf.float32) * batch.share
            for leaf, found in zip(leaves, of_metrics, strict=True)
            if found is None
        ]
        means = iter(batch.all_reduce(others) if others else ())
        reduced = [
            next(means) if found is None else results[id(found[0])][found[1]]
            for found in of_metrics
        ]
        packed: Logs = tf.nest.pack_sequence_as(logs, reduced)
        return packed
