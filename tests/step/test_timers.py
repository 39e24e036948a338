"""The clocks inside of steps, on a step of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tensorflow as tf
from tensorflow.python.framework import config

from tfdist.step import timers

pytestmark = pytest.mark.quick


@pytest.fixture(params=[False, True], ids=["usual", "deterministic"])
def deterministic(request: pytest.FixtureRequest) -> Iterator[bool]:
    if request.param:
        tf.config.experimental.enable_op_determinism()
    yield request.param
    config.disable_op_determinism()


def test_steps_are_counted_and_timed_where_there_are_clocks(deterministic: bool) -> None:
    ours = timers.StepTimers()
    iterator = iter(tf.data.Dataset.range(3).repeat())

    @tf.function
    def step() -> tf.Tensor:
        share = ours.draw(next, iterator)
        began = timers.now(share)
        total = tf.reduce_sum(tf.random.stateless_normal([400, 400], [1, 2])) + tf.cast(
            share, tf.float32
        )
        ours.note_step(total, timers.now(total) - began)
        return total

    for _ in range(3):
        step()
    assert ours.counts() == (3, 3)
    times = ours.read()
    assert (times.reducing > 0) == (times.data > 0) == (not deterministic)
