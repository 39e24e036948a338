"""The variables of a model on all devices of a process, while it trains there."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfdist import _keras


class MirroredVariables(contextlib.AbstractContextManager[None]):
    """Moves variables to all devices of a process, and back.

    Inside the context, a `keras.Variable` has one copy on each device. A replica reads and
    assigns its own copy. The plain `tf.Variable`s still exist, so functions traced with
    them, inside or outside of the context, remain valid.

    Args:
        strategy: A `tf.distribute.Strategy` with several devices in this process.
        variables: `keras.Variable`s.
        optimizers: The optimizers that own some of these variables.
    """

    def __init__(
        self, strategy: Any, variables: Sequence[Any], optimizers: Sequence[Any]
    ) -> None:
        self._strategy = strategy
        self._variables = variables
        self._optimizers = optimizers
        self._strategies: dict[Any, Any] = {}
        # The backing variables not in use now: the mirrored ones outside of the context, the
        # plain ones inside.
        self._unused: list[Any] = []

    def __enter__(self) -> None:
        if self._unused:
            for variable, mirrored in zip(self._variables, self._unused, strict=True):
                mirrored.assign(variable.value)
        else:
            self._unused = [self._mirror(variable) for variable in self._variables]
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()
        for variable, mirrored in zip(self._variables, self._unused, strict=True):
            variable.assign(self._strategy.experimental_local_results(mirrored)[0])

    def _swap(self) -> None:
        self._unused = [
            _keras.swap_value(variable, other)
            for variable, other in zip(self._variables, self._unused, strict=True)
        ]
        for optimizer in self._optimizers:
            _keras.reindex_optimizer(optimizer)
            # A callback that assigns an optimizer's variable goes through its strategy.
            self._strategies[optimizer] = _keras.swap_strategy(
                optimizer, self._strategies.get(optimizer, self._strategy)
            )

    def _mirror(self, variable: Any) -> Any:
        with self._strategy.scope():
            return tf.Variable(
                tf.convert_to_tensor(variable),
                dtype=variable.dtype,
                trainable=variable.trainable,
                name=variable.name,
                aggregation=tf.VariableAggregation.NONE,
            )
