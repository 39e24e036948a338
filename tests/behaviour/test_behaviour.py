"""Every check on the places that it names; see `registry`."""

from __future__ import annotations

import pytest

from tests.behaviour.program import CHECKS
from tests.places.clusters import Clusters, on

CELLS = [
    pytest.param(place, task, marks=on(place, task), id=f"{place}-{name}")
    for name, (_, places) in CHECKS.items()
    for place in places
    for task in [f"tests.behaviour.program {name}"]
]

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(("place", "task"), CELLS)
def test_it_holds(place: str, task: str, clusters: Clusters) -> None:
    clusters.outcomes(place, task)
