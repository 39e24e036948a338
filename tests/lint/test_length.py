"""The rule finds what is too long, and nothing else."""

from __future__ import annotations

import pytest

from tests.lint.length import LINES_OF_A_FILE, LINES_OF_A_FUNCTION, too_long

pytestmark = pytest.mark.quick


def function(lines: int, indent: str = "", docstring: str = "") -> str:
    """Writes a function of so many lines, with its first one."""
    body = [*docstring.splitlines(), *["x = 1"] * (lines - 1)]
    return "\n".join(
        [f"{indent}@decorated", f"{indent}def f():", *(f"{indent}    {b}" for b in body)]
    )


@pytest.mark.parametrize("lines", [LINES_OF_A_FUNCTION, LINES_OF_A_FUNCTION + 1])
@pytest.mark.parametrize("before", ["", "class C:\n", "def outer(): return 1\n"])
def test_a_long_function_is_found(lines: int, before: str) -> None:
    source = before + function(lines, indent="    " if before.startswith("class") else "")
    names = [name for name, _ in too_long("a.py", source)]
    assert names == (["a.py: f"] if lines > LINES_OF_A_FUNCTION else [])


def test_docstrings_do_not_count() -> None:
    text = '"""One.\n\n' + "More.\n" * 100 + '"""'
    assert not list(too_long("a.py", function(LINES_OF_A_FUNCTION, docstring=text)))
    assert len(list(too_long("a.py", function(LINES_OF_A_FUNCTION + 1, docstring=text)))) == 1


def test_a_long_file_is_found() -> None:
    assert not list(too_long("a.py", "x = 1\n" * LINES_OF_A_FILE))
    ((name, text),) = too_long("a.py", "x = 1\n" * (LINES_OF_A_FILE + 1))
    assert name == "a.py"
    assert str(LINES_OF_A_FILE + 1) in text
