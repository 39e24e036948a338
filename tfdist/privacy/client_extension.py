"""Client-level privacy as a part of `fit`."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from tfdist import data
from tfdist.federated.settings import check
from tfdist.privacy.client_run import ClientRun
from tfdist.privacy.mechanism.client_updates import ClientUpdates
from tfdist.step.prepared import PreparedModel
from tfdist.training.extension import Extension
from tfdist.training.request import Request


class ClientPrivacy(Extension):
    """Protects the clients of federated training.

    Args:
        federated: The argument `federated` of `fit`, with `privacy`.

    Raises:
        ArgumentError: `federated` is not valid.
    """

    name = "privacy"
    run: ClientRun

    def __init__(self, federated: Any) -> None:
        self._federated = check(federated)

    @property
    def mechanism(self) -> ClientUpdates:
        """The clipping and the noise, after `bind`."""
        return self.run.mechanism

    def choose(self, request: Request) -> Request:
        """Sets the seed of the guarantee."""
        self.run = run = ClientRun(self._federated, request)
        return dataclasses.replace(
            request,
            is_private=True,
            seed=run.seed,
            seed_is_secret=not run.is_seeded,
        )

    def bind(self, request: Request, source: data.Source) -> None:
        """Calibrates the noise."""
        self.run.plan(source, request.epochs - request.initial_epoch)
        self.step_maker = self.run.mechanism

    def facts(self) -> dict[str, Any]:
        """Returns the settings that must be equal on all workers."""
        return self.run.common_settings

    def notice(self, request: Request) -> str | None:
        """Says how large the noise is."""
        return self.run.notice()

    def callbacks(self, request: Request, given: Any, prepared: PreparedModel) -> Any:
        """Adds callbacks that count rounds, and renews the noise."""
        return self.run.watched(given)

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context for the training. Its rounds count even if it fails."""
        return self.run.counting()

    def report(self, request: Request, history: Any) -> None:
        """Adds the report to the history, and prints its summary."""
        history.privacy = self.run.report()
        if request.shows:
            line = history.privacy.line(self.run.privacy.target_epsilon)
            print(f"tfdist: {line}", flush=True)

    def settings(self) -> Any:
        """Returns the settings that must not change in a continued training."""
        return self.run.settings

    def go_on(self, saved: Any, steps: int = 0, directory: Any = None) -> Any:
        """Reads the records of earlier processes."""
        return self.run.go_on(saved, steps, directory)

    def note_restored(self) -> None:
        """Called after a checkpoint was restored."""
        self.run.note_restored()
