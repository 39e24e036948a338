"""Client-level privacy as a part of `fit`."""

from __future__ import annotations

import dataclasses
from typing import Any

from tfdist import data
from tfdist.federated.settings import check
from tfdist.privacy.client_run import ClientRun
from tfdist.privacy.counted_training import CountedTraining
from tfdist.privacy.mechanism.client_updates import ClientUpdates
from tfdist.step.prepared import PreparedModel
from tfdist.training.request import Request


class ClientPrivacy(CountedTraining):
    """Protects the clients of federated training.

    Args:
        federated: The argument `federated` of `fit`, with `privacy`.

    Raises:
        ArgumentError: `federated` is not valid.
    """

    run: ClientRun

    def __init__(self, federated: Any) -> None:
        self._federated = check(federated)

    @property
    def mechanism(self) -> ClientUpdates:
        """The clipping and the noise, after `bind`."""
        return self.run.mechanism

    @property
    def local(self) -> None:
        """None: local steps are not changed."""
        return None

    def choose(self, request: Request) -> Request:
        """Sets the seed of the guarantee."""
        self.run = run = ClientRun(self._federated, request)
        if run.takes_turns:  # nothing is drawn in secret, and checkpoints keep the seed
            return dataclasses.replace(request, is_private=True)
        return self._with_its_seed(request)

    def bind(self, request: Request, source: data.Source) -> None:
        """Calibrates the noise."""
        self.run.plan(source, request.epochs - request.initial_epoch)
        self.step_maker = self.run.mechanism

    def callbacks(self, request: Request, given: Any, prepared: PreparedModel) -> Any:
        """Adds callbacks that count rounds, and renews the noise."""
        return self.run.watched(given)
