"""The private steps of earlier processes of a `fit`, read from files when it continues."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tfdist.errors import ArgumentError, CheckpointError
from tfdist.privacy.accounting.arguments import check_type
from tfdist.privacy.accounting.identity import same_made_again
from tfdist.privacy.accounting.ledger import Ledger, Phase
from tfdist.privacy.accounting.levels import Levels
from tfdist.privacy.accounting.silos import Silos
from tfdist.privacy.model_history import History


@dataclass(frozen=True)
class Earlier:
    """The earlier processes of a `fit`.

    Attributes:
        runs: The `run_id` of each process, from the first to the last.
        spent: The `spent` of their settings.
        history: The history of the model with their own steps.
        last: The last process's steps in the weights, or None if unknown. With a schedule of
            the noise it has the sum of these steps.
    """

    runs: tuple[str, ...] = ()
    spent: Ledger = field(default_factory=Ledger)
    history: History = field(default_factory=History)
    last: Phase | None = None

    @property
    def phases(self) -> list[Phase]:
        """Their own steps, with those that were lost."""
        return [p for p in self.history.ledger.phases if p.run_id in self.runs]

    @property
    def in_order(self) -> list[Phase]:
        """Their own steps, in the order of the processes."""
        return sorted(self.phases, key=lambda phase: self.runs.index(phase.run_id))

    @property
    def newest(self) -> str:
        """The run of the last step in the weights, or an empty text."""
        if self.last is None:
            return ""
        return self.last.run_id if self.last.steps else self.last.continues

    def completed(self, record: Earlier | None) -> Earlier:
        """Returns the processes of a checkpoint with the steps that were made since.

        Args:
            record: The content of the `Journal` beside the checkpoint.

        Raises:
            CheckpointError: There is no journal.
        """
        if record is None:
            raise CheckpointError(
                "The file that counts private steps must lie beside the checkpoints: it has "
                "the steps since the last one. Received: a directory without it. Put it back, "
                "or start again in another directory and pass the ledger of the earlier steps "
                "as DPSGD(spent=...)."
            )
        return self._with(record.runs, record.history)

    def beside(self, other: Earlier) -> Earlier:
        """Merges two records. The steps of the last run are those of this record.

        Args:
            other: Another record of the same `fit`.
        """
        return self._with(other.runs, other.history.without(self.runs[-1]))

    def _with(self, runs: tuple[str, ...], history: History) -> Earlier:
        runs = tuple(dict.fromkeys((*runs, *self.runs)))
        return replace(self, runs=runs, history=self.history.merged(history))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {
            **self.history.to_dict(),
            "runs": list(self.runs),
            "spent": self.spent.to_dict(),
        }

    @classmethod
    def from_dict(cls, saved: Any) -> Earlier:
        """Reads the result of `to_dict`.

        Args:
            saved: The dict.
        """
        history = History.from_dict(saved)
        runs = saved.get("runs")
        check_type("runs", runs, (list, tuple), "a list")
        return cls(tuple(runs), Ledger.from_dict(saved.get("spent")), history)

    @classmethod
    def of_checkpoint(cls, saved: dict[str, Any], steps_in_weights: int) -> Earlier:
        """Reads the record of a checkpoint.

        Args:
            saved: The result of `saved_state`, with the phase.
            steps_in_weights: The number of steps in the weights.

        Raises:
            CheckpointError: An older version of tfdist has written it.
        """
        if "phase" not in saved:
            raise CheckpointError(
                "A checkpoint of private training must be of this version of tfdist. Received: "
                "a checkpoint of an older version. Start again in another directory, and pass "
                "the ledger of the earlier steps as DPSGD(spent=...)."
            )
        earlier = cls.from_dict(saved)
        # The saved phase is of one step. The checkpoint says how many of them are in the
        # weights.
        last = replace(Phase(**saved["phase"]), steps=steps_in_weights - int(saved["first"]))
        phases = [last]
        if saved["levels"] is not None:
            levels = levels_from(saved["levels"])
            phases = levels.phases(last, int(saved["counted_from"]), last.steps)
        in_weights = History(Ledger(tuple(p for p in phases if p.steps)), last.secret)
        return replace(earlier, history=earlier.history.merged(in_weights), last=last)

    def names_of(self, spent: Ledger) -> dict[str, str]:
        """Maps the run names of a `spent` that a script has made again to the saved names.

        Args:
            spent: The `spent` of this process.

        Raises:
            ArgumentError: It is not the `spent` of the earlier processes.
        """
        names = same_made_again(spent.phases, self.spent.phases)
        renamed = spent.renamed(names)
        if spent.phases and _all_steps(renamed.merged(self.spent)) != _all_steps(renamed):
            raise ArgumentError(
                "`spent` must be what it was when this training began, or be left out: the "
                f"checkpoint has it. Received: {spent.steps} steps, and {self.spent.steps} in "
                "the checkpoint. Leave it out."
            )
        return names


def levels_from(saved: dict[str, Any]) -> Levels | Silos:
    """Reads what steps differ in: their noise, or the client that makes them.

    Args:
        saved: The result of `to_dict`.
    """
    return (Silos if "sizes" in saved else Levels).from_dict(saved)


def _all_steps(ledger: Ledger) -> int:
    return sum(phase.steps for phase in ledger.phases)


def saved_state(before: Earlier, run_id: str, steps_in_weights: int) -> dict[str, Any]:
    """Returns the record for a checkpoint, without the phase of the coming steps.

    Args:
        before: The earlier processes, and the steps before them.
        run_id: The run of this process.
        steps_in_weights: The number of steps in the weights when it begins.
    """
    return {**replace(before, runs=(*before.runs, run_id)).to_dict(), "first": steps_in_weights}


def with_phase(
    saved: dict[str, Any], phase: Phase, levels: Levels | Silos | None, counted_from: int
) -> None:
    """Adds the phase of the coming steps to the result of `saved_state`.

    Args:
        saved: The record. It is changed in place, since the checkpoint already refers to it.
        phase: The phase of the coming steps.
        levels: The levels of their noise if it follows a schedule, or the clients that make
            them by themselves, else None.
        counted_from: The place of the first coming step in `levels`.
    """
    saved["phase"] = asdict(phase)
    saved["levels"] = None if levels is None else levels.to_dict()
    saved["counted_from"] = counted_from
