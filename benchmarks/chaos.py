"""Random faults from outside, in real trainings: what is survived, noticed when, and left.

python -m benchmarks.chaos [--faults 200] [--seed 1] [--until 04:40]

An injector that the training knows nothing of strikes any of its processes, the launchers too,
its disk and its network, at random times. Each training must end with the weights of an
undisturbed one. To cut networks and to fill disks, it needs root.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chaos_report import show
from benchmarks.chaos_run import PLACES, Training
from benchmarks.chaos_strikes import KINDS, Injector, Struck

MOST_FAULTS = 8
LIMIT_S = 900.0
UNDISTURBED_S = 600.0


def distance(found: list[Path], expected: list[Path], tolerance: float = 0.0) -> float:
    """Gives the largest relative distance of two states; infinite if their kind differs.

    Args:
        found: The files of a training.
        expected: Those of an undisturbed one.
        tolerance: Of the place. With 0, all workers must have written a state, with the same
            bits and the same history. An elastic training may end with fewer workers.
    """
    if not found or (not tolerance and len(found) != len(expected)):
        return np.inf
    largest = 0.0
    for path in found:
        twin = next((p for p in expected if p.name == path.name), None)
        if twin is None:
            return np.inf
        with np.load(path) as ours, np.load(twin) as theirs:
            if set(ours) != set(theirs):
                return np.inf
            if not tolerance and str(ours["history"]) != str(theirs["history"]):
                return np.inf
            for name in set(ours) - {"history"}:
                a, b = ours[name].astype(float), theirs[name].astype(float)
                gap = float(np.linalg.norm(a - b)) / (float(np.linalg.norm(b)) + 1e-9)
                largest = max(largest, gap)
    return largest


def undisturbed(place: str, folder: Path) -> list[Path]:
    """Trains once without faults, or takes what is there from before.

    Args:
        place: A key of `PLACES`.
        folder: For all undisturbed trainings.
    """
    name = PLACES[place].like or place
    kept = folder / f"undisturbed-{list(PLACES).index(name)}"
    finals = sorted(kept.glob("final-*.npz"))
    if (kept / "done").exists():
        return finals
    scratch = Path(tempfile.mkdtemp(dir=folder)) / f"{list(PLACES).index(name):03}"
    training = Training(name, scratch, {})
    training.start()
    deadline = time.monotonic() + UNDISTURBED_S
    try:
        while any(launcher.process.poll() is None for launcher in training.launchers):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} without faults did not end; see {scratch}")
            time.sleep(0.2)
        if any(launcher.process.returncode for launcher in training.launchers):
            raise RuntimeError(f"{name} without faults failed; see {scratch}")
        kept.mkdir()
        for path in training.finals():
            path.rename(kept / path.name)
        (kept / "done").touch()
    finally:
        training.end()
    return sorted(kept.glob("final-*.npz"))


def plans(total: int, seed: int, places: list[str]) -> Iterator[tuple[str, int, int]]:
    """Draws trainings: a place, a number of faults, and a seed."""
    draw, left = random.Random(seed), total
    for number in itertools.count():
        if left <= 0:
            return
        count = min(left, draw.randint(5, MOST_FAULTS))
        left -= count
        yield places[number % len(places)], count, draw.randrange(1 << 30)


def strike(place: str, count: int, seed: int, folder: Path, until: float) -> dict[str, Any]:
    """Trains once under faults.

    Returns:
        The faults, and how the training ended, in types that JSON has.
    """
    expected = undisturbed(place, folder)
    scratch = Path(tempfile.mkdtemp(dir=folder)) / f"{seed % 1000:03}"
    training = Training(place, scratch, {})
    injector = Injector(training, place, random.Random(seed), count)
    try:
        deadline = min(time.monotonic() + LIMIT_S, until)
        ended = injector.go(deadline)
        left = training.left() if ended else []
    finally:
        training.end()
    tolerance = PLACES[place].tolerance
    gap = distance(training.finals(), expected, tolerance) if ended else None
    return {
        "place": place,
        "seed": seed,
        "folder": str(scratch),
        "ended": ended,
        "cut_short": not ended and time.monotonic() >= until,
        "distance": gap,
        "exact": gap is not None and gap <= tolerance,
        "left": left,
        "left_by_launchers": injector.left,
        "unexpected": injector.unexpected,
        "faults": [dataclasses.asdict(fault) for fault in injector.faults],
    }


def end_of(text: str | None) -> float:
    """Returns the time of the clock as one of `time.monotonic()`."""
    if text is None:
        return float("inf")
    hour, minute = map(int, text.split(":"))
    now = time.localtime()
    seconds = (hour - now.tm_hour) * 3600 + (minute - now.tm_min) * 60 - now.tm_sec
    return time.monotonic() + seconds % 86400


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", choices=PLACES)
    parser.add_argument("--kinds", help="some of " + ", ".join(KINDS))
    parser.add_argument("--until", help="a time of the clock, such as 04:40")
    parser.add_argument("--folder", type=Path, help="keeps all files; a result a line")
    parser.add_argument("--report", type=Path, help="only shows the results of a folder")
    options = parser.parse_args()
    if options.report:
        show([json.loads(line) for line in options.report.read_text().splitlines()])
        return
    if options.kinds:
        for kind in KINDS.keys() - set(options.kinds.split(",")):
            del KINDS[kind]
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos"))
    folder.mkdir(exist_ok=True)
    results, until = folder / "results.jsonl", end_of(options.until)
    for place, count, seed in plans(options.faults, options.seed, options.only or list(PLACES)):
        if time.monotonic() > until:
            break
        try:
            result = strike(place, count, seed, folder, until)
        except RuntimeError as error:
            print(f"{place}: {error}", file=sys.stderr, flush=True)
            continue
        with results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        struck = ", ".join(Struck(**fault).what for fault in result["faults"])
        summary = {k: v for k, v in result.items() if k not in ("faults", "seed")}
        print(f"{struck}\n  {json.dumps(summary)}", file=sys.stderr, flush=True)
    show([json.loads(line) for line in results.read_text().splitlines()])


if __name__ == "__main__":
    main()
