"""What callbacks do, asked of Keras's own, of classes derived from them, and of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import pytest

from tfdist.training import callback_kinds as kinds

pytestmark = pytest.mark.quick
C = keras.callbacks


class OwnCheckpoint(C.ModelCheckpoint):  # type: ignore[misc]
    pass


CALLBACKS: dict[str, Callable[[], Any]] = {
    "checkpoint": lambda: C.ModelCheckpoint("a.keras"),
    "own checkpoint": lambda: OwnCheckpoint("a.keras"),
    "checkpoint of steps": lambda: C.ModelCheckpoint("a.keras", save_freq=5),
    "board": lambda: C.TensorBoard("logs"),
    "board of weights": lambda: C.TensorBoard("logs", histogram_freq=1),
    "board of pictures": lambda: C.TensorBoard("logs", write_images=True),
    "log": lambda: C.CSVLogger("a.csv"),
    "backup": lambda: C.BackupAndRestore("backup"),
    "stopping": lambda: C.EarlyStopping(),
    "stopping with weights": lambda: C.EarlyStopping(restore_best_weights=True),
    "swap": lambda: C.SwapEMAWeights(swap_on_epoch=True),
    "history": lambda: C.History(),
    "lambda": lambda: C.LambdaCallback(),
    "none of them": lambda: "a text",
}
BOARDS = {"board", "board of weights", "board of pictures"}
CHECKPOINTS = {"checkpoint", "own checkpoint", "checkpoint of steps"}


@pytest.mark.parametrize(
    ("asks", "expected"),
    [
        (kinds.writes, {*CHECKPOINTS, *BOARDS, "log", "backup"}),
        (kinds.saves_model, CHECKPOINTS),
        (kinds.saves_between_steps, {"checkpoint of steps"}),
        (kinds.is_board, BOARDS),
        (kinds.shows_weights, {"board of weights", "board of pictures"}),
        (kinds.keeps_weights, {"stopping with weights"}),
        (kinds.backs_up, {"backup"}),
        (kinds.swaps_weights, {"swap"}),
        (kinds.is_history, {"history"}),
    ],
)
def test_who_does_what(asks: Callable[[Any], bool], expected: set[str]) -> None:
    assert {name for name, make in CALLBACKS.items() if asks(make())} == expected


def test_callbacks_are_listed_however_they_are_given() -> None:
    one, other = C.LambdaCallback(), C.LambdaCallback()
    assert kinds.listed(None) == []
    assert kinds.listed(one) == [one]
    assert kinds.listed((one, None, other)) == [one, other]
    assert kinds.listed(C.CallbackList([one, other])) == [one, other]
