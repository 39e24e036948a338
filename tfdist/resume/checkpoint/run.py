"""One `fit` with checkpoints: where it begins, when it saves, and what."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from tfdist import _keras, data, watchdog
from tfdist._version import __version__
from tfdist.errors import CheckpointError
from tfdist.resume.checkpoint import processors, reading, same
from tfdist.resume.checkpoint.callbacks import CallbackState
from tfdist.resume.checkpoint.lease import Lease
from tfdist.resume.checkpoint.plain import decode, plain_logs
from tfdist.resume.checkpoint.preemption import WARNED, Preemption
from tfdist.resume.checkpoint.reading import LastCheckpoint
from tfdist.resume.checkpoint.saver import Saver
from tfdist.resume.checkpoint.saving import SavingCallbacks
from tfdist.resume.checkpoint.schedule import SavingSchedule
from tfdist.resume.checkpoint.settings import Checkpoint
from tfdist.resume.position import Position
from tfdist.step.prepared import PreparedModel
from tfdist.step.signals import StopState
from tfdist.step.state import variables_of
from tfdist.strategies.base import Strategy
from tfdist.training.extension import Begins, Continuation, Extension
from tfdist.training.request import Request


class CheckpointRun(Continuation):
    """The checkpoints of one `fit`, from the one it begins at to the last it writes.

    The chief reads and writes files, and sends what it has read to every worker. Parts that
    replicas have of the state are written and read by their own processes, if these can use the
    directory; see `Saver`.

    Args:
        checkpoint: The argument `checkpoint` of `fit`.
        strategy: The strategy of this process.
        others: The training's other extensions, whose state is saved as well.

    Raises:
        ArgumentError: `checkpoint` is not valid.
        CheckpointError: The directory cannot be used.
    """

    needs_state = True

    def __init__(
        self, checkpoint: Any, strategy: Strategy, others: Sequence[Extension] = ()
    ) -> None:
        super().__init__(others)
        self._settings = Checkpoint.of(checkpoint)
        self._strategy, self._is_alone = strategy, strategy.place.num_workers == 1
        self._settings.check_strategy(strategy)
        self._states: dict[str, Any] = {}
        self._preemption, self._stop = Preemption(), StopState()
        self._model: Any = None
        self._lease = Lease(self._settings.path)
        self._saver = Saver(self._settings, strategy, self._lease)
        self._processors = processors.describe(strategy)
        self._last = reading.last_checkpoint(self._lease, self._settings.path, strategy)
        self._position: Position | None = None
        self._steps_made = 0 if self._last.state is None else self._last.state["steps"]
        self._schedule = SavingSchedule(self._settings.every, self._steps_made)
        self._initial_epoch = self._epochs = 0
        self._where: Callable[[], data.DataPosition] = data.DataPosition
        self._setup: dict[str, Any] = {}

    def close(self) -> None:
        """Releases the directory."""
        self._lease.release()

    def choose(self, request: Request) -> Request:
        """Restores the other extensions, and the sampler's seed unless the user chose one."""
        state = self._last.state
        saved_states = {} if state is None else state["others"]
        steps = 0 if state is None else int(state["steps"])
        self._states = {
            o.name: o.go_on(saved_states.get(o.name), steps, self._settings.path)
            for o in self._others
        }
        saved = None if state is None else state["setup"]["seed"]
        if saved is None or not request.seed_is_random:
            return request
        return replace(request, seed=int(saved))

    def notice(self, request: Request) -> str | None:
        """Names the checkpoint from which training continues, if there is one."""
        if self._last.state is None:
            return None
        state, is_chief = self._last.state, self._strategy.place.is_chief
        other = processors.warning_of(self._processors, state.get("processors"))
        if other is not None and is_chief and state["position"][0] < request.epochs:
            print(f"tfdist: warning: {state['folder']}: {other}", file=sys.stderr, flush=True)
        warns = is_chief and not request.shows
        return reading.notice_of(state, self._setup, request.epochs, warns)

    def bind(self, request: Request, source: data.Source) -> None:
        """Refuses a checkpoint of another training.

        It tells the data how many epochs earlier processes have completed.

        Raises:
            ArgumentError: The checkpoint is of another training; the message says why.
        """
        assert request.sampler is not None
        variables = variables_of(request.model)
        self._setup = same.describe(
            request.model,
            variables,
            source,
            request.sampler,
            None if request.seed_is_secret else request.seed,
            {other.name: other.settings() for other in self._others if other.name},
            names_contents=not request.is_private,
        )
        if (state := self._last.state) is not None:
            same.compare(self._setup, state["setup"], state["folder"])
            source.go_on_after(state["position"][0] - state["initial_epoch"])

    def begin(self, epoch: int, start: Callable[[], data.DataPosition]) -> Begins:
        """Returns where training begins; see `Continuation.begin`."""
        state, arrays = self._last.state, self._last.arrays
        self._initial_epoch = epoch
        if state is None:
            return epoch, 0, start, {}
        self._initial_epoch = state["initial_epoch"]
        self._position = Position.from_json(state["position"])
        epoch, step, where = self._position
        if state["stopped"]:
            # A callback has ended the training, which holds for any number of epochs.
            epoch, step = sys.maxsize, 0
        return epoch, step, lambda: where, decode(state["logs"], arrays.__getitem__)

    def loop_callbacks(
        self,
        callbacks: Any,
        prepared: PreparedModel,
        *,
        where: Callable[[], data.DataPosition],
        **options: Any,
    ) -> Any:
        """Makes the `CallbackList` of the training.

        Args:
            callbacks: This process's callbacks.
            prepared: The model, whose state is saved.
            where: Returns the position of the data, between two epochs.
            **options: Arguments of `keras.callbacks.CallbackList`.

        Raises:
            CheckpointError: The disk has no room, or the checkpoint cannot be restored.
        """
        self._where, self._stop, self._model = where, prepared.stop, prepared.model
        reading.check_before_training(self._settings.path, self._last, prepared, self._strategy)
        self._saver.begin(prepared, self._last.token)
        self._epochs = options["epochs"]
        self._preemption.on_request = self._note_preemption
        self._note_preemption()
        steps_made = 0 if self._position is None else self._position.step
        callbacks = list(getattr(callbacks, "callbacks", callbacks))
        return SavingCallbacks(self, steps_made, callbacks, add_history=True, **options)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Wraps the training. At its end, it waits until the last checkpoint is on the disk.

        Raises:
            Preempted: One of the workers has received SIGTERM.
        """
        with self._lease.renewed(), self._preemption.listening():
            try:
                yield
            except BaseException:
                self._saver.writer.give_up()
                with contextlib.suppress(Exception):  # the first failure is the one to show
                    self._saver.writer.finish()
                raise
            finally:
                self._saver.writer.close()
                self._stop.preempted = self._stop.warned = False
            self._saver.writer.finish()
            if any(self._strategy.gather_objects(self._preemption.is_requested)):
                self._leave("training had come to its end, and is saved")

    def _note_preemption(self) -> None:
        self._stop.preempted = self._preemption.is_requested
        self._stop.warned = self._preemption.is_warned

    def leave_if_preempted(self, callback_state: CallbackState, logs: Any) -> None:
        """Saves and ends the process, if one of the workers has received SIGTERM.

        All workers do so after the same step: each step tells all of them who has to leave.

        Args:
            callback_state: The state of the callbacks after the step.
            logs: The logs of the step.

        Raises:
            Preempted: A worker has received SIGTERM, and the training is saved.
            CheckpointError: The training could not be saved.
        """
        if not (self._stop.preempted if self._is_alone else self._stop.leaving):
            return
        assert self._position is not None
        if any(self._strategy.gather_objects(self._stop.requested)):
            return  # a callback has stopped the training: its end is saved instead
        self._wait_for_steps()
        problem = None
        try:
            if not self._schedule.has_saved(self._steps_made):
                self._save(self._position, callback_state, logs)
            self._saver.writer.finish()
        except CheckpointError as error:
            problem = str(error)
        # The workers wait for the chief: a launcher ends all workers when the first one leaves.
        problem = self._strategy.broadcast_object(problem)
        if problem is not None:
            raise CheckpointError(problem)
        epoch, step, _ = self._position
        self._leave(f"saved after step {step} of epoch {epoch + 1}")

    def _wait_for_steps(self) -> None:
        """Waits for asynchronous steps."""
        if self._is_alone:
            self._model.get_metrics_result()

    def _leave(self, reason: str) -> NoReturn:
        self._preemption.leave(reason if self._strategy.place.is_chief else None)

    def note_step(self, step: int) -> None:
        """Counts a step.

        Args:
            step: Number of completed steps of the epoch.
        """
        assert self._position is not None
        self._steps_made += step - self._position.step
        self._position = self._position._replace(step=step)

    def restore(self, callback_state: CallbackState) -> None:
        """Restores the state of the checkpoint, on every worker.

        Args:
            callback_state: The state of the callbacks.
        """
        if self._last.state is None:
            return
        self._saver.restore(self._last)
        callback_state.restore(self._last.state["callbacks"], self._last.arrays.__getitem__)

    def note_restored(self) -> None:
        """Tells the other extensions that the state was restored."""
        for other in self._others:
            other.note_restored()

    def begin_epoch(self, epoch: int, callback_state: CallbackState) -> None:
        """Notes the position at which an epoch, or the rest of one, begins.

        Args:
            epoch: The epoch, as Keras counts.
            callback_state: The state of the callbacks, after their `on_epoch_begin`.
        """
        if self._position is None or self._position.epoch != epoch:
            self._position = Position(epoch, 0, self._where())
        elif self._position.step:
            # In the middle of an epoch. Keras's loop has just reset the metrics, and callbacks
            # have begun the epoch a second time: both get the checkpoint's state again.
            self.restore(callback_state)
        self._last = LastCheckpoint()  # frees the tensors, which are restored by now

    def after_step(self, callback_state: CallbackState, logs: Any) -> None:
        """Saves, if a checkpoint is due.

        Args:
            callback_state: The state of the callbacks after the step.
            logs: The logs of the step.
        """
        schedule = self._schedule
        schedule.note_step(self._steps_made)
        if self._preemption.takes_warning(self._stop, self._is_alone):
            schedule.request()
            self._wait_for_steps()
            if self._strategy.place.is_chief:
                print(WARNED, flush=True)
        # Training does not wait for the disk. If the writer is busy, a later step is saved.
        is_ready = self._saver.writer.is_idle
        if self._saver.is_joint:
            # Each worker saves its part of the state, so all must do so at the same step.
            # Neither a busy disk nor a process's own clock may decide.
            is_ready = True
            if schedule.is_timed:
                schedule.is_due = self._strategy.broadcast_object(schedule.is_due)
        if schedule.is_due and is_ready:
            assert self._position is not None
            self._save(self._position, callback_state, logs)

    def after_epoch(self, callback_state: CallbackState, is_stopped: bool) -> None:
        """Saves the beginning of the next epoch, if a checkpoint is due.

        Args:
            callback_state: The state of the callbacks after the epoch.
            is_stopped: Whether a callback has ended the training.
        """
        assert self._position is not None
        following = self._position.epoch + 1
        if self._schedule.is_each_epoch or is_stopped or following >= self._epochs:
            self._save(Position(following, 0, self._where()), callback_state, {}, is_stopped)

    @watchdog.here.while_doing(watchdog.SAVING)
    def _save(
        self,
        position: Position,
        callback_state: CallbackState,
        logs: Any,
        is_stopped: bool = False,
    ) -> None:
        self._schedule.note_saved(self._steps_made)

        def state_of(arrays: list[Any]) -> dict[str, Any]:
            state = {
                "format": reading.FORMAT,
                "tfdist": __version__,
                "position": position.to_json(),
                "initial_epoch": self._initial_epoch,
                "steps": self._steps_made,
                "stopped": is_stopped,
                "setup": self._setup,
                "processors": self._processors,
                "others": self._states,
                "logs": plain_logs(logs, arrays),
                "callbacks": callback_state.state(arrays),
                "global_seed": _keras.has_global_seed(),
            }
            return state | {"arrays": len(arrays)}

        epoch, step, _ = position
        is_secret = any(other.keeps_secrets for other in self._others)
        self._saver.save(epoch, step, state_of, is_secret)
