"""What all tests share: signals and imports of the processes they start, places, and lanes.

Signals are those of a shell's foreground: what runs in the background or under nohup ignores
some, and so would the launchers that the tests start and interrupt.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(_number, signal.SIG_DFL)

_tests = Path(__file__).parent
_imports = [str(_tests / "lean"), str(_tests.parent), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _imports))

from tests.leftovers import Surroundings, adopt_orphans  # noqa: E402
from tests.places.clusters import PLACES, Clusters, wanted  # noqa: E402, they inherit the path

adopt_orphans()
gc.set_threshold(50_000)  # as in the processes that tests start; see lean/sitecustomize.py


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every case on every place")


def _lane(item: pytest.Item) -> tuple[int, int]:
    """Sorts tests by lane: those of places, those that mostly wait, those that compute."""
    waits = item.get_closest_marker("waits") is not None
    places = [PLACES.index(mark.args[0]) for mark in item.iter_markers("place")]
    if places:
        return 0, len(PLACES) if waits else max(places)
    return (1 if waits else 2), 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what only `make test-full` runs, and gives each pytest process its lane."""
    if not config.getoption("full"):
        beyond = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=beyond)
        items[:] = [item for item in items if item not in set(beyond)]
    items.sort(key=_lane)
    for item in items:
        group = "places" if _lane(item)[0] == 0 else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish() -> None:
    """Leaves what was imported out of every garbage collection to come."""
    gc.freeze()


@pytest.fixture(scope="session")
def clusters(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Clusters]:
    """The clusters that the tests' marks ask for."""
    made = Clusters(wanted(request.session.items), tmp_path_factory.mktemp("clusters"))
    yield made
    made.end()


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves a variable, a thread, a process or a port behind."""
    if "clusters" in request.fixturenames:  # which come and go in the background
        yield
        return
    before = Surroundings.now()
    yield
    left = before.left()
    assert not left, f"left behind: {left}"
    if (
        tensorflow := sys.modules.get("tensorflow")
    ) is not None:  # a trace that failed in a loop
        assert tensorflow.compat.v1.get_variable_scope().caching_device is None
    if (session := sys.modules.get("tfdist.strategies.session")) is not None:
        begun = session._current
        assert begun is None or begun.seed is None, "left behind: a seed of tfdist.init"
