"""The jobs of a cluster, by the names that TF_CONFIG gives them."""

from __future__ import annotations

CHIEF = "chief"
WORKER = "worker"
PS = "ps"
EVALUATOR = "evaluator"
JOBS = (CHIEF, WORKER, PS, EVALUATOR)


def shortened(value: object, limit: int = 120) -> str:
    """Returns a value's repr for an error message.

    Args:
        value: The value that the user gave.
        limit: The most characters.
    """
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
