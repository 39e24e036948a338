"""The evaluator: a task of TF_CONFIG that evaluates while other tasks train."""

from __future__ import annotations

import sys

from tfdist.cluster import EVALUATOR, Cluster


def leave_training() -> None:
    """Ends an evaluator's script when it calls `fit`; does nothing in other processes.

    An evaluator that trained alone would train a second model, and overwrite the files of the
    first one.

    Raises:
        SystemExit: With status 0: a job with an evaluator has not failed.
    """
    cluster = Cluster.from_environment()
    if cluster.job != EVALUATOR:
        return
    print(
        f"tfdist: {cluster.task} has no part in training: its script ends here, at `fit`, with "
        "exit status 0. To evaluate beside the training, branch before `fit`, where the "
        'task\'s type in TF_CONFIG is "evaluator".',
        file=sys.stderr,
        flush=True,
    )
    raise SystemExit(0)
