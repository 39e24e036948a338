"""Trainings that faults strike: how each ended, and how far from one without faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.training import Fault

TRAINING = Path(__file__).with_name("training.py")
PLACES = {
    "multi_worker": ("-n", "2", "--strategy", "multi_worker"),
    "horovod": ("-n", "2", "--strategy", "horovod"),
    "parameter_server": ("-n", "2", "--ps", "1"),
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
    command = [sys.executable, "-m", "tfdist.cli", "run", "--output", "all", *PLACES[place]]
    # A worker of synchronous servers that is lost costs two: its own, and that of all.
    command += ["--max-restarts", str(2 * len(faults) + 1), str(TRAINING), str(folder)]
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
