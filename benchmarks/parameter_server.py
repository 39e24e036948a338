"""Parameter servers: against tf_keras, by number of workers, and the bytes of a step.

    python -m benchmarks.parameter_server

tf_keras is the Keras 2 that ParameterServerStrategy was written for; it is left out if not
installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.report import Ratio, ratio, show

WORKER = Path(__file__).with_name("parameter_server_worker.py")
ROUNDS = 3


def measured(workers: int, what: str) -> list[Any]:
    """Runs the worker's script on a chief and reads what it measured."""
    return report.measured(WORKER, what, "-n", str(workers), "--ps", "2")


def by_workers() -> list[Ratio]:
    """Steps a second of two and three workers over those of one."""
    rates: dict[int, list[float]] = {1: [], 2: [], 3: []}
    for _ in range(ROUNDS):
        for workers, found in rates.items():
            found += measured(workers, "rate")
    return [
        ratio(
            f"{workers} workers over one",
            [a / b for a, b in zip(rates[workers], rates[1], strict=True)],
            detail=f"{sorted(rates[workers])[ROUNDS // 2]:.3g} steps/s",
        )
        for workers in (2, 3)
    ]


def main() -> None:
    if importlib.util.find_spec("tf_keras"):
        against = [Ratio(**r) for r in measured(2, "tf_keras")]
        show("Steps a second of tfdist over those of tf_keras", against)
    show("Steps a second by number of workers, on the same cores", by_workers())
    show("Bytes of a step", [Ratio(**r) for r in measured(2, "bytes")])


if __name__ == "__main__":
    main()
