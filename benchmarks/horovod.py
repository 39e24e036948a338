"""Horovod: against a loop by hand, against MultiWorkerMirrored, and two ranks over one.

python -m benchmarks.horovod
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.report import Ratio, ratio, show
from benchmarks.scaling import efficiency

WORKER = Path(__file__).with_name("horovod_worker.py")
ROUNDS = 3


def measured(strategy: str, what: str) -> list[Any]:
    """Runs the worker on two ranks and reads what the first one measured."""
    return report.measured(WORKER, what, "-n", "2", "--strategy", strategy)


def beside_multi_worker() -> list[Ratio]:
    """Steps of Horovod over those of MultiWorkerMirrored, both by tfdist."""
    horovod, multi_worker = [], []
    for _ in range(ROUNDS):
        horovod.append(measured("horovod", "step"))
        multi_worker.append(measured("multi_worker", "step"))
    results = []
    for model, name in enumerate(("many small variables", "few large ones")):
        pairs = [(h[model], m[model]) for h, m in zip(horovod, multi_worker, strict=True)]
        ours, theirs = sorted(pairs)[ROUNDS // 2]
        detail = f"{ours * 1e3:.3g} / {theirs * 1e3:.3g} ms"
        ratios = [h / m for h, m in pairs]
        results.append(ratio(f"horovod over multi_worker, {name}", ratios, "", detail))
    return results


def main() -> None:
    within = [Ratio(**r) for what in ("overhead", "sparse") for r in measured("horovod", what)]
    show("A step on two ranks", [*within, *beside_multi_worker()])
    show("Efficiency of two ranks on a core each over one", [efficiency("horovod", ROUNDS)])


if __name__ == "__main__":
    main()
