"""What a strategy and an extension may replace of a step."""

from __future__ import annotations

from typing import Any

import pytest

from tfdist.cluster import Cluster
from tfdist.errors import StrategyError
from tfdist.step.functions import make_functions
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
