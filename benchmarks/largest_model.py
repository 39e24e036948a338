"""Draws the largest model by the number of workers: computed, not measured.

python -m benchmarks.largest_model

Adam in float32. The bytes of a weight in a step, on each of N workers:

                     weight  Adam's state  gradient
data parallelism          4             8         4
Zero(stage=1)             4           8/N         4
Zero(stage=3)           4/N           8/N       4/N

With `Zero(stage=3)`, two whole layers of a hundred come in addition: the one that computes, and
the next one. Activations are not counted.
"""

from __future__ import annotations

from pathlib import Path

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "largest_model.svg"
WORKERS = (1, 2, 4, 8, 16, 32, 64)
LAYERS = 100
DEVICES = {"a machine or GPU of 24 GiB": 24, "a GPU of 80 GiB": 80}


def bytes_of_weight(kind: str, workers: int) -> float:
    """Gives the bytes of a weight on each worker.

    Args:
        kind: A key of the table at the top of this file.
        workers: Number of workers.
    """
    if kind == "Zero(stage=1)":
        return 4 + 8 / workers + 4
    if kind == "Zero(stage=3)" and workers > 1:
        return 16 / workers + 2 * 4 / LAYERS
    return 16.0


def largest(kind: str, workers: int, gib: float) -> float:
    """Gives the largest number of weights, in billions."""
    return gib * 2**30 / bytes_of_weight(kind, workers) / 1e9


def main() -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "tfdist"
    figure, panels = plt.subplots(1, 2, figsize=(8.2, 3.6), sharey=True)
    for axes, (name, gib) in zip(panels, DEVICES.items(), strict=True):
        for kind in ("data parallelism", "Zero(stage=1)", "Zero(stage=3)"):
            found = [largest(kind, workers, gib) for workers in WORKERS]
            axes.plot(WORKERS, found, marker="o", label=kind)
            print(name, kind, *(f"{n}: {b:.2f}" for n, b in zip(WORKERS, found, strict=True)))
        axes.set(xscale="log", yscale="log", xlabel="workers", title=f"{name} (computed)")
        axes.set_xticks(WORKERS, [str(workers) for workers in WORKERS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="weights, billions")
    panels[0].set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    panels[0].legend()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None}, bbox_inches="tight")


if __name__ == "__main__":
    main()
