"""The tables of `benchmarks.chaos`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def _seconds(values: Sequence[float]) -> tuple[str, str]:
    if not values:
        return "", ""
    return f"{statistics.median(values):.1f}", f"{max(values):.1f}"


def show(results: Sequence[dict[str, Any]]) -> None:
    """Prints a table by place and one by kind, and both as JSON.

    Args:
        results: One for each training.
    """
    results = [result for result in results if not result["cut_short"]]
    by_place: dict[str, dict[str, Any]] = {}
    by_kind: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for result in results:
        row = by_place.setdefault(
            result["place"], dict.fromkeys(("trainings", "faults", "ended", "exact", "left"), 0)
        )
        row["trainings"] += 1
        row["faults"] += len(result["faults"])
        row["ended"] += result["ended"] and not result["unexpected"]
        row["exact"] += result["exact"]
        row["left"] += len(result["left"]) + len(result["left_by_launchers"])
        for fault in result["faults"]:
            by_kind.setdefault(fault["kind"], []).append((result, fault))
    columns = ("", "trainings", "faults", "ended well", "exact", "left over")
    table = Table(*columns, title="by place")
    for place, row in sorted(by_place.items()):
        table.add_row(place, *map(str, row.values()))
    total = [sum(row[name] for row in by_place.values()) for name in row] if by_place else []
    table.add_row("in all", *map(str, total))
    kinds = Table(
        *("", "faults", "survived", "exact", "noticed s", "worst", "recovered s", "worst"),
        title="by kind",
    )
    figures = []
    for kind, pairs in sorted(by_kind.items()):
        survived = sum(result["ended"] and not result["unexpected"] for result, _ in pairs)
        exact = sum(result["exact"] for result, _ in pairs)
        noticed = [f["noticed_s"] for _, f in pairs if f["noticed_s"] is not None]
        recovered = [f["recovered_s"] for _, f in pairs if f["recovered_s"] is not None]
        cells = (len(pairs), survived, exact, *_seconds(noticed), *_seconds(recovered))
        kinds.add_row(kind, *map(str, cells))
        figures.append((kind, *cells))
    console = Console(width=110)
    console.print(table)
    console.print(kinds)
    print(json.dumps({"title": "chaos", "places": by_place, "kinds": figures}), flush=True)
