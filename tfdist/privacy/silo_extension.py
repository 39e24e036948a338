"""Private local steps of clients as a part of `fit`."""

from __future__ import annotations

from typing import Any

from tfdist import data
from tfdist.federated.settings import check
from tfdist.privacy.counted_training import CountedTraining
from tfdist.privacy.silo_run import SiloRun
from tfdist.step.prepared import PreparedModel
from tfdist.training.request import Request


class SiloPrivacy(CountedTraining):
    """Protects the examples of each client by itself, in rounds of federated training.

    Args:
        federated: The argument `federated` of `fit`, with a `DPSGD` as `privacy`.

    Raises:
        ArgumentError: `federated` is not valid.
    """

    needs_state = True
    run: SiloRun
    mechanism = None

    def __init__(self, federated: Any) -> None:
        self._federated = check(federated)

    @property
    def local(self) -> SiloRun:
        """The private local steps, after `choose`."""
        return self.run

    def choose(self, request: Request) -> Request:
        """Sets the seed of the guarantee."""
        self.run = SiloRun(self._federated, request)
        return self._with_its_seed(request)

    def bind(self, request: Request, source: data.Source) -> None:
        """Calibrates the noise, and checks the model on a few rows."""
        self.run.plan(source, request.epochs - request.initial_epoch)
        self.step_maker = self.run.steps

    def callbacks(self, request: Request, given: Any, prepared: PreparedModel) -> Any:
        """Adds callbacks that count rounds, and renews the noise."""
        return self.run.watched(given, prepared.own_step)
