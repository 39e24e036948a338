"""Only their own room asks of which class a strategy or a callback is.

    python -m tests.lint.capabilities

All others ask what it can do: a strategy declares it (`has_servers`, `has_stages`), and
`training/callback_kinds.py` says it of Keras's callbacks. So a new class works without a change
elsewhere.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2] / "tfdist"
OWN_ROOMS = (
    "strategies/",
    "training/callbacks.py",
    "training/callback_kinds.py",
    "resume/checkpoint/callbacks.py",  # the state of each
    "privacy/budget.py",
    "privacy/leaking_callbacks.py",
    "privacy/outside_changes.py",
    "_keras/loop.py",
)
_BASES = {"Strategy", "Callback"}
_MODULES = {"callbacks", "keras_callbacks"}


def derived(sources: Mapping[str, str]) -> set[str]:
    """Lists the classes of strategies and callbacks that modules define.

    Args:
        sources: The modules, by their paths.
    """
    bases: dict[str, set[str]] = {}
    for source in sources.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(b).rpartition(".")[2] for b in node.bases}
    names = set(_BASES)
    while more := {name for name, of in bases.items() if of & names} - names:
        names |= more
    return names


def asked(source: str, names: set[str]) -> Iterator[tuple[int, str]]:
    """Finds questions about the class of a strategy or callback.

    Args:
        source: A module.
        names: The classes, as `derived` lists them. All of Keras's callbacks are added.

    Yields:
        The line, and the class.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, classes]):
                for part in ast.walk(classes):
                    match part:
                        case ast.Name(id=name) if name in names:
                            yield node.lineno, name
                        case ast.Attribute(value=of, attr=name) if (
                            ast.unparse(of).rpartition(".")[2] in _MODULES
                        ):
                            yield node.lineno, name


def main() -> int:
    sources = {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for path in sorted(ROOT.rglob("*.py"))
    }
    names = derived(sources)
    found = {
        f"{path}: {name}": f"tfdist/{path}:{line}: {name}"
        for path, source in sources.items()
        if not path.startswith(OWN_ROOMS)
        for line, name in asked(source, names)
    }
    new = list(found.values())
    if new:
        print("Ask what a strategy or callback can do, not of which class it is:")
        print(*new, sep="\n")
    return bool(new)


if __name__ == "__main__":
    sys.exit(main())
