"""The values that a replica's clients start from, and how what they contribute is added up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

Tensor = Any
_HALVES = (tf.float16, tf.bfloat16)


class RoundStart(NamedTuple):
    """What each client starts from: the values of `LocalState`, and a step of schedules."""

    trained: list[Tensor]
    averaged: list[Tensor]
    counted: list[Tensor]
    steps_before: Tensor


def values_of(variables: Sequence[Any]) -> list[Tensor]:
    """Reads variables now: later assignments do not change the result.

    Args:
        variables: `keras.Variable`s.
    """
    return [tf.identity(tf.convert_to_tensor(variable)) for variable in variables]


def wide(value: Tensor) -> Tensor:
    """Returns a value in a type in which sums over clients are precise enough.

    Args:
        value: A value of a variable.
    """
    return tf.cast(value, tf.float32) if value.dtype in _HALVES else value


def plus(sums: Sequence[Tensor], values: Iterable[Tensor]) -> list[Tensor]:
    """Adds values to sums.

    Args:
        sums: The sums so far.
        values: One for each sum.
    """
    return [total + value for total, value in zip(sums, values, strict=True)]


def loop(condition: Callable[..., Any], body: Callable[..., Any], variables: Any) -> Any:
    """Runs a loop whose turns are made one after the other, as clients share variables.

    Args:
        condition: As in `tf.while_loop`.
        body: As in `tf.while_loop`.
        variables: As in `tf.while_loop`.
    """
    return tf.while_loop(condition, body, variables, parallel_iterations=1)
