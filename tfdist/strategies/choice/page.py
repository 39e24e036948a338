"""A recommendation as text, as HTML and as JSON."""

from __future__ import annotations

import html
import io
import json
import math
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tfdist.strategies.choice.candidates import Candidate

if TYPE_CHECKING:
    from tfdist.strategies.choice.recommendation import Recommendation

_COLUMNS = (
    "strategy",
    "workers",
    "memory",
    "of",
    "step, ms",
    "compute",
    "network",
    "input",
    "efficiency",
    "",
)


def size(count: float) -> str:
    """Formats a number of bytes.

    Args:
        count: Bytes.

    Example:
        >>> size(200_000_000), size(3 * 2**30), size(10)
        ('191 MiB', '3.0 GiB', '10 B')
    """
    if count >= 2**30:
        return f"{count / 2**30:,.1f} GiB"
    if count >= 2**20:
        return f"{count / 2**20:,.0f} MiB"
    return f"{count / 2**10:,.0f} KiB" if count >= 2**10 else f"{count:,.0f} B"


def milliseconds(seconds: float) -> str:
    """Formats a time.

    Args:
        seconds: The time.

    Example:
        >>> milliseconds(0.0123), milliseconds(2.5)
        ('12.3 ms', '2,500 ms')
    """
    return f"{number(seconds)} ms"


def number(seconds: float) -> str:
    """Formats the milliseconds of a time, with three digits."""
    value = 1e3 * seconds
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def verdict(recommendation: Recommendation, candidate: Candidate) -> str:
    """Says in a few words what a candidate is worth.

    Args:
        recommendation: The recommendation.
        candidate: One of its candidates.
    """
    if candidate.obstacle is not None:
        return candidate.obstacle
    if not candidate.fits:
        return f"does not fit: {size(candidate.memory_bytes - candidate.limit)} too much"
    if candidate.changes_result is not None:
        return f"another result: {candidate.changes_result}"
    if candidate is recommendation.best:
        return "best"
    text = f"bottleneck: {candidate.bottleneck}"
    return f"second; {text}" if candidate is recommendation.second else text


def cells(recommendation: Recommendation, candidate: Candidate) -> list[str]:
    """Returns the cells of a candidate's row."""
    if candidate.obstacle is not None or candidate.memory is None:
        return [candidate.strategy, *[""] * 8, verdict(recommendation, candidate)]
    return [
        candidate.strategy,
        str(candidate.workers),
        size(candidate.memory_bytes),
        size(candidate.limit),
        number(candidate.step_s),
        number(candidate.compute_s),
        number(candidate.communication_s),
        number(candidate.input_s),
        f"{candidate.efficiency:.0%}",
        verdict(recommendation, candidate),
    ]


def facts(recommendation: Recommendation) -> list[str]:
    """Returns lines about the model, the data and the machine."""
    load, hardware = recommendation.workload, recommendation.hardware
    rows = "" if load.rows is None else f" of {load.rows:,}"
    classes = ""
    if load.classes is not None and load.class_ratio is not None:
        classes = f", {load.classes} classes, largest over smallest {load.class_ratio:.3g}"
    device = f"{len(hardware.gpus)} x {hardware.gpus[0]}" if hardware.gpus else "no GPU"
    hosts = "1 host" if hardware.hosts == 1 else f"{hardware.hosts} hosts"
    links = sorted({c.link_source for c in recommendation.candidates if c.link_source})
    step = "measured here" if load.measured_s else f"from FLOPs ({hardware.rates.source})"
    lines = [
        f"model    {load.model}: {load.parameters:,} parameters, "
        f"{load.work.flops / 1e9:.3g} GFLOP a step",
        f"data     batch {load.batch_size}{rows} rows{classes}",
        f"machine  {hosts}, {hardware.cores} cores, {size(hardware.memory_bytes)}, {device}",
        f"times    computing: {step}; network: {'; '.join(links) or 'none'}",
    ]
    return lines + [f"note     {note}" for note in load.notes]


def conclusion(recommendation: Recommendation) -> list[str]:
    """Returns the lines below the table."""
    from tfdist.strategies.choice.recommendation import name_of

    name = "nothing" if recommendation.best is None else name_of(recommendation.best)
    lines = [f"Recommended: {name}. {recommendation.reason}"]
    if recommendation.second is not None:
        time = milliseconds(recommendation.second.step_s)
        lines.append(f"Second: {name_of(recommendation.second)}, {time} a step.")
    lines += [f"- {line}" for line in recommendation.advice]
    return lines + ([f"Run: {recommendation.command}"] if recommendation.command else [])


def as_page(recommendation: Recommendation) -> Any:
    """Returns the page for a terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in ("strategy", "") else "right")
    for candidate in recommendation.candidates:
        style = "bold" if candidate is recommendation.best else ""
        table.add_row(*map(Text, cells(recommendation, candidate)), style=style)
    above = Text("\n".join(facts(recommendation)))
    below = Text("\n".join(conclusion(recommendation)))
    return Group(above, Padding(table, (1, 0)), below)


def as_text(recommendation: Recommendation) -> str:
    """Returns the page as text."""
    text = io.StringIO()
    Console(file=text, width=140).print(as_page(recommendation))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).rstrip()


def as_html(recommendation: Recommendation) -> str:
    """Returns the page for a notebook."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in _COLUMNS)
    rows = []
    for candidate in recommendation.candidates:
        tag = "th" if candidate is recommendation.best else "td"
        row = "".join(
            f"<{tag}>{html.escape(c)}</{tag}>" for c in cells(recommendation, candidate)
        )
        rows.append(f"<tr>{row}</tr>")
    above = "<br>".join(html.escape(line) for line in facts(recommendation))
    below = "<br>".join(html.escape(line) for line in conclusion(recommendation))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<p>{above}</p>{table}<p>{below}</p>"


def as_dict(recommendation: Recommendation) -> dict[str, Any]:
    """Returns what JSON can hold of a recommendation."""
    load, hardware = recommendation.workload, recommendation.hardware
    return {
        "recommended": None
        if recommendation.best is None
        else _candidate(recommendation, recommendation.best),
        "second": None
        if recommendation.second is None
        else _candidate(recommendation, recommendation.second),
        "reason": recommendation.reason,
        "advice": list(recommendation.advice),
        "command": recommendation.command,
        "strategies": [
            _candidate(recommendation, candidate) for candidate in recommendation.candidates
        ],
        "model": {
            "name": load.model,
            "parameters": load.parameters,
            "flops_per_step": load.work.flops,
            "batch_size": load.batch_size,
            "rows": load.rows,
            "class_ratio": load.class_ratio,
            "step_is_measured": bool(load.measured_s),
            "notes": list(load.notes),
        },
        "hardware": {
            "hosts": hardware.hosts,
            "cores": hardware.cores,
            "memory_bytes": hardware.memory_bytes,
            "gpus": list(hardware.gpus),
            "rates": hardware.rates.source,
        },
    }


def _candidate(recommendation: Recommendation, candidate: Candidate) -> dict[str, Any]:
    predicted = candidate.memory is not None and candidate.obstacle is None
    values: dict[str, Any] = {
        "strategy": candidate.strategy,
        "workers": candidate.workers,
        "servers": candidate.servers,
        "possible": candidate.is_possible,
        "verdict": verdict(recommendation, candidate),
    }
    if not predicted:
        return values
    return values | {
        "memory_bytes": dict(candidate.memory or {}),
        "memory_limit_bytes": candidate.limit,
        "step_s": candidate.step_s,
        "compute_s": candidate.compute_s,
        "communication_s": candidate.communication_s,
        "input_s": candidate.input_s,
        "efficiency": candidate.efficiency if math.isfinite(candidate.efficiency) else None,
        "bottleneck": candidate.bottleneck,
        "link": candidate.link_source,
    }


def as_json(recommendation: Recommendation) -> str:
    """Returns a recommendation as JSON."""
    return json.dumps(as_dict(recommendation), indent=2)
