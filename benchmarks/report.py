"""Ratios of times measured side by side, printed as a table and as JSON."""

from __future__ import annotations

import ast
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Ratio:
    """How two things compare, over several pairs measured in turn.

    Attributes:
        name: What was compared.
        median: Of the pairs' ratios.
        low: The smallest ratio.
        high: The largest ratio.
        goal: What the project wants, for example "<= 1.02".
        detail: Medians of what was measured.
    """

    name: str
    median: float
    low: float
    high: float
    goal: str = ""
    detail: str = ""


def measured(worker: Path, what: str, *options: str) -> list[Any]:
    """Runs a benchmark's script on workers of its own and reads what the first one measured.

    Args:
        worker: The script, which prints "measured" and a list.
        what: Its argument.
        *options: Of `tfdist run`.

    Raises:
        RuntimeError: It failed; with the end of what it printed.
    """
    command = [sys.executable, "-m", "tfdist.cli", "run", "--output", "all"]
    command += [*options, str(worker), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    found = re.search(r"measured (\[.*\])", done.stdout)
    if done.returncode or not found:
        raise RuntimeError(
            f"{worker.name} {what} {options}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
    results: list[Any] = ast.literal_eval(found[1])
    return results


def compare(
    name: str,
    ours: Callable[[], float],
    theirs: Callable[[], float],
    pairs: int,
    goal: str = "",
    unit: str = "s",
) -> Ratio:
    """Measures ours and theirs in turn (A B, B A, ...) and gives ours / theirs.

    Args:
        name: What is compared.
        ours: Returns a measurement.
        theirs: Returns the measurement to compare with.
        pairs: How often.
        goal: What the project wants.
        unit: Of the measurements.
    """
    a, b = [], []
    for pair in range(pairs):
        order = ((ours, a), (theirs, b)) if pair % 2 == 0 else ((theirs, b), (ours, a))
        for measure, kept in order:
            gc.collect()
            kept.append(measure())
    detail = f"{statistics.median(a):.4g} / {statistics.median(b):.4g} {unit}"
    return ratio(name, [x / y for x, y in zip(a, b, strict=True)], goal, detail)


def ratio(name: str, ratios: Sequence[float], goal: str = "", detail: str = "") -> Ratio:
    """Sums up ratios of pairs."""
    return Ratio(name, statistics.median(ratios), min(ratios), max(ratios), goal, detail)


def seconds(action: Callable[[], object]) -> float:
    """Times one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def show(title: str, ratios: Sequence[Ratio]) -> None:
    """Prints a table, and one line of JSON for programs."""
    table = Table(title=title)
    for column in ("", "ratio", "spread", "goal", "medians"):
        table.add_column(column, justify="left" if column in ("", "medians") else "right")
    for r in ratios:
        spread = f"{r.low:.3f} - {r.high:.3f}"
        table.add_row(r.name, f"{r.median:.3f}", spread, r.goal, r.detail)
    Console(width=110).print(table)
    print(json.dumps({"title": title, "ratios": [asdict(r) for r in ratios]}), flush=True)
