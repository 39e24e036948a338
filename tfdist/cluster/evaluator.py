"""The task of TF_CONFIG that evaluates beside a training, in which it has no part."""

from __future__ import annotations

import sys

from tfdist.cluster import EVALUATOR, Cluster


def leave_training() -> None:
    """Ends an evaluator's script where it comes to train; does nothing in other processes.

    Alone it would train another model, and write over the files of the one that is trained.

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
