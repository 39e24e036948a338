"""The page on the architecture: the rule finds what is missing; the page has the answers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.lint.architecture import MOST_ROOMS, PACKAGE, PAGE, ROOT, named, problems

pytestmark = pytest.mark.quick
ANSWERS = re.findall(
    r"^\| (.+\?) \| `(.+?)` \|", (ROOT / "docs/development/finding.md").read_text(), re.M
)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A small package: two rooms with a file each."""
    package = tmp_path / "p"
    for room in ("a", "b"):
        (package / room).mkdir(parents=True)
        (package / room / "__init__.py").touch()
        (package / room / f"of_{room}.py").touch()
    return package


def test_a_whole_page_has_no_problem(package: Path) -> None:
    assert not list(problems("`a/` and `b/`: `a/of_a.py`\n\n| x | `b/`: `of_b.py` |", package))
    table = "`a/`\n| x | file in `b/` |\n|---|---|\n| x | `of_b.py` |\n| y | `a/of_a.py` |"
    assert not list(problems(table, package))


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ("`a/` `of_a.py`\n`b/of_b.py`", "b/ is not named"),
        ("`a/` `of_a.py`\n`b/`", "b/of_b.py is not named"),
        ("`a/` `of_a.py`\n`b/` `of_b.py` `gone.py`", "there is no gone.py"),
        ("`a/` `of_a.py`\n`b/` `of_b.py`\n`b/of_a.py`", "there is no b/of_a.py"),
    ],
)
def test_what_is_missing_is_found(page: str, problem: str, package: Path) -> None:
    assert list(problems(page, package)) == [problem]


def test_too_many_rooms_are_found(package: Path) -> None:
    page = "`a/` `of_a.py`\n`b/` `of_b.py`"
    for number in range(MOST_ROOMS - 1):
        (package / f"c{number}").mkdir()
        (package / f"c{number}" / "__init__.py").touch()
        page += f"\n`c{number}/`"
    assert list(problems(page, package)) == ["17 rooms are on the top floor, of 16"]


@pytest.mark.parametrize(("question", "answer"), ANSWERS)
def test_the_page_has_the_answers(question: str, answer: str) -> None:
    assert PACKAGE / answer in {path for _, path in named(PAGE.read_text())}, question


def test_all_questions_are_read() -> None:
    assert len(ANSWERS) == 34
