"""What tfdist keeps with a model between two calls: all of it in one object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_NAME = "_tfdist"


@dataclass
class Attached:
    """Belongs to one model; a copy of the model begins without.

    Attributes:
        prepared: Its functions on a strategy, traced, and where its variables live.
        scope: The `tf.distribute` strategy in whose scope a script made it, if it did.
        compositions: What each of its steps is made of, by the name of the step.
        metric_variables: State of metrics that only its steps know of.
        clip_optimizer: What moves the norm to clip to in private training, if one does.
        tied_weights: The ids of its trainable variables, and which of them are used outside
            of the layers that hold them.
        foldings: The same ids, and where the batch is in what its layers are called with.
    """

    prepared: Any = None
    scope: Any = None
    compositions: dict[str, Any] = field(default_factory=dict)
    metric_variables: list[Any] = field(default_factory=list)
    clip_optimizer: Any = None
    tied_weights: tuple[tuple[int, ...], frozenset[int]] = ((), frozenset())
    foldings: tuple[tuple[int, ...] | None, Any] = (None, None)


def attached(model: Any) -> Attached:
    """Gives what is kept with a model.

    Args:
        model: A `keras.Model`.
    """
    # Not by `setattr`, which Keras watches for layers and variables.
    kept: Attached = vars(model).setdefault(_NAME, Attached())
    return kept
