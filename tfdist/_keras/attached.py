"""The state that tfdist attaches to a model, in one object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_NAME = "_tfdist"


@dataclass
class Attached:
    """The state of one model. A copy of the model begins without it.

    Attributes:
        prepared: The model's traced functions and placed variables on a strategy.
        scope: The `tf.distribute` strategy in whose scope a script made the model, if any.
        compositions: The variables and optimizers of each of its steps, by the step's name.
        metric_variables: State of metrics that the model does not list, but its steps update.
        clip_optimizer: The optimizer of the clipping norm in private training, if there is one.
        tied_weights: The ids of the trainable variables, and the ids of those that are used
            outside of the layers that own them.
        foldings: The same ids, and the position of the batch axis in its layers' inputs.
    """

    prepared: Any = None
    scope: Any = None
    compositions: dict[str, Any] = field(default_factory=dict)
    metric_variables: list[Any] = field(default_factory=list)
    clip_optimizer: Any = None
    tied_weights: tuple[tuple[int, ...], frozenset[int]] = ((), frozenset())
    foldings: tuple[tuple[int, ...] | None, Any] = (None, None)


def attached(model: Any) -> Attached:
    """Returns the state that is attached to a model.

    Args:
        model: A `keras.Model`.
    """
    # Not with `setattr`, which Keras watches for layers and variables.
    state: Attached = vars(model).setdefault(_NAME, Attached())
    return state
