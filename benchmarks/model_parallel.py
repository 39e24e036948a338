"""Memory and time of a step with the optimizer's state in parts over plain data parallelism.

python -m benchmarks.model_parallel

Two workers, Adam. The runs alternate, each in processes of its own. Memory is what the first
worker's process has more than before the model was made: its peak from then on, its peak in
steps after the second, and the optimizer's state.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.report import Ratio, measured, ratio, show

WORKER = Path(__file__).with_name("model_parallel_worker.py")
MODELS = {"3 x 2048 x 2048": "3,2048", "12 x 2048 x 2048": "12,2048"}
STRATEGIES = ("multi_worker", "horovod")
PAIRS = 3
FIGURES = (
    ("Optimizer's state, in parts / whole", "MiB", "<= 0.55"),
    ("Peak of a training, in parts / whole", "MiB", ""),
    ("Peak in steps, in parts / whole", "MiB", ""),
    ("Time of a step, in parts / whole", "ms", "<= 1.05"),
)


def main() -> None:
    found: list[list[Ratio]] = [[] for _ in FIGURES]
    for strategy in STRATEGIES:
        for name, model in MODELS.items():
            pairs = [
                [
                    measured(WORKER, f"{model},{kind}", "-n", "2", "--strategy", strategy)
                    for kind in (("zero", "plain") if number % 2 else ("plain", "zero"))
                ][:: 1 if number % 2 else -1]
                for number in range(PAIRS)
            ]
            for index, (_, unit, goal) in enumerate(FIGURES):
                values = [[run[index] for run in pair] for pair in pairs]
                middle = [sorted(column)[PAIRS // 2] for column in zip(*values, strict=True)]
                detail = f"{middle[0]:.4g} / {middle[1]:.4g} {unit}"
                ratios = [ours / theirs for ours, theirs in values]
                found[index].append(ratio(f"{strategy}, {name}", ratios, goal, detail))
    for (title, *_), ratios_of_all in zip(FIGURES, found, strict=True):
        show(title, ratios_of_all)


if __name__ == "__main__":
    main()
