"""Programs that know nothing of tfdist end where plain Keras ends, wherever they run.

`make test` runs each on one strategy in turn, `make test-full` all on all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.jobs import finished, tfdist_run
from tests.places.clusters import PLACES, Clusters, on
from tests.programs.compare import differences
from tests.programs.expected import EVERYWHERE, PROGRAMS, Ends, always
from tests.programs.run import SCRIPTS, left_in
from tests.programs.table import PAGE, page

LIMIT_S = 300


def plain(name: str) -> str:
    return f"tests.programs.plain {name}"


def distributed(name: str) -> str:
    return f"tests.programs.distributed {name}"


def cells() -> Iterator[Any]:
    """Gives each place and program, with what the test needs to be done."""
    chosen = always()
    for place in sorted(EVERYWHERE, key=PLACES.index):
        for name, program in PROGRAMS.items():
            expected = program.on(place)
            marks = [
                pytest.mark.cluster,
                pytest.mark.timeout(1800),
                on(place, distributed(name)),
            ]
            if expected.ends is Ends.EQUAL:
                marks.append(on("single-1", plain(name)))
            if expected.ends is Ends.AS_ONE:
                marks.append(on("single-1", distributed(name)))
            if expected.ends is Ends.FAILS:
                marks.append(pytest.mark.xfail(reason=expected.why, strict=True))
            if chosen[name] != place or expected.ends is Ends.FAILS:
                marks.append(pytest.mark.full)
            yield pytest.param(place, name, marks=marks, id=f"{place}-{name}")


@pytest.mark.parametrize(("place", "name"), cells())
def test_a_program_ends_as_expected(place: str, name: str, clusters: Clusters) -> None:
    program = PROGRAMS[name]
    expected = program.on(place)
    if expected.ends is Ends.REFUSED:
        with pytest.raises(AssertionError) as refused:
            clusters.outcomes(place, distributed(name))
        assert expected.why in str(refused.value)
        return
    received, *others = clusters.outcomes(place, distributed(name))
    assert all(np.isfinite(values).all() for values in received.values())
    for other in others:
        assert not differences(other, received, tolerance=0.0)
    if expected.ends is not Ends.ALIKE:
        task = distributed(name) if expected.ends is Ends.AS_ONE else plain(name)
        (reference,) = clusters.outcomes("single-1", task)
        assert not differences(received, reference, program.tolerance)


@pytest.mark.cluster
@pytest.mark.waits
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "own_train_step" else [pytest.mark.full])
        for name, program in PROGRAMS.items()
        if program.on("multi_worker-2").ends is Ends.EQUAL
    ],
)
def test_a_program_ends_alike_from_the_command_line(name: str, tmp_path: Path) -> None:
    script = SCRIPTS / f"{name}.py"
    left = []
    for command in (
        [sys.executable, str(script)],
        tfdist_run(1, script, options=["--drop-in"]),
        tfdist_run(2, script, options=["--drop-in"]),
    ):
        folder = tmp_path / str(len(left))
        folder.mkdir()
        status, printed = finished(command, LIMIT_S, {"OUTCOME": str(folder)}, folder)
        assert status == 0, printed
        left.append(left_in(folder))
    (expected,), (one,), two = left
    assert len(two) == 2
    for received in (one, *two):
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
