"""One `fit` with checkpoints: where it begins, when it saves, and what."""

from __future__ import annotations

import contextlib
import datetime
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import tensorflow as tf

from tfdist import _keras, data, watchdog
from tfdist._version import __version__
from tfdist.errors import START_ME_AGAIN, CheckpointError, Preempted
from tfdist.resume.checkpoint import files, same, tensors
from tfdist.resume.checkpoint.callbacks import Memory
from tfdist.resume.checkpoint.plain import decode, plain_logs
from tfdist.resume.checkpoint.preemption import Preemption
from tfdist.resume.checkpoint.reading import FORMAT, last_checkpoint, notice_of
from tfdist.resume.checkpoint.saving import SavingCallbacks
from tfdist.resume.checkpoint.settings import Checkpoint
from tfdist.resume.checkpoint.writer import Writer
from tfdist.resume.position import Position
from tfdist.step.prepared import Prepared
from tfdist.step.signals import Stop
from tfdist.step.state import TrainState, variables_of
from tfdist.strategies.base import Strategy
from tfdist.training.extension import Begins, Continuation, Extension
from tfdist.training.request import Request


class CheckpointRun(Continuation):
    """The checkpoints of one `fit`, from the one it begins at to the last it writes.

    The chief alone reads and writes; what it has read, every worker gets. Replicated state is
    written without an exchange between workers.

    Args:
        checkpoint: What `fit` was given.
        strategy: Where the replicas are.
        others: The training's other extensions, whose state is saved as well.

    Raises:
        ArgumentError: It is no checkpoint.
        CheckpointError: The directory cannot be used.
    """

    needs_state = True

    def __init__(
        self, checkpoint: Any, strategy: Strategy, others: Sequence[Extension] = ()
    ) -> None:
        super().__init__(others)
        self._settings = Checkpoint.of(checkpoint)
        self._strategy = strategy
        self._every = self._settings.every
        self._settings.check_strategy(strategy)
        self._states: dict[str, Any] = {}
        self._writer = Writer()
        self._preemption, self._stop = Preemption(), Stop()
        self._model: Any = None
        last = last_checkpoint(self._settings.path, strategy)
        self._state, self._arrays, self._read = last.state, last.arrays, last.read
        self._position: Position | None = None
        self._made = 0 if self._state is None else self._state["steps"]
        self._saved_at, self._saved_time, self._is_due = self._made, time.monotonic(), False
        self._initial_epoch = self._epochs = 0
        self._where: Callable[[], data.DataPosition] = data.DataPosition
        self._setup: dict[str, Any] = {}
        self._train_state, self._computing = TrainState(()), strategy

    # --- before training --------------------------------------------------------------

    def choose(self, request: Request) -> Request:
        """Gives the others their state, and the sampler its seed unless the user chose one."""
        before = {} if self._state is None else self._state["others"]
        steps = 0 if self._state is None else int(self._state["steps"])
        self._states = {
            o.name: o.go_on(before.get(o.name), steps, self._settings.path)
            for o in self._others
        }
        saved = None if self._state is None else self._state["setup"]["seed"]
        is_open = not request.is_seeded and not request.seed_is_secret
        return replace(request, seed=int(saved)) if is_open and saved is not None else request

    def notice(self, request: Request) -> str | None:
        """Says which checkpoint training goes on from, if there is one, and with what."""
        if self._state is None:
            return None
        return notice_of(self._state, self._setup, request.epochs)

    def bind(self, request: Request, source: data.Source) -> None:
        """Refuses a checkpoint of another training, and a disk without room for one.

        The data is told what an earlier process has drawn of it.

        Raises:
            ArgumentError: Something differs; it is named.
            CheckpointError: There is no room.
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
        if self._state is not None:
            same.compare(self._setup, self._state["setup"], self._state["folder"])
            source.go_on_after(self._state["position"][0] - self._state["initial_epoch"])
        if self._strategy.place.is_chief:
            files.check_room(self._settings.path, tensors.size_of(variables))

    def begin(self, epoch: int, start: Callable[[], data.DataPosition]) -> Begins:
        """Says where training begins.

        Args:
            epoch: Where `fit` was asked to.
            start: Says where its data begins, once callbacks have begun.

        Returns:
            The epoch, the steps made of it, what says where its data began, and the logs of
            the last step made.
        """
        self._initial_epoch = epoch
        if self._state is None:
            return epoch, 0, start, {}
        self._initial_epoch = self._state["initial_epoch"]
        self._position = Position.from_json(self._state["position"])
        epoch, step, where = self._position
        if self._state["stopped"]:  # a callback's decision holds, however many are asked for
            epoch, step = sys.maxsize, 0
        return (
            epoch,
            step,
            lambda: where,
            decode(self._state["logs"], self._arrays.__getitem__),
        )

    def loop_callbacks(
        self,
        given: Any,
        prepared: Prepared,
        *,
        where: Callable[[], data.DataPosition],
        **options: Any,
    ) -> Any:
        """Makes the `CallbackList` of the training.

        Args:
            given: This process's callbacks.
            prepared: The model, whose state is saved.
            where: Says where the data stands, between two epochs.
            **options: Of `keras.callbacks.CallbackList`.
        """
        self._train_state, self._where = prepared.state, where
        self._computing = prepared.strategy
        self._epochs = options["epochs"]
        self._stop, self._model = prepared.stop, prepared.model
        self._preemption.on_asked = self._note_asked
        self._note_asked()
        made = 0 if self._position is None else self._position.step
        given = list(getattr(given, "callbacks", given))
        return SavingCallbacks(self, made, given, add_history=True, **options)

    # --- while training runs ------------------------------------------------------------

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Wraps the training; when it is left, all that was to be saved is.

        Raises:
            Preempted: SIGTERM came to one of the workers.
        """
        with self._preemption.heard():
            try:
                yield
            except BaseException:
                with contextlib.suppress(Exception):  # the first failure is the one to show
                    self._writer.finish()
                raise
            finally:
                self._writer.close()
                self._stop.preempted = False
            self._writer.finish()
            if any(self._strategy.gather_objects(self._preemption.asked)):
                self._leave("training had come to its end, and is saved")

    def _note_asked(self) -> None:
        self._stop.preempted = self._preemption.asked

    def leave_if_asked(self, memory: Memory, logs: Any) -> None:
        """Saves and leaves, if one of the workers was asked to; all do so after the same step.

        Args:
            memory: The callbacks', which know of the step.
            logs: Of the step.

        Raises:
            Preempted: One was.
            CheckpointError: It could not be saved.
        """
        alone = self._strategy.place.num_workers == 1
        if not (self._stop.preempted if alone else self._stop.leaving):
            return
        assert self._position is not None
        if any(self._strategy.gather_objects(self._stop.requested)):
            return  # a callback's stop, of which the next step tells: the end is saved
        if alone:
            self._model.get_metrics_result()  # asynchronous steps under way are waited for
        problem = None
        try:
            if self._saved_at != self._made:
                self._save(self._position, memory, logs)
            self._writer.finish()
        except CheckpointError as error:
            problem = str(error)
        # The others wait for the chief, as a launcher would end all when the first has left.
        problem = self._strategy.broadcast_object(problem)
        if problem is not None:
            raise CheckpointError(problem)
        epoch, step, _ = self._position
        self._leave(f"saved after step {step} of epoch {epoch + 1}")

    def _leave(self, what: str) -> NoReturn:
        self._preemption.leave()
        if self._strategy.place.is_chief:
            print(
                f"tfdist: {what}; the run ends with status {START_ME_AGAIN}, to be started "
                "again.",
                flush=True,
            )
        raise Preempted

    def note_step(self, step: int) -> None:
        """Counts a step.

        Args:
            step: Steps made of the epoch.
        """
        assert self._position is not None
        self._made += step - self._position.step
        self._position = self._position._replace(step=step)

    def restore(self, memory: Memory) -> None:
        """Puts the state back that belongs to the position, on every worker.

        Args:
            memory: The callbacks'.
        """
        if self._state is None:
            return
        has_seed = bool(self._state["global_seed"])
        tensors.put_back(self._computing, self._train_state, self._read, has_seed)
        memory.restore(self._state["callbacks"], self._arrays.__getitem__)

    def note_restored(self) -> None:
        """Tells the others that the state was put back."""
        for other in self._others:
            other.note_restored()

    def begin_epoch(self, epoch: int, memory: Memory) -> None:
        """Notes that an epoch begins, or the rest of one.

        Args:
            epoch: As Keras counts.
            memory: The callbacks', which have begun it.
        """
        if self._position is None or self._position.epoch != epoch:
            self._position = Position(epoch, 0, self._where())
        elif self._position.step:
            self.restore(memory)
        self._state, self._read, self._arrays = None, None, {}

    def after_step(self, memory: Memory, logs: Any) -> None:
        """Saves, if it is time to.

        Args:
            memory: The callbacks', which know of the step.
            logs: Of the step.
        """
        if isinstance(self._every, int):
            self._is_due |= self._made // self._every > self._saved_at // self._every
        elif isinstance(self._every, datetime.timedelta):
            waited = time.monotonic() - self._saved_time
            self._is_due = waited >= self._every.total_seconds()
        # Training does not wait for the disk: then a later step is saved.
        is_ready = self._writer.is_idle
        if not self._train_state.is_everywhere:  # then all workers save at the same step
            is_ready = True
            if isinstance(self._every, datetime.timedelta):
                self._is_due = self._strategy.broadcast_object(self._is_due)
        if self._is_due and is_ready:
            assert self._position is not None
            self._save(self._position, memory, logs)

    def after_epoch(self, memory: Memory, is_stopped: bool) -> None:
        """Saves the beginning of the next epoch, if it is time to.

        Args:
            memory: The callbacks', which know of the epoch.
            is_stopped: Whether a callback has ended the training.
        """
        assert self._position is not None
        following = self._position.epoch + 1
        if self._every == "epoch" or is_stopped or following >= self._epochs:
            self._save(Position(following, 0, self._where()), memory, {}, is_stopped)

    @watchdog.here.while_doing(watchdog.SAVING)
    def _save(
        self, position: Position, memory: Memory, logs: Any, is_stopped: bool = False
    ) -> None:
        self._saved_at, self._saved_time, self._is_due = self._made, time.monotonic(), False
        if not self._strategy.place.is_chief and self._train_state.is_everywhere:
            return
        self._writer.finish()
        taken = tensors.take(self._computing, self._train_state)
        if not self._strategy.place.is_chief:
            return
        arrays: list[Any] = []
        state = {
            "format": FORMAT,
            "tfdist": __version__,
            "position": position.to_json(),
            "initial_epoch": self._initial_epoch,
            "steps": self._made,
            "stopped": is_stopped,
            "setup": self._setup,
            "others": self._states,
            "logs": plain_logs(logs, arrays),
            "callbacks": memory.state(arrays),
            "global_seed": _keras.has_global_seed(),
            "arrays": len(arrays),
        }
        taken |= {f"arrays/{i}": tf.convert_to_tensor(a) for i, a in enumerate(arrays)}
        settings = self._settings
        write = functools.partial(
            files.write,
            settings.path,
            position.epoch,
            position.step,
            taken,
            state,
            settings.keep,
        )
        self._writer.begin(write)
