"""`tfdist.Zero`: the optimizer's state, and maybe the weights, in parts on the replicas."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from tfdist.errors import ArgumentError

_VARIABLE = "TFDIST_ZERO"  # set by `tfdist run --zero`


@dataclass(frozen=True)
class Zero:
    """Trains by data parallelism, with the optimizer's state, and maybe the weights, in parts.

    Each replica keeps only its own part of each optimizer variable, such as Adam's moments
    (Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter
    models", SC 2020, sections 5.1 and 5.3). With stage 3, it also keeps only its part of each
    weight, and gets the rest from the others where a layer reads it. The trained weights are
    those of plain data parallelism.

    Args:
        stage: What is kept in parts. 1: the optimizer's state. 3: the weights too.
        on: The strategy that connects the replicas: "auto", "mirrored", "multi_worker",
            "horovod", or an instance, as in `strategy=` of `fit`.
        gather_again: With stage 3, whether a layer's whole weights are freed after its forward
            pass and gathered again for its backward pass. Without it, a step is faster, and
            all weights are whole at the end of the forward pass.

    Raises:
        ArgumentError: `stage` is not 1 or 3, or `on` is itself a `Zero`.

    Example:
        >>> import tfdist  # doctest: +SKIP
        >>> tfdist.fit(model, x, y, strategy=tfdist.Zero(stage=1))
    """

    stage: int = 1
    on: Any = "auto"
    gather_again: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.on, Zero):
            raise ArgumentError(
                f"`on` must be the strategy that connects the replicas. Received: {self.on!r}. "
                "Pass its name."
            )
        if self.stage not in (1, 3) or isinstance(self.stage, bool):
            raise ArgumentError(
                "`stage` must be 1, the optimizer's state in parts, or 3, the weights too. "
                f"Received: stage={self.stage!r}. In stage 1, gradients are in parts already, "
                "as in the stage 2 of others."
            )


def of_environment() -> Zero | None:
    """Returns what `tfdist run --zero` asks for, or None.

    Raises:
        ArgumentError: The environment variable has no meaning.
    """
    text = os.environ.get(_VARIABLE)
    if not text:
        return None
    return Zero(int(text) if text.isdecimal() else text)  # type: ignore[arg-type]
