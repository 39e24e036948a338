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


def test_only_given_tensors_bring_arguments_in() -> None:
    """However the others came into the part, also through the graphs around a branch."""
    secret, public, found = keras.Variable(1.0), keras.Variable(2.0), {}

    @tf.function(autograph=False)
    def step(rows: Any, flag: Any) -> Any:
        kept, noisy = tf.reduce_mean(rows), rows * 2
        computed: dict[str, Any] = {
            "given": lambda: noisy + public,
            "given, in a function": lambda: tf.function(lambda: noisy * 2)(),
            "kept": lambda: noisy + kept,
            "argument": lambda: noisy + rows,
            "condition": lambda: tf.cond(kept > 0, lambda: public + 0, lambda: tf.zeros([])),
            "in a function": lambda: tf.function(lambda: kept * 2)(),
            "in a loop": lambda: tf.while_loop(lambda n: n < 3, lambda n: n + kept, (0.0,)),
            "written": lambda: (public.assign(kept), tf.zeros([]))[1],
            "variable": lambda: noisy * secret,
        }
        for name, compute in computed.items():

            def part(name: str = name, compute: Any = compute) -> Any:
                with _keras.tracing_part() as part:
                    result = compute()
                found[name] = part.read_besides([noisy], result, [secret])
                return tf.zeros([])

            part()
            tf.cond(flag, part, lambda: tf.zeros([]))
            found[f"{name}, in a branch"] = found.pop(name)
        return noisy

    step.get_concrete_function(tf.TensorSpec([4]), tf.TensorSpec([], tf.bool))
    for name, read in found.items():
        if name.startswith("given"):
            assert read is None, name
        elif name.startswith("variable"):
            assert read == repr(secret.path), name
        else:
            assert read is not None, name
            assert "argument 'rows'" in read, name


def test_a_table_is_written_only_where_it_gets_values() -> None:
    values = tf.lookup.KeyValueTensorInitializer(["a", "b"], [1, 2])
    fixed = tf.lookup.StaticHashTable(values, 0)
    growing = tf.lookup.experimental.MutableHashTable(tf.string, tf.int32, 0)
    words = tf.constant(["a", "c"])
    assert traced(lambda: fixed.lookup(words) + tf.cast(fixed.size(), tf.int32), []) == (
        None,
        None,
    )
    assert traced(lambda: growing.lookup(words), []) == (None, None)
    kept = traced(lambda: growing.insert(words, tf.constant([1, 2])), [])[1]
    assert kept == "resource of LookupTableInsertV2"


def unseen_in(compute: Callable[[Any], Any]) -> str | None:
    found = []

    @tf.function(autograph=False)
    def step(x: Any) -> None:
        with _keras.tracing_part() as part:
            compute(x)
        found.append(part.unseen())

    step.get_concrete_function(tf.TensorSpec([2]))
    return found[-1]


def test_what_may_carry_data_between_steps_is_found() -> None:
    variable, raw = keras.Variable([1.0, 2.0]), tf.raw_ops
    recurrent = keras.layers.LSTM(2)
    recurrent.build((None, None, 1))
    carrying: dict[str, Callable[[Any], Any]] = {
        "Stage": lambda x: raw.Stage(values=[x]),
        "Unstage": lambda x: raw.Unstage(dtypes=[tf.float32]),
        "MapStage": lambda x: raw.MapStage(
            key=tf.constant(1, tf.int64), indices=[0], values=[x], dtypes=[tf.float32]
        ),
        "WriteFile": lambda x: tf.io.write_file("kept", tf.strings.as_string(x[0])),
        "SaveV2": lambda x: raw.SaveV2(
            prefix="kept", tensor_names=["x"], shape_and_slices=[""], tensors=[x]
        ),
        "PrintV2": lambda x: tf.print(x, output_stream="file://kept"),
        "Batch": lambda x: raw.Batch(
            in_tensors=[x], num_batch_threads=1, max_batch_size=2, batch_timeout_micros=1,
            grad_timeout_micros=1,
        ),
        "TemporaryVariable": lambda x: raw.TemporaryVariable(shape=[2], dtype=tf.float32),
        "Timestamp": lambda x: x * tf.cast(tf.timestamp(), tf.float32),
    }  # fmt: skip
    for name, compute in carrying.items():
        assert unseen_in(compute) == name

        @tf.function(autograph=False)
        def inner(x: Any, compute: Any = compute) -> Any:
            compute(x)
            return x + 1

        assert unseen_in(lambda x, inner=inner: inner(x)) == name
    keeping_nothing: dict[str, Callable[[Any], Any]] = {
        "print": lambda x: tf.print("x", x),
        "assertion": lambda x: tf.debugging.assert_positive(x),
        "numerics": lambda x: tf.debugging.check_numerics(x, "x"),
        "variable": lambda x: variable.assign_add(x),
        "loop": lambda x: tf.while_loop(lambda n, x: n < 3, lambda n, x: (n + 1, x), (0, x)),
        "map": lambda x: tf.map_fn(lambda e: e * 2, x),
        "array": lambda x: tf.TensorArray(tf.float32, 1).write(0, x).stack(),
        "draws": lambda x: x + tf.random.normal([2]) + keras.random.normal([2]),
        "recurrent": lambda x: recurrent(x[None, :, None]),
    }
    for name, compute in keeping_nothing.items():
        assert unseen_in(compute) is None, name
