"""Private training as a part of `fit`."""

from __future__ import annotations

import dataclasses
from typing import Any

from tfdist import data
from tfdist.errors import StrategyError
from tfdist.privacy.counted_training import CountedTraining
from tfdist.privacy.mechanism.step import PrivateStep, PrivateSteps
from tfdist.privacy.run import PrivateRun
from tfdist.privacy.validation import check_copies
from tfdist.step.prepared import PreparedModel
from tfdist.training.request import Request


class PrivateTraining(CountedTraining):
    """DP-SGD as a part of `fit`.

    Args:
        privacy: The argument `privacy` of `fit`.
    """

    needs_state = True
    keeps_secrets = True
    run: PrivateRun

    def __init__(self, privacy: Any) -> None:
        self._privacy = privacy

    def choose(self, request: Request) -> Request:
        """Sets the sampler and the seed of the guarantee.

        Raises:
            StrategyError: The strategy is asynchronous.
        """
        self.run = run = PrivateRun(self._privacy, request)
        strategy = request.session.strategy
        if not strategy.synchronous:
            raise StrategyError(
                "Private training needs a synchronous strategy: epsilon does not cover "
                "gradients of weights that another worker has changed meanwhile. Received: "
                f"strategy={strategy.name!r}, which is asynchronous. Use "
                "strategy=tfdist.ParameterServer(synchronous=True)."
            )
        private_request = dataclasses.replace(
            request,
            sampler=run.sampler,
            whole_batch=False,
            copies=run.privacy.augmentations,
            is_private=True,
        )
        return self._with_its_seed(private_request) if run.draws_secretly else private_request

    def bind(self, request: Request, source: data.Source) -> None:
        """Calibrates the noise, and checks the model on a few rows."""
        check_copies(self.run.privacy, request.augment, source)
        self.run.plan(source, request.epochs - request.initial_epoch)
        self.step_maker = PrivateSteps(self.run.mechanism)

    def callbacks(self, request: Request, callbacks: Any, prepared: PreparedModel) -> Any:
        """Adds callbacks that count steps, and renews the noise."""
        step = prepared.own_step
        return self.run.watched(callbacks, step) if isinstance(step, PrivateStep) else callbacks
