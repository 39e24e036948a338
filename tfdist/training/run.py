"""One `fit`, step by step: choose, read, build, bind, agree, run Keras's loop, report."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tfdist import _keras, data
from tfdist.samplers import from_shuffle
from tfdist.step.composition import why_whole
from tfdist.step.prepared import PreparedModel, prepare
from tfdist.training import callbacks as tfdist_callbacks
from tfdist.training import preflight
from tfdist.training.extension import Continuation, Extension
from tfdist.training.request import Request
from tfdist.training.sources import keras_adapter, read, strategy_for_steps


class Seeds(Extension):
    """Chooses the sampler and its seed, if no earlier extension has."""

    def choose(self, request: Request) -> Request:
        """Takes the user's sampler and seed, or chooses them."""
        sampler = request.sampler or from_shuffle(request.shuffle)
        session = request.session
        return replace(
            request,
            sampler=sampler,
            seed=session.sampler_seed(request.seed),
            seed_is_random=request.seed is None and session.seed is None,
        )


class Training:
    """One `fit`.

    Args:
        request: The arguments of `fit`.
        extensions: The extensions, in the order in which they are called.
        continuation: One of them, which says where training begins.
    """

    def __init__(
        self, request: Request, extensions: Sequence[Extension], continuation: Continuation
    ) -> None:
        self._request = request
        self._extensions = extensions
        self._continuation = continuation
        self._has_begun = False

    def run(self) -> Any:
        """Trains.

        Returns:
            Keras's `History`.
        """
        for extension in self._extensions:
            self._request = extension.choose(self._request)
        with contextlib.ExitStack() as stack:
            for extension in self._extensions:
                stack.enter_context(extension.around(self._request))
            return self._run()

    def _run(self) -> Any:
        request = self._request
        self._training_data, self._validation_data = read(request)
        for extension in self._extensions:
            self._training_data = extension.source(request, self._training_data)
        self._step_strategy = strategy_for_steps(
            request.model,
            "train_step",
            self._training_data,
            request.session.strategy,
            request.whole_batch,
            any(extension.needs_state for extension in self._extensions),
        )
        for extension in self._extensions:
            extension.bind(request, self._training_data)
        with contextlib.ExitStack() as stack:
            for extension in self._extensions:
                stack.enter_context(extension.running())
            history = self._continuation.train(self._attempt)
        for extension in self._extensions:
            extension.report(request, history)
        return history

    def _attempt(self) -> Any:
        """Trains once, from where the continuation says.

        An elastic run makes further attempts if processes join or leave.
        """
        request, source = self._request, self._training_data
        self._continuation.begin_attempt(source)
        # This compares the facts of all workers. A difference is named here, before it can make
        # a later collective hang.
        prepared = self._prepare()
        if not self._has_begun:
            prepared.begin_training()
        self._has_begun = True
        self._announce()
        callbacks = self._callbacks(prepared)
        # Called when the first batch is read, since a callback may restore the optimizer.
        start_of_data = functools.partial(_start_of_data, request.model, source)
        epoch, step, start, logs = self._continuation.begin(
            request.initial_epoch, start_of_data
        )
        stream = data.Stream(
            source,
            self._step_strategy,
            start,
            epoch=epoch,
            steps_made=step,
            on_progress=self._continuation.note_step,
            is_watched=tfdist_callbacks.look_between_steps(callbacks),
            logs=logs,
            trains=True,
        )
        verbose = request.verbose if request.session.is_chief else 0
        callbacks = self._continuation.loop_callbacks(
            callbacks,
            prepared,
            where=lambda: stream.position,
            steps=source.steps,
            epochs=request.epochs,
            verbose=verbose,
            add_progbar=verbose != 0,
            model=request.model,
        )
        history = self._run_keras(prepared, stream, callbacks, epoch, verbose)
        stream.close()
        prepared.end_training()
        self._print_summary()
        return history

    def _run_keras(
        self,
        prepared: PreparedModel,
        stream: data.Stream,
        callbacks: Any,
        epoch: int,
        verbose: Any,
    ) -> Any:
        """Runs Keras's own loop, from the start of an epoch or from a step within it."""
        request, source, validation = self._request, self._training_data, self._validation_data

        def on_epoch_end() -> None:
            stream.on_epoch_end()
            if stream.is_over:
                request.model.stop_training = True

        with (
            prepared.running(source, trains=True),
            _keras.end_of_data_unless(lambda: prepared.stop.agreed),
        ):
            return _keras.FIT(
                request.model,
                _keras.StreamAdapter(stream, source.steps, on_epoch_end),
                epochs=request.epochs,
                verbose=verbose,
                callbacks=callbacks,
                validation_data=validation and keras_adapter(validation, self._step_strategy),
                shuffle=False,
                initial_epoch=epoch,
                validation_freq=request.validation_freq,
            )

    def _print_summary(self) -> None:
        summary = self._request.session.strategy.summary()
        if summary is not None and self._request.shows:
            print(f"tfdist: {summary}", flush=True)

    def _prepare(self) -> PreparedModel:
        request, validation = self._request, self._validation_data
        facts: dict[str, Any] = {}
        for extension in self._extensions:
            facts |= extension.facts()
        step_makers = (e.step_maker for e in self._extensions)
        exchange_makers = (e.exchange_maker for e in self._extensions)
        round_makers = (e.round_maker for e in self._extensions)
        prepared = prepare(
            request.model,
            self._step_strategy,
            for_training=True,
            maker=next(filter(None, step_makers), None),
            exchange_maker=next(filter(None, exchange_makers), None),
            round_maker=next(filter(None, round_makers), None),
        )
        arguments = {
            "batch_size": request.batch_size,
            "epochs": request.epochs,
            "initial_epoch": request.initial_epoch,
            "validation_steps": validation and validation.steps,
            "steps_per_execution": request.model.steps_per_execution,
            "steps": self._training_data.steps,
        }
        preflight.check_agreement(
            request.session, request.model, arguments | facts, self._training_data
        )
        return prepared

    def _announce(self) -> None:
        request, source = self._request, self._training_data
        notices = [extension.notice(request) for extension in self._extensions]
        if not request.shows:
            return
        print(request.session.describe(getattr(source, "batch_size", None)), flush=True)
        if (report := source.report()) is not None:
            print(report, flush=True)
        if self._step_strategy is not request.session.strategy:
            notices.insert(0, _notice_of_whole(request.model, "train_step"))
        for notice in filter(None, notices):
            print(f"tfdist: {notice}", flush=True)

    def _callbacks(self, prepared: PreparedModel) -> Any:
        request = self._request
        callbacks = tfdist_callbacks.prepare(
            request.callbacks,
            request.session.strategy,
            prepared.stop,
            prepared.state.replicated,
            prepared.functions.timers,
            shows=request.shows,
        )
        for extension in self._extensions:
            callbacks = extension.callbacks(request, callbacks, prepared)
        return callbacks


def _start_of_data(model: Any, source: data.Source) -> data.DataPosition:
    """Returns the data's position after the steps that the optimizer has counted."""
    optimizer = model.optimizer
    return source.position_after(0 if optimizer is None else int(optimizer.iterations.numpy()))


def _notice_of_whole(model: Any, kind: str) -> str:
    why = why_whole(model, kind) or "you asked for it"
    return (
        f"every replica computes the whole batch, because {why}. The weights are those of one "
        "process, and it is no faster; see docs/promise.md"
    )
