"""Compression: bytes on the wire, accuracy, time of a step by the rate of the link, its cost.

python -m benchmarks.compression [--write] [--torch PYTHON]

Two machines are network namespaces, which need root; without it the parts that need them are
skipped, and say so. `--write` puts the tables into docs/compression.md and the chart beside it.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import links

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("compression_worker.py")
TORCH_WORKER = Path(__file__).with_name("compression_torch_worker.py")
PAGE = ROOT / "docs" / "compression.md"
PICTURE = ROOT / "docs" / "images" / "compression.svg"
NAMES = ("none", "bf16", "PowerSGD 1", "PowerSGD 2", "PowerSGD 4")
SEEDS, ROUNDS = 5, 6
RATES: tuple[int | None, ...] = (100, 300, 1000, None)  # Mbit/s
LIMIT_S = 1800
Rows = list[list[str]]


def run_all(commands: Sequence[Sequence[str]], **environ: str) -> list[Any]:
    """Runs commands beside each other, and reads what one of them measured.

    Raises:
        RuntimeError: One failed; with the end of what it printed.
    """
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, **quiet, **environ},
        )
        for command in commands
    ]
    try:
        printed = [process.communicate(timeout=LIMIT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = re.search(r"measured (\[.*\])", "".join(printed))
    if found is None or any(process.returncode for process in processes):
        raise RuntimeError("\n".join(text[-3000:] for text in printed))
    results: list[Any] = ast.literal_eval(found[1])
    return results


def on_link(link: links.Link, mbit: int | None, model: str, steps: int) -> dict[str, Any]:
    """Measures steps of two workers; gives seconds and bytes of each by compression."""
    link.limit(mbit)
    run = [sys.executable, "-m", "tfdist.cli", "run", "-n", "2", "--output", "all"]
    run += ["--hosts", ",".join(link.addresses)]
    worker = [str(WORKER), "steps", model, str(steps), *NAMES]
    commands = [[*link.within(i), *run, "--node-rank", str(i), *worker] for i in range(2)]
    return {name: (seconds, sent) for name, seconds, sent, _ in run_all(commands)}


def with_horovod(link: links.Link, model: str, steps: int) -> dict[str, Any]:
    """As `on_link`, of two ranks of one machine, and both of what it sends to itself."""
    run = [sys.executable, "-m", "tfdist.cli", "run", "-n", "2", "--output", "all"]
    run += ["--strategy", "horovod"]
    worker = [str(WORKER), "steps", model, str(steps), "none", "fp16", "bf16", "PowerSGD 2"]
    command = [*link.within(0), *run, *worker]
    found = run_all([command], **{links.VARIABLE: "lo"})
    return {name: (seconds, sent / 2) for name, seconds, sent, _ in found}


def alone(model: str, steps: int, name: str) -> list[tuple[float, float]]:
    """Compares steps with and without compression in one process, in turn.

    Returns:
        The seconds of a step without, and the median ratio: by the clock, and of the processor.
    """
    names = ["none", name] * ROUNDS
    worker = [sys.executable, str(WORKER), "alone", model, str(steps), *names]
    measured = [(seconds, busy) for _, seconds, _, busy in run_all([worker])]
    found = []
    for times in zip(*measured, strict=True):
        ratios = [b / a for a, b in zip(times[::2], times[1::2], strict=True)]
        found.append((statistics.median(times[::2]), statistics.median(ratios)))
    return found


def accuracies(task: str) -> dict[str, list[float]]:
    """Gives accuracies on held-out data of each compression, one a seed."""
    return dict(run_all([[sys.executable, str(WORKER), "accuracy", task, str(SEEDS)]]))


def accuracy_table(wire: dict[str, dict[str, Any]]) -> Rows:
    rows = []
    for task in ("digits", "words"):
        found, sent = accuracies(task), wire.get(task, {})
        for name in NAMES:
            scores = [100 * score for score in found[name]]
            spread = f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f}"
            rows.append([task, name, *_bytes(sent, name), spread])
    return rows


def _bytes(sent: dict[str, Any], name: str) -> list[str]:
    if not sent:
        return ["not measured", ""]
    return [f"{sent[name][1]:,.0f}", f"{sent['none'][1] / sent[name][1]:.1f}"]


def time_table(times: dict[int | None, dict[str, Any]]) -> Rows:
    rows = []
    for rate, found in times.items():
        plain = found["none"][0]
        cells = [f"{1e3 * found[n][0]:.0f} ({plain / found[n][0]:.2g}x)" for n in NAMES]
        rows.append(["no limit" if rate is None else f"{rate} Mbit/s", *cells])
    return rows


def torch_steps(python: str, link: links.Link) -> Rows:
    """Measures DDP's hook with the same model and ranks, in a Python that has PyTorch."""
    asked = [python, "-c", "import torch"]
    if subprocess.run(asked, check=False, capture_output=True).returncode:
        return [[f"skipped: {python} has no PyTorch", "", ""]]
    commands = [
        [*link.within(i), python, str(TORCH_WORKER), str(i), link.addresses[0], links.DEVICE]
        for i in range(2)
    ]
    link.limit(None)
    found = run_all(commands)
    return [[name, f"{1e3 * seconds:.1f}", f"{sent:,.0f}"] for name, seconds, sent in found]


def show(title: str, columns: Sequence[str], rows: Rows) -> str:
    """Prints a table, and gives it as Markdown."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def chart(times: dict[int | None, dict[str, Any]]) -> None:
    """Draws the time of a step by the rate of the link."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "tfdist"
    rates = [rate for rate in times if rate is not None]
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for name in NAMES:
        axes.plot(rates, [1e3 * times[r][name][0] for r in rates], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="link, Mbit/s", ylabel="step, ms")
    axes.set_xticks(rates, [str(rate) for rate in rates])
    axes.minorticks_off()
    axes.set_title("A step of 10 million weights on two workers")
    axes.legend()
    figure.savefig(PICTURE, metadata={"Date": None}, bbox_inches="tight")


def write(name: str, text: str) -> None:
    """Puts a table between its marks in the page."""
    page = PAGE.read_text("utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = page.split(begin)
    PAGE.write_text(before + begin + text + "\n" + end + rest.split(end)[1], "utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/compression.md")
    parser.add_argument("--torch", metavar="PYTHON", help="that has PyTorch")
    options = parser.parse_args(arguments)
    wire: dict[str, dict[str, Any]] = {}
    why = links.obstacle()
    if why is not None:
        print(f"Bytes on the wire and times by rate are skipped: {why}.", flush=True)
    else:
        with links.linked() as link:
            wire = across(link, options.torch, options.write)
    rows = []
    for model, steps in (("cnn", 60), ("large", 10)):
        pairs = alone(model, steps, "PowerSGD 2")
        cells = [(f"{1e3 * seconds:.1f}", f"{ratio:.2f}") for seconds, ratio in pairs]
        rows.append([model, *itertools.chain(*cells)])
    columns = ["model", "step without, ms", "with PowerSGD 2, times"]
    columns += ["processor without, ms", "with PowerSGD 2, times"]
    report("cost", "What compressing costs, in one process", columns, rows, options.write)
    columns = ["task", "compression", "bytes a step and worker", "times fewer", "accuracy, %"]
    report("accuracies", "Accuracy", columns, accuracy_table(wire), options.write)


def across(link: links.Link, python: str | None, writes: bool) -> dict[str, dict[str, Any]]:
    """Measures what needs two machines; gives bytes and seconds by model and compression."""
    wire = {model: on_link(link, None, model, 40) for model in ("digits", "words")}
    times = {rate: on_link(link, rate, "large", 6) for rate in RATES}
    columns = ["link", *(f"{name}, ms" for name in NAMES)]
    report("times", "A step of 10 million weights", columns, time_table(times), writes)
    if writes:
        chart(times)
    horovod = with_horovod(link, "digits", 40)
    rows = [[n, f"{1e3 * s:.1f}", f"{b:,.0f}"] for n, (s, b) in horovod.items()]
    columns = ["compression", "step, ms", "bytes a step and rank"]
    report("horovod", "Horovod, the digits' model", columns, rows, writes)
    if python is not None:
        show("PyTorch's hook, the digits' model", columns, torch_steps(python, link))
    return wire


def report(name: str, title: str, columns: Sequence[str], rows: Rows, writes: bool) -> None:
    """Shows a table, and puts it into the page if it is to."""
    text = show(title, columns, rows)
    if writes:
        write(name, text)


if __name__ == "__main__":
    main()
