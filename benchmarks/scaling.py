"""Two workers on a core each over one worker on one core, for tfdist and for tf_keras.

    python -m benchmarks.scaling

The global batch is the same, so each of two workers computes half of it. tf_keras is the
Keras 2 that MultiWorkerMirroredStrategy was written for; it is left out if not installed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.report import Ratio, ratio, show

WORKER = Path(__file__).with_name("scaling_worker.py")
ROWS, BATCH = 6144, 512


def rate(library: str, workers: int) -> float:
    """Runs a training in processes of its own and reads its examples/s."""
    launch = ["tfdist.cli", "run", "-n"]
    if library == "horovod":
        launch[2:2] = ["--strategy", "horovod"]
    if library == "tf_keras":
        launch = ["benchmarks.plain_launcher"]
    # One thread for compute on one core, for one worker as for two.
    environ = os.environ | dict.fromkeys(("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS"), "1")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            *launch,
            str(workers),
            str(WORKER),
            library,
            str(ROWS),
            str(BATCH),
        ],
        env=environ,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    found = re.search(r"examples/s ([\d.]+)", done.stdout)
    if done.returncode or not found:
        raise RuntimeError(
            f"{library} on {workers}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
    return float(found[1])


def efficiency(library: str, rounds: int) -> Ratio:
    """Measures one and two workers in turn."""
    ones, twos = [], []
    for _ in range(rounds):
        ones.append(rate(library, 1))
        twos.append(rate(library, 2))
    detail = f"{sorted(twos)[rounds // 2]:.0f} / 2 x {sorted(ones)[rounds // 2]:.0f} examples/s"
    pairs = [two / (2 * one) for one, two in zip(ones, twos, strict=True)]
    goal = "" if library == "tf_keras" else ">= 0.92"
    return ratio(f"{library}, CNN, batch {BATCH}", pairs, goal, detail)


def main() -> None:
    results = [efficiency("tfdist", 3)]
    if importlib.util.find_spec("tf_keras"):
        results.append(efficiency("tf_keras", 3))
    show("Efficiency of two workers on a core each over one", results)


if __name__ == "__main__":
    main()
