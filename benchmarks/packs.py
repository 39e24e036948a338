"""Memory and time of a step with gradients in packs over those with all in one tensor.

python -m benchmarks.packs

Two workers of `multi_worker`, Adam. Memory is the peak during steps, less what was resident
when model and optimizer were built. The runs alternate, each in processes of its own.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.report import measured, ratio, show

WORKER = Path(__file__).with_name("packs_worker.py")
MODELS = {"12 x 2048 x 2048": "12,2048", "6 x 983 x 983": "6,983", "60 x 27 x 27": "60,27"}
PAIRS = 3


def main() -> None:
    memory, times = [], []
    for name, model in MODELS.items():
        pairs = [
            [measured(WORKER, f"{model},{kind}", "-n", "2") for kind in ("packs", "one tensor")]
            for _ in range(PAIRS)
        ]
        for found, index, unit in ((memory, 0, "MiB"), (times, 1, "ms")):
            values = [[run[index] for run in pair] for pair in pairs]
            middle = [sorted(column)[PAIRS // 2] for column in zip(*values, strict=True)]
            detail = f"{middle[0]:.4g} / {middle[1]:.4g} {unit}"
            found.append(ratio(name, [ours / theirs for ours, theirs in values], "", detail))
    show("Memory of a step, gradients in packs / in one tensor", memory)
    show("Time of a step, gradients in packs / in one tensor", times)


if __name__ == "__main__":
    main()
