"""The page on the architecture names every room and every file, and nothing that is not there.

    python -m tests.lint.architecture

A name is a path below `tfdist/`, or below the first or the last folder on the same line. In a
table whose first line names a folder, as that of `_keras/`, it may also be below that one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = ROOT / "tfdist"
MOST_ROOMS = 16
_NAME = re.compile(r"`([\w./]*(?:\.py|/))`")
_FOLDER_OF_TABLE = re.compile(r"^\|.*\| file in `([\w/]+)` \|$")
# Their `__init__` says what they are; users' pages and docstrings say more.
_SAY_IT_ALL = {"__init__.py", "__main__.py"}


def named(page: str, package: Path = PACKAGE) -> Iterator[tuple[str, Path | None]]:
    """Lists the files and folders that a page names.

    Args:
        page: Its text.
        package: The folder of the package.

    Yields:
        What the page says, and the path; None if there is no such file or folder.
    """
    of_table = package
    for line in page.splitlines():
        if match := _FOLDER_OF_TABLE.match(line):
            of_table = package / match[1]
        elif not line.startswith("|"):
            of_table = package
        first = last = None
        for name in _NAME.findall(line):
            folders = [f for f in (last, first, of_table, package, package.parent) if f]
            if "/" in name[:-1]:
                folders.reverse()
            path = next((f / name for f in folders if (f / name).exists()), None)
            yield name, path
            if path is not None:
                last = path if path.is_dir() else path.parent
                first = first or last


def problems(page: str, package: Path = PACKAGE) -> Iterator[str]:
    """Finds what a page names in vain, or does not name.

    Args:
        page: Its text.
        package: The folder of the package.

    Yields:
        One line for each problem.
    """
    names = list(named(page, package))
    yield from (f"there is no {name}" for name, path in names if path is None)
    known = {path for _, path in names}
    rooms = sorted(p for p in package.iterdir() if (p / "__init__.py").exists())
    yield from (f"{room.name}/ is not named" for room in rooms if room not in known)
    if len(rooms) > MOST_ROOMS:
        yield f"{len(rooms)} rooms are on the top floor, of {MOST_ROOMS}"
    for path in sorted(package.rglob("*.py")):
        if path.name not in _SAY_IT_ALL and path not in known:
            yield f"{path.relative_to(package)} is not named"


def main() -> int:
    found = list(problems(PAGE.read_text()))
    if found:
        print("docs/architecture.md must name each room and file of tfdist, so that a reader")
        print(
            "finds any behaviour in one guess. Put these into the row that says what they do:"
        )
        print(*found, sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
