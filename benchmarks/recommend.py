"""Predicted beside measured steps, and whether what `tfdist recommend` chooses is fastest.

python -m benchmarks.recommend [--write] [--models N] [--steps N] [--rounds N] [--report FILE]

Each strategy trains all models in processes of its own, in every round, and the predictions of
a round are made between its trainings. Two machines are network namespaces with a core each,
which need root; without it that part is skipped, and says so. `--write` puts the tables into
docs/choosing.md and docs/development/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import links
from benchmarks.compression import ROOT, run_all, show
from benchmarks.recommend_cases import Case, Totals, table_of, totals

WORKER = Path(__file__).with_name("recommend_worker.py")
MODELS = ("small MLP", "wide MLP", "CNN", "encoder", "embedding", "LSTM")
ACROSS = ("small MLP", "CNN")  # on two machines
RATES = ("1000mbit", "100mbit")
STRATEGIES = {
    "single": [],
    "multi_worker": ["-n", "2"],
    "horovod": ["--strategy", "horovod", "-n", "2"],
    "parameter_server": ["-n", "2", "--ps", "1", "--synchronous"],
}
KINDS = ("measured links", "usual links")
Times = dict[str, float]


def launched(options: Sequence[str]) -> list[str]:
    """Gives the command that trains with a strategy: the script itself for one process."""
    run = ["-m", "tfdist.cli", "run", "--output", "all", *options] if options else []
    return [sys.executable, *run, str(WORKER), "train"]


def test_links() -> None:
    """Measures the links between two workers of this machine, for `recommend`."""
    for name, options in STRATEGIES.items():
        if options:
            test = [sys.executable, "-m", "tfdist.cli", "test", "--seconds", "5", "--json"]
            done = subprocess.run(
                [*test, *options], cwd=ROOT, capture_output=True, text=True, timeout=600
            )
            if done.returncode:
                raise RuntimeError(f"tfdist test, {name}:\n{done.stderr[-3000:]}")
            print(f"links of {name}: {json.loads(done.stdout)['lines']}", flush=True)


def predict(names: Sequence[str], place: Sequence[str] = ("2", "1", "1", "-")) -> Any:
    """Predicts steps; `place` is workers, hosts, servers and the link's rate."""
    return dict(run_all([[sys.executable, str(WORKER), "predict", *place, *names]]))


def here(names: Sequence[str], steps: int, rounds: int) -> list[Case]:
    """Measures all models on this machine."""
    times: dict[str, dict[str, list[float]]] = {n: {s: [] for s in STRATEGIES} for n in names}
    predictions = []
    for number in range(rounds):
        order = list(STRATEGIES.items())
        for index, (strategy, options) in enumerate(order if number % 2 == 0 else order[::-1]):
            if index == len(order) // 2:
                predictions.append(predict(names))
            found = run_all([[*launched(options), str(steps), *names]])
            print(f"round {number + 1}, {strategy}: {found}", flush=True)
            for name, seconds in found:
                times[name][strategy].append(seconds)
    return [
        case(
            name,
            {strategy: median(found) for strategy, found in times[name].items()},
            [prediction[name] for prediction in predictions],
        )
        for name in names
    ]


def case(name: str, measured: Times, predictions: Sequence[Any]) -> Case:
    """Joins what was measured and predicted; the choice is that of the first round."""

    def steps(kind: str) -> Times:
        each = [prediction[kind]["steps"] for prediction in predictions]
        return {s: median(sum(found[s]) for found in each) for s in measured}

    print(f"predicted for {name}: {predictions}", flush=True)
    choices = {kind: predictions[0][kind]["best"] for kind in KINDS}
    return Case(name, measured, {kind: steps(kind) for kind in KINDS}, choices)


def across(names: Sequence[str], steps: int) -> list[Case]:
    """Measures some models on two machines of one core each, at several rates."""
    why = links.obstacle()
    if why is not None:
        print(f"Two machines are skipped: {why}.", flush=True)
        return []
    before = os.sched_getaffinity(0)
    first, second = sorted(before)[:2]
    cases = []
    alone: Times = {}
    with links.linked() as link:
        for rate in RATES:
            os.sched_setaffinity(0, {first})  # as a machine of one core
            try:
                if not alone:
                    alone = dict(run_all([[*launched([]), str(steps), *names]]))
                predictions = predict(names, ("2", "2", "1", rate))
            finally:
                os.sched_setaffinity(0, before)
            link.limit(int(rate.removesuffix("mbit")))
            together = {
                strategy: dict(run_all(_on_both(link, (first, second), strategy, steps, names)))
                for strategy in ("multi_worker", "horovod")
            }
            for name in names:
                measured = {"single": alone[name]}
                measured |= {strategy: found[name] for strategy, found in together.items()}
                cases.append(case(f"{name}, {rate}", measured, [predictions[name]]))
    return cases


def _on_both(
    link: links.Link, cores: tuple[int, int], strategy: str, steps: int, names: Sequence[str]
) -> list[list[str]]:
    hosts = ["--hosts", ",".join(f"{address}:1" for address in link.addresses)]
    commands = []
    for rank, core in enumerate(cores):
        options = ["--strategy", strategy, *hosts, "--node-rank", str(rank)]
        pinned = [*link.within(rank), "taskset", "--cpu-list", str(core)]
        commands.append([*pinned, *launched(options), str(steps), *names])
    return commands


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="the tables into the docs")
    parser.add_argument("--models", type=int, default=len(MODELS), help="how many models")
    parser.add_argument("--steps", type=int, default=40, help="that are timed, of a training")
    parser.add_argument("--rounds", type=int, default=2, help="on this machine")
    parser.add_argument("--one-machine", action="store_true", help="leave out two machines")
    parser.add_argument("--report", type=Path, help="show this output of an earlier run again")
    options = parser.parse_args(arguments)
    if options.report is not None:
        last = options.report.read_text("utf-8").rpartition("cases ")[2]
        report([Case(**values) for values in json.loads(last.splitlines()[0])], options.write)
        return
    with tempfile.TemporaryDirectory(prefix="tfdist-recommend-") as cache:
        os.environ["TFDIST_CACHE_DIR"] = cache  # what was measured before does not count
        test_links()
        cases = here(MODELS[: options.models], options.steps, options.rounds)
    keep(cases)
    if not options.one_machine:
        cases += across(ACROSS, options.steps)
        keep(cases)
    report(cases, options.write)


def keep(cases: Sequence[Case]) -> None:
    """Prints all numbers so far, for `--report`."""
    print("cases", json.dumps([asdict(case) for case in cases]), flush=True)


def report(cases: Sequence[Case], writes: bool) -> None:
    """Prints the tables, and writes them into the docs if asked to."""
    columns = ["case", *(f"{name}, ms" for name in STRATEGIES), "recommended", "right"]
    cells = show("Predicted / measured steps", columns, table_of(cases, STRATEGIES, KINDS[0]))
    rows = [row_of(kind, totals(cases, kind)) for kind in KINDS]
    goals = ["goal", "25 %", "", "", "90 %", ""]
    columns = ["", "median error", "largest error", "cells", "right", "`single` is fastest"]
    summary = show("The cost model", columns, [*rows, goals])
    if writes:
        write(ROOT / "docs" / "development" / "benchmarks.md", "steps", cells)
        write(ROOT / "docs" / "choosing.md", "errors", summary)


def row_of(kind: str, total: Totals) -> list[str]:
    return [
        kind,
        f"{100 * total.median_error:.0f} %",
        f"{100 * total.largest_error:.0f} %",
        str(total.cells),
        f"{total.right} of {total.cases}",
        f"{total.single_is_fastest} of {total.cases}",
    ]


def write(page: Path, name: str, text: str) -> None:
    """Puts a table between its marks in a page."""
    content = page.read_text("utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = content.split(begin)
    page.write_text(before + begin + text + "\n" + end + rest.split(end)[1], "utf-8")


if __name__ == "__main__":
    main()
