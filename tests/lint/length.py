"""No function of tfdist is longer than 60 lines, no file longer than 350.

    python -m tests.lint.length

A longer one mixes two ideas. Decorators and docstrings do not count: the options of a command
stand in its decorators, and what is well explained may be short.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2] / "tfdist"
LINES_OF_A_FUNCTION = 60
LINES_OF_A_FILE = 350


def functions(source: str) -> Iterator[tuple[int, str, int]]:
    """Lists the functions of a module.

    Args:
        source: The module.

    Yields:
        The line of a function, its name, and its length without decorators and docstring.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield node.lineno, node.name, lines - _lines_of_docstring(node)


def _lines_of_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    match node.body[0]:
        case ast.Expr(value=ast.Constant(value=str()), lineno=first, end_lineno=last):
            return (last or first) - first + 1
        case _:
            return 0


def too_long(path: str, source: str) -> Iterator[tuple[str, str]]:
    """Finds what is too long in a module.

    Args:
        path: The module's path, for the reader.
        source: The module.

    Yields:
        The name of what is too long, and a line that says how long it is.
    """
    lines = len(source.splitlines())
    if lines > LINES_OF_A_FILE:
        yield path, f"{path}: {lines} lines, of {LINES_OF_A_FILE}"
    for line, name, length in functions(source):
        if length > LINES_OF_A_FUNCTION:
            text = f"{path}:{line}: {name} has {length} lines, of {LINES_OF_A_FUNCTION}"
            yield f"{path}: {name}", text


def main() -> int:
    found = dict(
        pair
        for path in sorted(ROOT.rglob("*.py"))
        for pair in too_long(str(path.relative_to(ROOT.parent)), path.read_text())
    )
    new = list(found.values())
    if new:
        print("Split these, by ideas:")
        print(*new, sep="\n")
    return bool(new)


if __name__ == "__main__":
    sys.exit(main())
