"""What earlier processes of a private `fit` have made, as files say to one that goes on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tfdist.errors import ArgumentError, CheckpointError
from tfdist.privacy.accounting.arguments import check_type
from tfdist.privacy.accounting.identity import same_made_again
from tfdist.privacy.accounting.ledger import Ledger, Phase
from tfdist.privacy.accounting.levels import Levels
from tfdist.privacy.model_history import History


@dataclass(frozen=True)
class Earlier:
    """Earlier processes of a `fit`.

    Attributes:
        runs: As in `Phase.run_id`, one of each of them, from the first to the last.
        spent: What they were given as `spent`.
        history: All that they knew, with their own steps.
        last: The last one's steps that are in the weights, if that is known; all of them
            together, if their noise followed a schedule.
    """

    runs: tuple[str, ...] = ()
    spent: Ledger = field(default_factory=Ledger)
    history: History = field(default_factory=History)
    last: Phase | None = None

    @property
    def phases(self) -> list[Phase]:
        """Their own steps, also those that were lost."""
        return [p for p in self.history.ledger.phases if p.run_id in self.runs]

    @property
    def in_order(self) -> list[Phase]:
        """The same, those of the first process first."""
        return sorted(self.phases, key=lambda phase: self.runs.index(phase.run_id))

    @property
    def newest(self) -> str:
        """The run that the last step in the weights is of; empty if there is none."""
        if self.last is None:
            return ""
        return self.last.run_id if self.last.steps else self.last.continues

    def completed(self, written: Earlier | None) -> Earlier:
        """Gives what a checkpoint says, with what was made since.

        Args:
            written: What lies beside it; see `Journal`.

        Raises:
            CheckpointError: There is nothing.
        """
        if written is None:
            raise CheckpointError(
                "The file that counts private steps must lie beside the checkpoints: some may "
                "have been made after the last one. Received: none. Put it back, or begin anew "
                "in another directory, and pass what was spent as DPSGD(spent=...)."
            )
        return self._with(written.runs, written.history)

    def beside(self, there: Earlier) -> Earlier:
        """Gives what both know, where this one knows better what its last run has made.

        Args:
            there: Of the same `fit`.
        """
        return self._with(there.runs, there.history.without(self.runs[-1]))

    def _with(self, runs: tuple[str, ...], history: History) -> Earlier:
        runs = tuple(dict.fromkeys((*runs, *self.runs)))
        return replace(self, runs=runs, history=self.history.merged(history))

    def to_dict(self) -> dict[str, Any]:
        """Gives what JSON can hold."""
        return {
            **self.history.to_dict(),
            "runs": list(self.runs),
            "spent": self.spent.to_dict(),
        }

    @classmethod
    def from_dict(cls, saved: Any) -> Earlier:
        """Reads what `to_dict` gave.

        Args:
            saved: The dict.
        """
        history = History.from_dict(saved)
        runs = saved.get("runs")
        check_type("runs", runs, (list, tuple), "a list")
        return cls(tuple(runs), Ledger.from_dict(saved.get("spent")), history)

    @classmethod
    def of_checkpoint(cls, saved: dict[str, Any], kept: int) -> Earlier:
        """Reads what a checkpoint says.

        Args:
            saved: What `saved_state` gave, with the phase.
            kept: Steps that are in the weights.

        Raises:
            CheckpointError: It is of another version.
        """
        if "phase" not in saved:
            raise CheckpointError(
                "A checkpoint of private training must be of this version of tfdist. "
                "Received: one of an older version. Begin anew in another directory, and "
                "pass what was spent as DPSGD(spent=...)."
            )
        found = cls.from_dict(saved)
        last = replace(Phase(**saved["phase"]), steps=kept - int(saved["first"]))
        made = [last]
        if saved["levels"] is not None:
            levels = Levels.from_dict(saved["levels"])
            made = levels.phases(last, int(saved["counted_from"]), last.steps)
        known = History(Ledger(tuple(p for p in made if p.steps)), last.secret)
        return replace(found, history=found.history.merged(known), last=last)

    def names_of(self, spent: Ledger) -> dict[str, str]:
        """Says what `spent` is called that a script has made anew.

        Args:
            spent: What this process was given.

        Raises:
            ArgumentError: It is not what the earlier ones were given.
        """
        names = same_made_again(spent.phases, self.spent.phases)
        given = spent.renamed(names)
        if spent.phases and given.merged(self.spent).steps != given.steps:
            raise ArgumentError(
                "`spent` must hold what it held when this training began, or be left out: the "
                f"checkpoint has it. Received: {spent.steps} steps, and {self.spent.steps} in "
                "the checkpoint."
            )
        return names


def saved_state(before: Earlier, run_id: str, kept: int) -> dict[str, Any]:
    """Gives what a checkpoint is to hold; the phase of the steps to come is still missing.

    Args:
        before: What earlier processes have made, and what was spent before.
        run_id: Of this one.
        kept: Steps in the weights it begins with.
    """
    return {**replace(before, runs=(*before.runs, run_id)).to_dict(), "first": kept}


def with_phase(
    saved: dict[str, Any], phase: Phase, levels: Levels | None, counted_from: int
) -> None:
    """Adds to what `saved_state` gave what the steps are like that are to come.

    Args:
        saved: It is changed, since the checkpoint has it by then.
        phase: Of them.
        levels: Of their noise, if it is not that of `phase`.
        counted_from: The place of the first of them in `levels`.
    """
    saved["phase"] = asdict(phase)
    saved["levels"] = None if levels is None else levels.to_dict()
    saved["counted_from"] = counted_from
