"""`tfdist.Zero`: the optimizer's state in parts, one on each replica."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from tfdist.errors import ArgumentError

_VARIABLE = "TFDIST_ZERO"  # set by `tfdist run --zero`


@dataclass(frozen=True)
class Zero:
    """Trains by data parallelism, with the optimizer's state in parts.

    Each replica keeps only its own part of each optimizer variable, such as Adam's moments
    (Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter
    models", SC 2020, section 5.1). The weights are those of plain data parallelism.

    Args:
        stage: What is kept in parts. 1: the optimizer's state.
        on: The strategy that connects the replicas: "auto", "mirrored", "multi_worker",
            "horovod", or an instance, as in `strategy=` of `fit`.

    Raises:
        ArgumentError: `stage` is not 1, or `on` is itself a `Zero`.

    Example:
        >>> import tfdist  # doctest: +SKIP
        >>> tfdist.fit(model, x, y, strategy=tfdist.Zero(stage=1))
    """

    stage: int = 1
    on: Any = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.on, Zero):
            raise ArgumentError(
                f"`on` must be the strategy that connects the replicas. Received: {self.on!r}. "
                "Pass its name."
            )
        # Named apart from other wrong values, since users know these stages from elsewhere.
        if self.stage in (2, 3) and not isinstance(self.stage, bool):
            raise ArgumentError(
                "`stage` must be 1, the optimizer's state in parts: the other stages are not "
                f"built yet. Received: stage={self.stage!r}. Use tfdist.Zero(stage=1)."
            )
        if self.stage != 1 or isinstance(self.stage, bool):
            raise ArgumentError(f"`stage` must be 1. Received: stage={self.stage!r}.")


def of_environment() -> Zero | None:
    """Returns what `tfdist run --zero` asks for, or None.

    Raises:
        ArgumentError: The environment variable has no meaning.
    """
    text = os.environ.get(_VARIABLE)
    if not text:
        return None
    return Zero(int(text) if text.isdecimal() else text)  # type: ignore[arg-type]
