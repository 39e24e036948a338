"""Runs programs on places and says how far they end from plain Keras.

python -m tests.programs [PROGRAM ...] [--places PLACE,PLACE]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.places.clusters import Clusters
from tests.programs.compare import differences
from tests.programs.expected import EVERYWHERE, ONE, PROGRAMS


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("programs", nargs="*")
    parser.add_argument("--places", default=",".join(EVERYWHERE))
    asked = parser.parse_args()
    programs, places = asked.programs or list(PROGRAMS), asked.places.split(",")
    tasks = {ONE: [f"tests.programs.plain {name}" for name in programs]}
    for place in places:
        on_it = tasks.setdefault(place, [])
        on_it.extend(f"tests.programs.distributed {name}" for name in programs)
    with tempfile.TemporaryDirectory() as folder:
        clusters = Clusters(tasks, Path(folder))
        try:
            for name in programs:
                for place in places:
                    print(f"{name:20} {place:20} {_found(clusters, name, place)}", flush=True)
        finally:
            clusters.end()


def _found(clusters: Clusters, name: str, place: str) -> str:
    try:
        (expected,) = clusters.outcomes(ONE, f"tests.programs.plain {name}")
        first, *others = clusters.outcomes(place, f"tests.programs.distributed {name}")
    except AssertionError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return "fails: " + " | ".join(lines[-3:])
    said = "; ".join(f"{what}: {why}" for what, why in differences(first, expected).items())
    if any(differences(other, first, 0.0) for other in others):
        said += " WORKERS DIFFER"
    return said or "equal"


if __name__ == "__main__":
    main()
