"""The rule finds what it forbids, and nothing else."""

from __future__ import annotations

import pytest

from tests.lint.private_parts import touches

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    "line",
    [
        "from keras.src import losses",
        "import tensorflow.python.eager.context",
        "model._flatten_layers()",
        "tf.__internal__.dispatch",
        "getattr(tensor, '_keras_mask', None)",
    ],
)
def test_a_private_part_is_found(line: str) -> None:
    assert [number for number, _ in touches(f"x = 1\n{line}\n", set())] == [2]


def test_one_s_own_are_left_alone() -> None:
    source = "self._model\nmodule._own\nvalue.__class__\nimport keras\nos._exit(1)\n"
    assert not list(touches(source, {"_own"}))
