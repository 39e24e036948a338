"""Random faults in real trainings: what is survived, how soon, at what cost, with what result.

python -m benchmarks.chaos [--faults 50] [--seed 1]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.faults.strikes import PLACES, TOLERANCE, Outcome, state_of, train
from tests.faults.training import EPOCHS, EVERY, STEPS_PER_EPOCH, Fault

TASKS = {
    "multi_worker": ("worker 0", "worker 1"),
    "horovod": ("worker 0", "worker 1"),
    "parameter_server": ("worker 0", "worker 1", "ps 0", "chief"),
}


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
