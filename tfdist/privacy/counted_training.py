"""What private trainings of examples and of clients have in common as parts of `fit`."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from tfdist.privacy.counted_run import CountedRun
from tfdist.training.extension import Extension
from tfdist.training.request import Request


class CountedTraining(Extension):
    """Private training, whose steps are counted and reported.

    Attributes:
        run: The private `fit`. It is set by `choose`.
    """

    name = "privacy"
    run: CountedRun[Any]

    def _with_its_seed(self, request: Request) -> Request:
        """Returns a private request, whose random numbers follow from the seed of the run."""
        run = self.run
        return dataclasses.replace(
            request, is_private=True, seed=run.seed, seed_is_secret=not run.is_seeded
        )

    def facts(self) -> dict[str, Any]:
        """Returns the settings that must be equal on all workers."""
        return self.run.common_settings

    def notice(self, request: Request) -> str | None:
        """Returns what the user should know before training."""
        return self.run.notice()

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context for the training. Its steps count even if it fails."""
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
