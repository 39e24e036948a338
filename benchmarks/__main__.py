"""Runs all benchmarks, one after the other, each in a process of its own.

python -m benchmarks
"""

from __future__ import annotations

import subprocess
import sys

for name in (
    "overhead",
    "input_road",
    "scaling",
    "recommend",
    "packs",
    "model_parallel",
    "recompute",
    "horovod",
    "compression",
    "federated",
    "parameter_server",
    "imbalance",
    "augment",
    "privacy",
    "privacy_memory",
    "privacy_utility",
    "resilience",
    "chaos",
):
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
