"""What a strategy and an extension may replace of a step."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import tensorflow as tf

from tfdist.cluster import Cluster
from tfdist.errors import StrategyError
from tfdist.step.functions import _trace, make_functions
from tfdist.step.signals import StopState
from tfdist.strategies.single import Single

pytestmark = pytest.mark.quick


class OwnFunctions(Single):
    functions = object()

    def own_functions(self, model: Any) -> Any:
        return self.functions


def test_a_strategy_may_replace_a_step_or_an_extension_but_not_both() -> None:
    strategy: Any = OwnFunctions(Cluster())
    assert make_functions(None, strategy, StopState()) is strategy.functions
    own_step: Any = object()
    with pytest.raises(StrategyError, match="'single', which has functions of its own"):
        make_functions(None, strategy, StopState(), own_step=own_step)


@pytest.mark.parametrize("ours", [True, False])
def test_functions_that_each_training_traces_are_no_reason_to_warn(ours: bool) -> None:
    def traced_anew() -> Any:
        def function(x: Any) -> Any:
            return x + 1

        return (
            _trace(SimpleNamespace(run_eagerly=False), function)
            if ours
            else tf.function(function)
        )

    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logger = tf.get_logger()
    logger.addHandler(handler)
    try:
        for _ in range(8):
            traced_anew()(tf.constant(1))
    finally:
        logger.removeHandler(handler)
    assert any("retracing" in text for text in warnings) is not ours
