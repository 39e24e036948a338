"""A pipeline as a part of `fit`."""

from __future__ import annotations

from typing import Any, cast

from tfdist import data
from tfdist.errors import ArgumentError
from tfdist.sharding.pipeline.strategy import Pipeline
from tfdist.step.composition import why_rows_mix
from tfdist.training.extension import Extension
from tfdist.training.request import Request


class PipelinedTraining(Extension):
    """Checks the model and cuts it into stages.

    Args:
        **others: What the user has passed for other kinds of training, by argument.
    """

    needs_state = True

    def __init__(self, **others: Any) -> None:
        self._others = others

    def choose(self, request: Request) -> Request:
        """Refuses what cannot be combined with a pipeline.

        Raises:
            ArgumentError: The request has such an argument.
            StrategyError: There are too few devices.
        """
        strategy = _pipeline_of(request)
        strategy.devices()
        for name, value in self._others.items():
            if value is not None:
                raise ArgumentError(
                    f"`{name}` must be left out with a pipeline, whose micro-batches it does "
                    f"not know. Received: {name}={value!r} with {strategy!r}."
                )
        if request.model.run_eagerly:
            raise ArgumentError(
                "`Pipeline` needs steps that are traced. Received: a model that was compiled "
                "with run_eagerly=True. Compile it without."
            )
        return request

    def bind(self, request: Request, source: data.Source) -> None:
        """Cuts the model.

        Raises:
            ArgumentError: The model cannot be cut, or computes examples together.
        """
        _pipeline_of(request).plan(request.model)
        reason = why_rows_mix(request.model, source)
        if reason is not None:
            raise ArgumentError(
                "In a pipeline, layers must compute each example by itself, as a batch comes "
                f"in parts. Received: a model of which {reason}. Train without `Pipeline`."
            )

    def notice(self, request: Request) -> str | None:
        """Says which layers are where, and how much of the time a device waits."""
        return str(_pipeline_of(request).plan(request.model))


def _pipeline_of(request: Request) -> Pipeline:
    # Only strategies that declare `has_stages` come here: there is one class of them.
    return cast(Pipeline, request.session.strategy)
