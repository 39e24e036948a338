"""Checks during training that all replicas have the same weights, bit by bit."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import keras

from tfdist import _keras
from tfdist.errors import ArgumentError, DisagreementError
from tfdist.step.prepared import PreparedModel
from tfdist.strategies.base import Strategy
from tfdist.training.extension import Extension
from tfdist.training.request import Request

_DIGEST_BYTES = 8


class Verification(Extension):
    """Compares replicas at the end of a training, and during it on request.

    Args:
        every: Number of steps between two comparisons. None compares at the end only, 0 never.

    Raises:
        ArgumentError: `every` is not a whole number, or below 0.
    """

    def __init__(self, every: int | None) -> None:
        if every is not None and (not isinstance(every, int) or every < 0):
            raise ArgumentError(
                "`verify_every` must be a whole number of steps, 0 for never, or None for the "
                f"end of training only. Received: verify_every={every!r}."
            )
        self._every = every

    def facts(self) -> dict[str, Any]:
        """Returns how often it compares."""
        return {"verify_every": self._every}

    def callbacks(self, request: Request, callbacks: Any, prepared: PreparedModel) -> Any:
        """Adds the callback that compares."""
        strategy = request.session.strategy
        # A worker that has left an elastic run cannot take part in a comparison at its end.
        compares = self._every is not None or not strategy.elastic
        if self._every == 0 or not compares or strategy.place.num_replicas == 1:
            return callbacks
        return _keras.around(
            callbacks, last=[VerifyReplicas(self._every, strategy, prepared.state.replicated)]
        )


class VerifyReplicas(keras.callbacks.Callback):  # type: ignore[misc]
    """Compares a checksum of each variable of all replicas, during training and at its end.

    Args:
        every: Number of steps between two checks, or None for the end only.
        strategy: The strategy.
        variables: `keras.Variable`s that must be equal on all replicas.

    Raises:
        DisagreementError: A variable differs. The message names the first one, and the
            replicas where it differs.
    """

    def __init__(self, every: int | None, strategy: Strategy, variables: Sequence[Any]) -> None:
        super().__init__()
        self._every = every
        self._strategy = strategy
        self._state = variables
        self._variables: Sequence[Any] = ()
        self._checked_step = 0
        self._steps_before = 0  # of completed epochs
        self._epoch = self._step = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Leaves metrics out: a callback's evaluation changes them on one worker only."""
        metric_ids = {id(v) for v in _keras.metric_variables(self.model)}
        self._variables = [v for v in self._state if id(v) not in metric_ids]

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Notes the epoch, for the message."""
        self._steps_before += self._step
        self._epoch, self._step = epoch, 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Compares, every `every` steps."""
        self._step = batch + 1
        step = self._steps_before + self._step
        if self._every is None:
            return
        if step // self._every > self._checked_step // self._every:
            self._checked_step = step
            self.compare(f"after step {self._step} of epoch {self._epoch + 1}")

    def on_train_end(self, logs: Any = None) -> None:
        """Compares the final weights."""
        self.compare("at the end of training")

    def compare(self, when: str) -> None:
        """Compares all replicas.

        Args:
            when: For the message.

        Raises:
            DisagreementError: A variable differs.
        """
        place = self._strategy.place
        local_digests = [
            [_digest(copy) for copy in self._strategy.copies(variable)]
            for variable in self._variables
        ]
        all_digests = self._strategy.gather_objects(local_digests)
        differing = []
        for index, variable in enumerate(self._variables):
            digests = [
                (replica, digest)
                for worker, of_worker in enumerate(all_digests)
                for replica, digest in enumerate(
                    of_worker[index], worker * place.local_replicas
                )
            ]
            usual, _ = Counter(digest for _, digest in digests).most_common(1)[0]
            odd = [replica for replica, digest in digests if digest != usual]
            if odd:
                differing.append((variable, odd))
        if not differing:
            return
        variable, odd = differing[0]
        raise DisagreementError(
            f"All replicas must hold the same weights. Received: {when}, `{variable.path}` of "
            f"{_names(odd, place.num_workers, place.local_replicas)} differs from the others'; "
            f"so do {len(differing) - 1} of {len(self._variables) - 1} further variables. "
            "Look for what changes weights on one worker only: a callback, a train_step that "
            "assigns a value without a reduction, or a nondeterministic operation. "
            "If there is none, a faulty device is likely."
        )


def _digest(value: Any) -> bytes:
    return hashlib.sha256(value.tobytes()).digest()[:_DIGEST_BYTES]


def _names(replicas: Sequence[int], workers: int, local: int) -> str:
    if workers == 1:
        return "replica " + " and ".join(map(str, replicas))
    names = [
        f"worker {replica // local}" + (f" (replica {replica})" if local > 1 else "")
        for replica in replicas
    ]
    return " and ".join(names)
