"""Random faults in real trainings: what is survived, how soon, at what cost, with what result.

python -m benchmarks.chaos [--faults 50] [--seed 1]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.chaos_worker import EPOCHS, EVERY, STEPS_PER_EPOCH, Fault

WORKER = Path(__file__).with_name("chaos_worker.py")
PLACES = {
    "multi_worker": ("-n", "2", "--strategy", "multi_worker"),
    "horovod": ("-n", "2", "--strategy", "horovod"),
    "parameter_server": ("-n", "2", "--ps", "1"),
}
TASKS = {
    "multi_worker": ("worker 0", "worker 1"),
    "horovod": ("worker 0", "worker 1"),
    "parameter_server": ("worker 0", "worker 1", "ps 0", "chief"),
}
LIMIT_S = 420
# Sums of parameter servers are added in the order in which workers come.
TOLERANCE = {"parameter_server": 1e-5}


@dataclass(frozen=True)
class Outcome:
    """One training and what struck it.

    Attributes:
        status: The exit status of `tfdist run`.
        printed: All that it printed.
        struck: How many faults struck.
        recovery_s: For each that training went on after, the seconds until it made a step
            further than any before.
        repeated: Steps that were made more than once.
        distance: The largest relative distance of a weight or of the optimizer's state from
            a training without faults; 0.0 for the same bits.
    """

    status: int
    printed: str
    struck: int
    recovery_s: tuple[float, ...]
    repeated: int
    distance: float


def train(
    place: str, faults: Sequence[Fault], folder: Path, expected: Any = None, **environ: str
) -> Outcome:
    """Trains once, on two workers, while faults strike.

    Args:
        place: A key of `PLACES`.
        faults: What strikes.
        folder: For the checkpoints and the notes; may be one of a training that ended early.
        expected: `state_of` a training without faults.
        **environ: Variables for the workers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "faults.json").write_text(json.dumps([asdict(fault) for fault in faults]))
    command = [sys.executable, "-m", "tfdist.cli", "run", *PLACES[place]]
    # A worker of synchronous servers that is lost costs two: its own, and that of all.
    command += ["--max-restarts", str(2 * len(faults) + 1), str(WORKER), str(folder)]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **LIMITS, **environ},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        status, printed = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        status, printed = -1, f"{late.stdout!r} {late.stderr!r}"
    struck, recovery, repeated = timed(folder)
    distance = np.inf
    if status == 0:
        distance = 0.0 if expected is None else distance_of(state_of(folder), expected)
    return Outcome(status, printed, struck, recovery, repeated, distance)


# A stopped process is missed after so many seconds.
LIMITS = {"TF_CPP_MIN_LOG_LEVEL": "3", "TFDIST_HANG_LIMIT": "5"}


def state_of(folder: Path) -> list[dict[str, Any]]:
    """Reads what each worker ended with."""
    found = []
    for path in sorted(folder.glob("final-*.npz")):
        with np.load(path) as arrays:
            found.append(dict(arrays))
    return found


def distance_of(found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> float:
    """Gives the largest relative distance of two states; infinite if their kind differs."""
    if len(found) != len(expected) or not found:
        return np.inf
    largest = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if ours.keys() != theirs.keys():
            return np.inf
        for name in ours.keys() - {"history"}:
            gap = float(np.linalg.norm(ours[name].astype(float) - theirs[name].astype(float)))
            largest = max(largest, gap / (float(np.linalg.norm(theirs[name])) + 1e-9))
    return largest


def timed(folder: Path) -> tuple[int, tuple[float, ...], int]:
    """Reads from the notes how many faults struck, seconds to recover, and steps repeated."""
    chief = sorted(folder.glob("steps-*"))[:1]
    lines = [line.split() for path in chief for line in path.read_text().splitlines()]
    steps = [(float(when), int(step), pid) for when, step, pid in lines]
    recovery = []
    struck = [float(path.read_text().split()[0]) for path in folder.glob("struck-*")]
    for when in struck:
        before = [line for line in steps if line[0] <= when]
        # What a fault ends goes on for moments.
        ended = {pid for _, _, pid in before} - {p for t, _, p in steps if t > when + 1}
        reached = max((step for t, step, pid in steps if t <= when or pid in ended), default=0)
        later = [t for t, step, _ in steps if t > when and step > reached]
        recovery += [later[0] - when] if later else []
    return len(struck), tuple(recovery), len(steps) - len({step for _, step, _ in steps})


def schedules(total: int, seed: int) -> Iterator[tuple[str, list[Fault]]]:
    """Draws trainings of up to five faults each.

    Args:
        total: Faults in all.
        seed: Of the draw.
    """
    draw = random.Random(seed)
    left = total
    for number in range(total):
        if left <= 0:
            return
        place = list(PLACES)[number % len(PLACES)]
        count = min(left, draw.randint(3, 5))
        left -= count
        yield place, distinct(place, count, draw)


def distinct(place: str, count: int, draw: random.Random) -> list[Fault]:
    """Draws faults at other moments each: the same one twice in a row rightly ends a run."""
    found: list[Fault] = []
    while len(found) < count:
        drawn = fault(place, draw)
        if all(drawn.moment != f.moment or drawn.moment == "step" for f in found) and all(
            abs(drawn.step - f.step) >= EVERY for f in found
        ):
            found.append(drawn)
    return found


def fault(place: str, draw: random.Random) -> Fault:
    kind = draw.choice(("kill", "kill", "stop", "terminate", "memory", "exception", "slow"))
    moment = draw.choice(("start", "step", "step", "step", "saving", "end"))
    task = draw.choice(TASKS[place])
    if task != "chief" and place == "parameter_server":
        # These run no script of their own: the chief strikes them, by signals.
        kind = kind if kind in ("kill", "stop", "terminate") else "kill"
    if moment == "saving":  # the first worker alone saves
        task = "chief" if place == "parameter_server" else "worker 0"
        kind = kind if kind in ("kill", "stop", "terminate") else "kill"
    return Fault(kind, moment, draw.randrange(1, EPOCHS * STEPS_PER_EPOCH), task)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=PLACES)
    options = parser.parse_args()
    rows: dict[str, list[Outcome]] = {place: [] for place in PLACES}
    with contextlib.suppress(KeyboardInterrupt), tempfile.TemporaryDirectory() as name:
        expected: dict[str, Any] = {}
        for number, (place, faults) in enumerate(schedules(options.faults, options.seed)):
            if options.only not in (None, place):
                continue
            if place not in expected:
                whole = Path(name) / f"whole-{place}"
                outcome = train(place, [], whole)
                if outcome.status != 0:
                    raise RuntimeError(outcome.printed)
                expected[place] = state_of(whole)
            outcome = train(place, faults, Path(name) / str(number), expected[place])
            rows[place].append(outcome)
            listed = ", ".join(f"{f.kind} {f.task} at {f.moment} {f.step}" for f in faults)
            print(
                f"{place}: {listed}: status {outcome.status}, {outcome.struck} struck, "
                f"distance {outcome.distance:.1e}",
                file=sys.stderr,
                flush=True,
            )
            if outcome.status != 0 or outcome.distance > TOLERANCE.get(place, 0.0):
                print(outcome.printed[-6000:], file=sys.stderr, flush=True)
    show(rows)


def show(rows: dict[str, list[Outcome]]) -> None:
    table = Table(title="random faults")
    columns = ("", "faults", "survived", "recovery s", "worst s", "steps repeated", "equal")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    figures = []
    for place, outcomes in rows.items():
        if not outcomes:
            continue
        struck = sum(o.struck for o in outcomes)
        survived = sum(o.struck for o in outcomes if o.status == 0)
        equal = sum(o.distance <= TOLERANCE.get(place, 0.0) for o in outcomes)
        seconds = [s for o in outcomes for s in o.recovery_s] or [0.0]
        figures.append(
            {
                "place": place,
                "faults": struck,
                "survived": survived,
                "recovery_s": round(statistics.median(seconds), 1),
                "worst_s": round(max(seconds), 1),
                "repeated": sum(o.repeated for o in outcomes),
                "equal": f"{equal} of {len(outcomes)}",
            }
        )
        table.add_row(*map(str, figures[-1].values()))
    Console(width=110).print(table)
    print(json.dumps({"title": "chaos", "places": figures}), flush=True)


if __name__ == "__main__":
    main()
