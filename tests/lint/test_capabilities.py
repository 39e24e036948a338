"""The rule finds what it forbids, and nothing else."""

from __future__ import annotations

import pytest

from tests.lint.capabilities import asked, derived

pytestmark = pytest.mark.quick
SOURCES = {
    "a.py": "class Mine(base.Strategy): pass\nclass Own(keras.callbacks.Callback): pass",
    "b.py": "class Later(Mine): pass\nclass Other: pass",
}
NAMES = derived(SOURCES)


def test_classes_of_strategies_and_callbacks_are_known() -> None:
    assert {"Strategy", "Callback", "Mine", "Own", "Later"} == NAMES


@pytest.mark.parametrize(
    "question",
    [
        "isinstance(x, Later)",
        "isinstance(x, Other | Own)",
        "isinstance(x, (int, keras.callbacks.EarlyStopping))",
        "issubclass(type(x), keras_callbacks.TensorBoard)",
        "[c for c in x if not isinstance(c, Mine)]",
    ],
)
def test_a_question_is_found(question: str) -> None:
    assert [line for line, _ in asked(f"x = 1\n{question}\n", NAMES)] == [2]


def test_others_are_left_alone() -> None:
    source = (
        "isinstance(x, Other)\nx.has_servers\nMine(x)\nisinstance(x, tf.distribute.Strategy)\n"
    )
    assert not list(asked(source, NAMES))
