"""What a part of a traced step depends on, writes and draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import pytest
import tensorflow as tf

from tfdist import _keras

pytestmark = pytest.mark.quick


def traced(compute: Callable[[], Any], read: Any, known: Any = ()) -> tuple[Any, str | None]:
    """The one of `read` on which `compute` depends, and what it writes besides `known`."""
    found = []

    def step() -> None:
        with _keras.tracing_part() as part:
            result = compute()
        found.append((part.dependence(result, read), part.written(known)))

    tf.function(step, autograph=False).get_concrete_function()
    return found[-1]


def test_dependences_are_exact_through_calls_branches_and_loops() -> None:
    secret, public = keras.Variable(1.0), keras.Variable(2.0)

    @tf.function
    def both() -> Any:
        return secret + 1, public + 1

    one = tf.constant(1.0)
    branches = {
        "call": lambda i: both()[i],
        "if": lambda i: tf.cond(
            public > 0, lambda: (secret + 0, public + 0), lambda: (one, one)
        )[i],
        "loop": lambda i: tf.while_loop(
            lambda n, a, b: n < 3,
            lambda n, a, b: (n + 1, a + secret, b + public),
            (0, one, one),
        )[i + 1],
        # The first reaches the second after two rounds of the loop.
        "late": lambda i: tf.while_loop(
            lambda n, a, b, c: n < 3,
            lambda n, a, b, c: (n + 1, a + secret, a * 1 if not i else one, b * 1),
            (0, one, one, one),
        )[3],
    }
    for name, compute in branches.items():
        assert traced(lambda c=compute: c(0), [secret])[0] is secret, name
        assert traced(lambda c=compute: c(1), [secret])[0] is None, name
    condition = lambda: tf.cond(secret > 0, lambda: public + 0, lambda: one)  # noqa: E731
    assert traced(condition, [secret])[0] is secret


def test_a_value_that_is_written_elsewhere_counts() -> None:
    secret, kept, raw = keras.Variable(1.0), keras.Variable(2.0), tf.Variable(3.0)

    def add_up() -> Any:
        secret.assign(secret + 1)
        return tf.constant(1.0)

    def copy() -> Any:
        kept.assign(secret * 2)
        return tf.constant(1.0)

    def in_branch() -> Any:
        tf.cond(secret > 0, lambda: raw.assign(1.0), lambda: raw.assign(2.0))
        return tf.constant(1.0)

    def loop(copies: bool) -> Any:
        def body(n: Any) -> Any:
            secret.assign(secret + 1)
            kept.assign(secret * 2 if copies else kept + 1)
            return n + 1

        return tf.while_loop(lambda n: n < 3, body, (0,))

    assert traced(lambda: loop(copies=True), [secret])[0] is secret
    assert traced(lambda: loop(copies=False), [secret], [secret, kept]) == (None, None)
    assert traced(add_up, [secret], [secret]) == (None, None)
    assert traced(copy, [secret], [secret, kept]) == (secret, None)
    dependence, written = traced(in_branch, [secret])
    assert dependence is secret
    assert written is not None
    assert traced(lambda: raw + 1, [secret])[1] is None


def test_random_numbers_and_python_are_found_in_functions() -> None:
    @tf.function
    def draws() -> Any:
        return tf.random.normal([])

    @tf.function
    def calls() -> Any:
        return tf.numpy_function(lambda: 1.0, [], tf.float64)

    found = []

    def step() -> None:
        for function in (draws, calls):
            with _keras.tracing_part() as part:
                function()
            found.append((part.drawing(), part.python()))

    tf.function(step, autograph=False).get_concrete_function()
    assert found == [("RandomStandardNormal", None), (None, "PyFunc")]
