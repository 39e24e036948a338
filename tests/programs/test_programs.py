"""Programs that know nothing of tfdist end where plain Keras ends, wherever they run.

`make test` runs each on one strategy in turn, `make test-full` all on all.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.jobs import finished, tfdist_run
from tests.places.clusters import PLACES, Clusters, on
from tests.programs.compare import differences
from tests.programs.expected import (
    EVERYWHERE,
    FROM_THE_COMMAND_LINE,
    ONE,
    PROGRAMS,
    Ends,
    always,
)
from tests.programs.run import SCRIPTS, left_in
from tests.programs.table import PAGE, page

LIMIT_S = 300
COMMANDS = {
    "python": None,
    "single-1": (1, ["--drop-in"]),
    "multi_worker-2": (2, ["--drop-in"]),
    "horovod-2": (2, ["--drop-in", "--strategy", "horovod"]),
    "parameter_server-2": (2, ["--drop-in", "--ps", "1"]),
}


def plain(name: str) -> str:
    return f"tests.programs.plain {name}"


def distributed(name: str) -> str:
    return f"tests.programs.distributed {name}"


def in_places() -> Iterator[Any]:
    """Gives each place and program, with what the test needs to be done."""
    chosen = always()
    for place in sorted(EVERYWHERE, key=PLACES.index):
        for name, program in PROGRAMS.items():
            if place in COMMANDS and place != ONE and name in FROM_THE_COMMAND_LINE:
                continue
            expected = program.on(place)
            marks = [on(place, distributed(name))]
            if expected.ends is Ends.AS_ONE:
                marks.append(on(ONE, distributed(name)))
            elif expected.ends in (Ends.EQUAL, Ends.FAILS):
                marks.append(on(ONE, plain(name)))
            if expected.ends is Ends.FAILS:
                marks.append(pytest.mark.xfail(reason=expected.why, strict=expected.each_time))
            if (name, place) not in chosen:
                marks.append(pytest.mark.full)
            yield pytest.param(place, name, marks=marks, id=f"{place}-{name}")


@pytest.mark.cluster
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("place", "name"), in_places())
def test_a_program_ends_as_expected(place: str, name: str, clusters: Clusters) -> None:
    program = PROGRAMS[name]
    expected = program.on(place)
    if expected.ends is Ends.REFUSED:
        with pytest.raises(AssertionError, match=re.escape(expected.why)):
            clusters.outcomes(place, distributed(name))
        return
    received, *others = clusters.outcomes(place, distributed(name))
    assert all(np.isfinite(values).all() for values in received.values())
    for other in others:
        assert not differences(other, received, tolerance=0.0)
    if expected.ends is not Ends.ALIKE:
        task = distributed(name) if expected.ends is Ends.AS_ONE else plain(name)
        (reference,) = clusters.outcomes(ONE, task)
        assert not differences(received, reference, program.tolerance)


def from_the_command_line() -> Iterator[Any]:
    """Gives each command and program, with the reference that the test needs."""
    for how in COMMANDS:
        for name, program in PROGRAMS.items():
            needs_it = name in FROM_THE_COMMAND_LINE
            if program.on(how).ends is not Ends.EQUAL or not (
                needs_it or how in ("python", "single-1", "multi_worker-2")
            ):
                continue
            marks = [on(ONE, plain(name))]
            if not needs_it or how != "multi_worker-2":
                marks.append(pytest.mark.full)
            yield pytest.param(how, name, marks=marks, id=f"{how}-{name}")


@pytest.mark.cluster
@pytest.mark.waits
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("how", "name"), from_the_command_line())
def test_a_command_ends_as_plain_keras(
    how: str, name: str, clusters: Clusters, tmp_path: Path
) -> None:
    script = SCRIPTS / f"{name}.py"
    command = [sys.executable, str(script)]
    if COMMANDS[how] is not None:
        workers, options = COMMANDS[how]
        command = tfdist_run(workers, script, options=options)
    status, printed = finished(command, LIMIT_S, {"OUTCOME": str(tmp_path)}, tmp_path)
    assert status == 0, printed
    left = left_in(tmp_path)
    assert len(left) == (2 if how in ("multi_worker-2", "horovod-2") else 1)
    (expected,) = clusters.outcomes(ONE, plain(name))
    for received in left:
        assert not differences(received, expected, PROGRAMS[name].tolerance)


@pytest.mark.quick
def test_every_script_is_in_the_table() -> None:
    assert {path.stem for path in SCRIPTS.glob("*.py")} == {"outcome", *PROGRAMS}


@pytest.mark.quick
def test_no_script_knows_of_tfdist() -> None:
    for script in SCRIPTS.glob("*.py"):
        assert "tfdist" not in script.read_text("utf-8"), script.name


@pytest.mark.quick
def test_the_page_of_the_documentation_is_up_to_date() -> None:
    if not PAGE.parent.is_dir():
        pytest.skip("the documentation is not part of this copy")
    assert PAGE.read_text("utf-8") == page(), "run python -m tests.programs.table"
