"""The memory of a training on several numbers of devices, and what would make it fit."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tfdist.errors import ArgumentError
from tfdist.strategies.choice.candidates import worker_memory
from tfdist.strategies.choice.hardware import Hardware
from tfdist.strategies.choice.page import size
from tfdist.strategies.choice.workload import Workload

_STAGES = {"whole": 0, "zero 1": 1, "zero 3": 3}
_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@dataclass(frozen=True)
class EstimateRow:
    """The memory of one worker.

    Attributes:
        replicas: Number of workers, each with one replica.
        dtype: The dtype of activations: "float32", or "bfloat16" for mixed precision.
        state: Where weights and the optimizer's state are: "whole" on each worker, "zero 1"
            or "zero 3".
        rows: Examples of a worker's part of a batch.
        memory: Bytes by what they are for.
    """

    replicas: int
    dtype: str
    state: str
    rows: int
    memory: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes of a worker."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Estimate:
    """The memory of a training. It prints as a table.

    Attributes:
        model: The model's name.
        batch_size: Examples of a global batch.
        limit: Bytes that a worker may use.
        rows: For each dtype, number of replicas and place of the state.
        notes: What was not counted.
    """

    model: str
    batch_size: int
    limit: int
    rows: tuple[EstimateRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether one worker with everything has enough memory."""
        return self.rows[0].total <= self.limit

    @property
    def remedies(self) -> tuple[str, ...]:
        """What would make it fit; empty if it does."""
        return () if self.fits else tuple(_remedies(self))

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).rstrip()

    def __rich__(self) -> Any:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for column in _columns(self):
            table.add_column(
                column, justify="left" if column in ("dtype", "state", "") else "right"
            )
        for row in self.rows:
            table.add_row(*map(Text, _cells(self, row)))
        below = Text("\n".join(_conclusion(self)))
        return Group(Text(_title(self)), Padding(table, (1, 0)), below)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in _columns(self))
        rows = "".join(
            f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in _cells(self, row))}</tr>"
            for row in self.rows
        )
        below = "<br>".join(map(html.escape, _conclusion(self)))
        return f"<p>{html.escape(_title(self))}</p><table>{head}{rows}</table><p>{below}</p>"

    def to_dict(self) -> dict[str, Any]:
        """Returns all numbers and texts, for JSON."""
        return {
            "model": self.model,
            "batch_size": self.batch_size,
            "limit_bytes": self.limit,
            "fits": self.fits,
            "remedies": list(self.remedies),
            "notes": list(self.notes),
            "rows": [
                {**vars(row), "memory": dict(row.memory), "total": row.total}
                for row in self.rows
            ],
        }


def estimate_for(
    loads: Mapping[str, Workload], hardware: Hardware, replicas: int, limit: int | None = None
) -> Estimate:
    """Estimates the memory for 1, 2, 4, ... and all replicas.

    Args:
        loads: The workload for each dtype.
        hardware: Where.
        replicas: The largest number of replicas.
        limit: Bytes that a worker may use; None for those of a GPU or of the machine.
    """
    counts = replica_counts(replicas)
    rows = []
    for dtype, load in loads.items():
        for count in counts:
            share = -(-load.batch_size // count)
            for state, stage in _STAGES.items():
                if stage == 0 or count > 1:
                    memory = worker_memory(load, hardware, share, count, stage)
                    rows.append(EstimateRow(count, dtype, state, share, memory))
    first = next(iter(loads.values()))
    here = hardware.gpu_bytes if hardware.gpus else hardware.memory_bytes
    limit = here if limit is None else limit
    return Estimate(first.model, first.batch_size, limit, tuple(rows), first.notes)


def replica_counts(most: int) -> list[int]:
    """Lists powers of two up to a number, and the number.

    Args:
        most: The number.

    Example:
        >>> replica_counts(6)
        [1, 2, 4, 6]
    """
    return sorted({most, *(2**i for i in range(most.bit_length()) if 2**i < most)})


def parse_size(text: str) -> int:
    """Reads a number of bytes.

    Args:
        text: Such as "16GiB", "512 MiB" or "1.5g".

    Raises:
        ArgumentError: The text is no size.

    Example:
        >>> parse_size("16GiB"), parse_size("1.5m")
        (17179869184, 1572864)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt])(?:i?b)?\s*", text.lower())
    if match is None or float(match[1]) <= 0:
        raise ArgumentError(
            "A size must be a number with KiB, MiB, GiB or TiB. Received: "
            f"{text!r}. For example: 16GiB."
        )
    return int(float(match[1]) * _UNITS[match[2]])


def _title(found: Estimate) -> str:
    return (
        f"{found.model}, batch of {found.batch_size}: memory of a worker, which may use "
        f"{size(found.limit)}"
    )


def _columns(found: Estimate) -> list[str]:
    return ["replicas", "dtype", "state", "rows", *found.rows[0].memory, "total", ""]


def _cells(found: Estimate, row: EstimateRow) -> list[str]:
    over = row.total - found.limit
    verdict = "fits" if over <= 0 else f"{size(over)} too much"
    parts = [size(part) for part in row.memory.values()]
    return [
        str(row.replicas), row.dtype, row.state, str(row.rows), *parts, size(row.total), verdict
    ]  # fmt: skip


def _conclusion(found: Estimate) -> list[str]:
    lines = [f"note: {note}" for note in found.notes]
    if found.fits:
        return [
            *lines,
            f"It fits on one worker, with {size(found.limit - found.rows[0].total)} left.",
        ]
    return [*lines, "It does not fit on one worker.", *(f"- {r}" for r in found.remedies)]


def _remedies(found: Estimate) -> list[str]:
    """Lists the first row of each kind that fits, and what changes the model or its batch."""
    remedies = []
    for dtype in dict.fromkeys(row.dtype for row in found.rows):
        for state in _STAGES:
            rows = [r for r in found.rows if (r.dtype, r.state) == (dtype, state)]
            fitting = next((row for row in rows if row.total <= found.limit), None)
            if fitting is not None:
                remedies.append(_how(fitting))
    alone = found.rows[0]
    fixed = alone.total - alone.memory["activations"] - alone.memory["input"]
    room = found.limit - fixed
    if room > 0:
        part = room / max(1, alone.total - fixed)
        most = 2 ** int(alone.rows * part).bit_length() // 2
        if most:
            times = -(-found.batch_size // most)
            remedies.append(
                f"On one worker: batch_size={most} with gradient_accumulation_steps={times} of "
                "the optimizer, or tfdist.recompute(model)."
            )
    if not remedies:
        remedies.append("Nothing here fits: use more or larger devices, or a smaller model.")
    return _shortest(remedies)


def _shortest(remedies: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(remedies))


def _how(row: EstimateRow) -> str:
    workers = f"{row.replicas} workers" if row.replicas > 1 else "One worker"
    precision = ' with keras.config.set_dtype_policy("mixed_bfloat16")'
    zero = f" with tfdist.Zero({row.state[-1]})" if row.state != "whole" else ""
    return f"{workers}{zero}{precision if row.dtype == 'bfloat16' else ''}: {size(row.total)}."
