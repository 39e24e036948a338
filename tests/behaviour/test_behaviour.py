"""Every check on the places that it names; see `registry`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.behaviour.program import CHECKS
from tests.places.clusters import Clusters, on

# With the oldest versions: the contract of what the strategies are made of.
OLDEST = {("multi_worker-2", "tests.behaviour.contract_checks")}


def cells() -> Iterator[Any]:
    """Gives each place and check, with what the test needs to be done."""
    for name, (function, always, full) in CHECKS.items():
        task = f"tests.behaviour.program {name}"
        for place in (*always, *full):
            marks = [on(place, task)]
            if place in full:
                marks.append(pytest.mark.full)
            if (place, function.__module__) in OLDEST:
                marks.append(pytest.mark.oldest)
            yield pytest.param(place, task, marks=marks, id=f"{place}-{name}")


pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(("place", "task"), cells())
def test_it_holds(place: str, task: str, clusters: Clusters) -> None:
    clusters.outcomes(place, task)
