"""Memory and time of a step with state in parts over plain data parallelism.

python -m benchmarks.model_parallel [STAGE ...]

Two workers, Adam, `tfdist.Zero` of stage 1 and 3. The runs alternate, each in processes of its
own. Memory is what the first worker's process has more than before the model was made: its peak
from then on, its peak in steps after the second, and its weights and the optimizer's state.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.report import Ratio, measured, ratio, show

WORKER = Path(__file__).with_name("model_parallel_worker.py")
MODELS = {"3 x 2048 x 2048": "3,2048", "12 x 2048 x 2048": "12,2048"}
STRATEGIES = ("multi_worker", "horovod")
PAIRS = 3
FIGURES = (
    ("Weights and optimizer's state, in parts / whole", "MiB", ""),
    ("Peak of a training, in parts / whole", "MiB", ""),
    ("Peak in steps, in parts / whole", "MiB", ""),
    ("Time of a step, in parts / whole", "ms", "<= 1.05"),
)


def compare(stage: str, strategy: str, model: str) -> list[list[list[float]]]:
    """Runs pairs; gives for each figure the values with and without parts."""
    pairs = []
    for number in range(PAIRS):
        kinds = (stage, "0") if number % 2 else ("0", stage)
        runs = {
            kind: measured(WORKER, f"{model},{kind}", "-n", "2", "--strategy", strategy)
            for kind in kinds
        }
        pairs.append((runs[stage], runs["0"]))
    return [[[run[index] for run in pair] for pair in pairs] for index in range(len(FIGURES))]


def main(stages: list[str]) -> None:
    found: list[list[Ratio]] = [[] for _ in FIGURES]
    for stage in stages or ["1", "3"]:
        for strategy in STRATEGIES:
            for name, model in MODELS.items():
                of_figures = compare(stage, strategy, model)
                for figure, values, ratios in zip(FIGURES, of_figures, found, strict=True):
                    _, unit, goal = figure
                    middle = [
                        sorted(column)[PAIRS // 2] for column in zip(*values, strict=True)
                    ]
                    detail = f"{middle[0]:.4g} / {middle[1]:.4g} {unit}"
                    title = f"stage {stage}, {strategy}, {name}"
                    pairs = [ours / theirs for ours, theirs in values]
                    ratios.append(ratio(title, pairs, goal, detail))
    for (title, *_), ratios_of_all in zip(FIGURES, found, strict=True):
        show(title, ratios_of_all)


if __name__ == "__main__":
    main(sys.argv[1:])
