"""The figure of an audit: the ROC curve, and the distribution of the scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfdist.figures import new_figure

Floats = NDArray[np.float64]


def plot_scores(
    members: Floats, non_members: Floats, roc: tuple[Floats, Floats], auc: float
) -> Any:
    """Draws the ROC curve on logarithmic axes, and histograms of the scores.

    Args:
        members: Scores of the examples that were trained on.
        non_members: Scores of the examples that were not.
        roc: False and true positive rates, from the highest threshold down.
        auc: The area under the ROC curve, for the legend.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    figure = new_figure(figsize=(9, 4))
    curve, counts = figure.subplots(1, 2)
    # A rate of 0 has no place on a logarithmic axis. It is drawn as half of the least rate.
    least = 0.5 / max(len(members), len(non_members))
    false, true = (np.maximum(rate, least) for rate in roc)
    curve.plot(false, true, drawstyle="steps-post", label=f"AUC {auc:.3f}")
    curve.plot([least, 1], [least, 1], color="gray", linestyle=":", label="chance")
    curve.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1))
    curve.set_xlabel("false positive rate")
    curve.set_ylabel("true positive rate")
    curve.legend(loc="lower right")
    scores = np.concatenate([members, non_members])
    edges = np.histogram_bin_edges(scores[np.isfinite(scores)], 40)
    for group, name in ((members, "members"), (non_members, "non-members")):
        counts.hist(group[np.isfinite(group)], edges, alpha=0.6, label=name)
    counts.set_xlabel("score")
    counts.set_ylabel("examples")
    counts.legend()
    return figure
