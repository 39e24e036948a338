"""What several local steps, secure sums and privacy of clients cost and gain; on digits.

python -m benchmarks.federated [--write] [--results FILE] [--seeds N]

`--write` puts the tables into docs/federated.md and the chart beside it. With `--results`, what
a run that was interrupted has measured is read from a file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from benchmarks import federated_worker as worker
from benchmarks.report import measured
from tfdist.federated.masks import PairwiseMasks

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "federated.md"
PICTURE = ROOT / "docs" / "images" / "federated.svg"
SEEDS = 5
CLIENTS = (5, 50)
KINDS = {True: "alike", False: "Dirichlet(0.1)"}
SYNCHRONOUS = "all clients in each step"
EPSILONS = (4.0, 8.0, None)
BYTES = 4 * worker.WEIGHTS  # what a client sends in an exchange, in float32

Rows = list[list[str]]
Curves = list[list[float]]


class Results:
    """What was measured, kept in a file.

    Args:
        path: The file, or None.
        seeds: How many seeds.
    """

    def __init__(self, path: Path | None, seeds: int) -> None:
        self.seeds = seeds
        self._path = path
        self._found: dict[str, Any] = {}
        if path is not None and path.exists():
            self._found = json.loads(path.read_text("utf-8"))

    def of(self, name: str, measure: Callable[[], Any]) -> Any:
        """Gives what was measured under a name, or measures it."""
        if name not in self._found:
            began = time.monotonic()
            self._found[name] = measure()
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
            if self._path is not None:
                self._path.write_text(json.dumps(self._found), "utf-8")
        return self._found[name]


def curve(results: Results, method: str, clients: int, alike: bool, seed: int) -> list[float]:
    """Gives the accuracies by round."""
    if method == SYNCHRONOUS:
        return results.of(  # type: ignore[no-any-return]
            f"{method}, {clients}, seed {seed}", lambda: worker.synchronous(seed, clients)
        )
    return results.of(  # type: ignore[no-any-return]
        f"{method}, {clients}, {KINDS[alike]}, seed {seed}",
        lambda: worker.federated(seed, clients, alike, method),
    )


def curves(results: Results, method: str, clients: int, alike: bool) -> Curves:
    return [curve(results, method, clients, alike, seed) for seed in range(results.seeds)]


def measure(results: Results) -> None:
    """Measures seed by seed, so that a run that ends early has whole columns."""
    for seed in range(results.seeds):
        for clients in CLIENTS:
            for method in (SYNCHRONOUS, *worker.METHODS):
                for alike in KINDS:
                    curve(results, method, clients, alike, seed)
        for epsilon in EPSILONS:
            private(results, epsilon, seed)


def private(results: Results, epsilon: float | None, seed: int) -> list[float]:
    return results.of(  # type: ignore[no-any-return]
        f"epsilon {epsilon}, seed {seed}", lambda: worker.private(seed, epsilon)
    )


def _clients(number: int) -> str:
    drawn = f", {worker.DRAWN} a round" if number > worker.DRAWN else ""
    return f"{number} clients{drawn}"


def cell(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def accuracy_rows(results: Results) -> Rows:
    cases = [(clients, alike) for clients in CLIENTS for alike in KINDS]
    titles = [f"{_clients(clients)}, {KINDS[alike]}" for clients, alike in cases]
    rows = [["training", "exchanges", *titles], ["---"] * (2 + len(cases))]
    for exchanges, end in ((worker.ROUNDS * worker.STEPS, -1), (worker.ROUNDS, None)):
        cells = []
        for clients in CLIENTS:
            found = curves(results, SYNCHRONOUS, clients, alike=True)
            place = worker.ROUNDS * worker.PARTS // worker.STEPS - 1 if end is None else end
            cells += [cell([accuracies[place] for accuracies in found]), "the same"]
        rows.append([SYNCHRONOUS, str(exchanges), *cells])
    for method in worker.METHODS:
        cells = [cell([c[-1] for c in curves(results, method, *case)]) for case in cases]
        rows.append([method, str(worker.ROUNDS), *cells])
    return rows


def chart(results: Results) -> None:
    """Draws accuracy by the bytes that a client has sent, of clients that differ."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "tfdist"
    figure, both = plt.subplots(1, 2, figsize=(8.4, 3.8), sharey=True, layout="constrained")
    for axes, clients in zip(both, CLIENTS, strict=True):
        for method in (SYNCHRONOUS, *worker.METHODS):
            found = np.array(curves(results, method, clients, alike=False))
            exchanges = worker.STEPS // worker.PARTS if method == SYNCHRONOUS else 1
            sent = np.arange(1, found.shape[1] + 1) * exchanges * BYTES / 1e6
            mean, spread = found.mean(0), found.std(0, ddof=1)
            style = {"color": "black", "linestyle": "--"} if method == SYNCHRONOUS else {}
            (line,) = axes.plot(sent, mean, label=method, linewidth=1.4, **style)
            axes.fill_between(
                sent, mean - spread, mean + spread, alpha=0.12, color=line.get_color(), lw=0
            )
        axes.set(xscale="log", xlabel="sent by a client, MB", ylim=(20, 100))
        axes.set_title(f"{_clients(clients)}, Dirichlet(0.1)")
    both[0].set_ylabel("held-out accuracy, %")
    both[1].legend(fontsize=8)
    figure.savefig(PICTURE, metadata={"Date": None}, bbox_inches="tight")


def privacy_rows(results: Results) -> Rows:
    rows = [["epsilon of whole clients", "accuracy"], ["---"] * 2]
    for epsilon in EPSILONS:
        name = "clipped, without noise" if epsilon is None else f"{epsilon:g}"
        found = [private(results, epsilon, seed)[-1] for seed in range(results.seeds)]
        rows.append([name, cell(found)])
    return rows


def masks_of(workers: int, bits: int) -> float:
    """Gives the milliseconds of a million masks with one other worker."""
    secrets = {other: bytes([other]) * 32 for other in range(1, workers)}
    masks = PairwiseMasks(0, secrets, bytes(32))
    numbers = [np.zeros(1_000_000, f"i{bits // 8}")]
    times = []
    for number in range(9):
        began = time.process_time()
        masks.add_to(number, 0, numbers)
        times.append(time.process_time() - began)
    return 1e3 * statistics.median(times) / (workers - 1)


def secure_rows(results: Results) -> Rows:
    """Compares rounds of three workers with a model of a million weights."""
    path = Path(worker.__file__)

    def rounds() -> list[Any]:
        return measured(path, "1000000", "-n", "3")

    found = results.of("secure sums, 3 workers", rounds)
    times = {name: [s for n, s in found if n == name] for name in ("none", "64", "32")}
    plain = statistics.median(times["none"])
    rows = [["sum", "round, ms", "bytes a weight", "masks, ms a worker"], ["---"] * 4]
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        shown = f"{1e3 * middle:.0f} ({middle / plain:.2g}x)"
        if name == "none":
            rows.append(["plain, float32", shown, "4", "none"])
            continue
        bits = int(name)
        masks = results.of(f"masks of {bits} bits", lambda b=bits: masks_of(4, b))  # type: ignore[misc]
        rows.append([f"secure, {bits} bits", shown, str(bits // 8), f"{masks:.1f}"])
    return rows


def report(name: str, rows: Rows, writes: bool) -> None:
    """Shows a table, and puts it between its marks in the page if it is to."""
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    print(text, flush=True)
    if not writes:
        return
    page = PAGE.read_text("utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = page.split(begin)
    PAGE.write_text(before + begin + text + "\n" + end + rest.split(end)[1], "utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/federated.md")
    parser.add_argument("--results", metavar="FILE", type=Path, help="that keeps results")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args(arguments)
    results = Results(options.results, options.seeds)
    worker.on_one_thread()
    measure(results)
    report("accuracies", accuracy_rows(results), options.write)
    report("privacy", privacy_rows(results), options.write)
    report("secure sums", secure_rows(results), options.write)
    if options.write:
        chart(results)


if __name__ == "__main__":
    main()
