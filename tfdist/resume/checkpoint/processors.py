"""The processors of a training. The last bits of its sums depend on them."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfdist.launch.resources import usable_cores
from tfdist.strategies.base import Strategy

# The extensions of x86 by which TensorFlow chooses its kernels, the widest first.
_INSTRUCTIONS = ("amx_bf16", "avx512f", "avx2", "avx")


def describe(strategy: Strategy) -> dict[str, Any]:
    """Describes the replicas of a training, and each worker's processor. All must call it.

    Args:
        strategy: The strategy that connects the workers.

    Returns:
        Plain data: the strategy's name, the number of replicas, and for each worker its number
        of compute threads and the instructions of its processor.
    """
    own = [_threads(), _instructions()]
    workers = [own] if strategy.elastic else strategy.gather_objects(own)
    return {
        "strategy": strategy.name,
        "replicas": strategy.place.num_replicas,
        "workers": [list(worker) for worker in workers],
    }


def warning_of(now: dict[str, Any], saved: Any) -> str | None:
    """Says that a training goes on with other bits, which one would not expect.

    Args:
        now: The result of `describe`.
        saved: The result of `describe` in the checkpoint, or None if it has none.

    Returns:
        A clause; None if the processors are the same, or if the number of replicas differs too,
        since no one expects the same bits then.
    """
    if not isinstance(saved, dict) or now == saved:
        return None
    if any(now[name] != saved.get(name) for name in ("strategy", "replicas")):
        return None
    return (
        f"the workers have {_words(now['workers'])}, and had {_words(saved.get('workers'))} "
        "when it was saved. Weights are the same up to the order of float additions, not bit "
        "by bit (TF_NUM_INTRAOP_THREADS sets the number of threads)"
    )


def _words(workers: Any) -> str:
    """Formats the processors of workers: `1, 1 threads (avx2)`."""
    if not isinstance(workers, list) or not all(
        isinstance(worker, list) and len(worker) == 2 for worker in workers
    ):
        return "others"
    threads = ", ".join(str(count)[:8] for count, _ in workers)
    kinds = ", ".join(sorted({str(kind)[:16] for _, kind in workers}))
    return f"{threads} threads ({kinds})"


def _threads() -> int:
    """Returns the number of threads with which TensorFlow computes one operation."""
    chosen = tf.config.threading.get_intra_op_parallelism_threads()
    if not chosen:
        text = os.environ.get("TF_NUM_INTRAOP_THREADS", "")
        chosen = int(text) if text.isdigit() else 0
    return int(chosen) or usable_cores()


def _instructions() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # macOS, Windows
        return platform.machine()
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return next((name for name in _INSTRUCTIONS if name in flags), platform.machine())
