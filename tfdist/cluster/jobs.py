"""The jobs of a cluster, by the names that TF_CONFIG gives them."""

from __future__ import annotations

CHIEF = "chief"
WORKER = "worker"
PS = "ps"
EVALUATOR = "evaluator"
JOBS = (CHIEF, WORKER, PS, EVALUATOR)


def shortened(value: object, limit: int = 120) -> str:
    """Shows a value of the user's in an error message.

    Args:
        value: What was given.
        limit: Characters at most.
    """
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
