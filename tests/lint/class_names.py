"""No two classes of tfdist have the same name: a name in a traceback or a page means one class.

python -m tests.lint.class_names
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2] / "tfdist"


def repeated(sources: Mapping[str, str]) -> Iterator[str]:
    """Finds names that several classes have.

    Args:
        sources: The modules, by their paths.

    Yields:
        One line for each name.
    """
    places = defaultdict(list)
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path}:{node.lineno}")
    for name, where in sorted(places.items()):
        if len(where) > 1:
            yield f"{name}: {', '.join(where)}"


def main() -> int:
    sources = {
        str(path.relative_to(ROOT.parent)): path.read_text()
        for path in sorted(ROOT.rglob("*.py"))
    }
    lines = list(repeated(sources))
    if lines:
        print("Name each class for what it holds. These names stand for several:")
        print(*lines, sep="\n")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
