"""Checkpoints from elsewhere: what they may change, and that nonsense in them is refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tfdist
from tfdist.errors import CheckpointError
from tfdist.resume.checkpoint import files, reading
from tfdist.resume.checkpoint.callback_attributes import is_state
from tfdist.resume.checkpoint.callbacks import CallbackState
from tfdist.resume.checkpoint.lease import Lease
from tfdist.resume.checkpoint.shards import TensorReader

X, Y = np.ones((40, 3), "float32"), np.ones((40, 1), "float32")


class Patient(keras.callbacks.EarlyStopping):
    """Changes a setting of Keras's, and has attributes and a method of its own."""

    limit = 3

    def __init__(self) -> None:
        super().__init__("loss", patience=2)
        self.folder = "mine"
        self.seen: list[str] = []

    def note(self) -> None:
        self.seen.append("x")

    @property
    def half(self) -> int:
        return 1


@pytest.mark.quick
@pytest.mark.parametrize(
    ("attribute", "value", "is_restored"),
    [
        ("wait", 4, True),
        ("best", 0.5, True),
        ("patience", 7, True),  # a subclass may count it up
        ("limit", 9, True),
        ("seen", ["y"], True),
        ("made_later", "text", True),
        ("monitor", "val_loss", False),  # a setting of Keras's that is a text
        ("min_delta", 1, False),
        ("note", "x", False),
        ("on_epoch_end", 1, False),
        ("half", 1, False),
        ("__class__", 1, False),
        ("model", 1, False),
        ("_model", 1, False),
        ("params", {}, False),
        ("not a name", 1, False),
    ],
)
def test_what_a_checkpoint_may_set(attribute: str, value: Any, is_restored: bool) -> None:
    callback = Patient()
    before = dict(vars(callback))
    encoded = {"dict": []} if value == {} else {"list": value} if value == ["y"] else value
    (name,) = CallbackState([callback]).state([])
    CallbackState([callback]).restore({name: {attribute: encoded}}, [].__getitem__)
    if is_restored:
        assert getattr(callback, attribute) == value
    else:
        assert vars(callback) == before


@pytest.mark.quick
def test_a_checkpoint_does_not_choose_files(tmp_path: Path) -> None:
    saving = keras.callbacks.ModelCheckpoint(tmp_path / "mine.keras")
    logging = keras.callbacks.CSVLogger(tmp_path / "mine.csv")
    board = keras.callbacks.TensorBoard(tmp_path / "board")
    evil = {"filepath", "filename", "log_dir", "_train_dir", "_val_dir", "_log_write_dir"}
    for callback in (saving, logging, board):
        assert not any(is_state(callback, name, "/etc/x") for name in evil)


def test_all_that_training_changes_in_keras_s_callbacks_is_state(tmp_path: Path) -> None:
    callbacks = [
        keras.callbacks.EarlyStopping("loss", patience=3, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("loss", patience=1, cooldown=1, min_delta=9),
        keras.callbacks.ModelCheckpoint(tmp_path / "m.weights.h5", "loss", save_best_only=True,
                                        save_weights_only=True),
        keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=1),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.TensorBoard(tmp_path / "board"),
        keras.callbacks.LearningRateScheduler(lambda epoch: 0.1),
        keras.callbacks.TerminateOnNaN(),
    ]  # fmt: skip
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    begun: list[dict[str, Any]] = []
    note = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: (
            begun.append([dict(vars(c)) for c in callbacks]) if not epoch else None
        )
    )
    model.fit(X, Y, epochs=3, callbacks=[*callbacks, note], verbose=0)
    plain = (bool, int, float, str, list, dict, type(None))
    files_and_switches = {"min_delta", "_should_trace", "_prev_summary_state"}
    for callback, before in zip(callbacks, begun[0], strict=True):
        changed = {
            name
            for name, value in vars(callback).items()
            if isinstance(value, plain) and not np.array_equal(value, before.get(name))
        }
        missed = {n for n in changed if not is_state(callback, n, vars(callback)[n])}
        assert missed <= files_and_switches, (type(callback).__name__, missed)


# --- what is on the disk ------------------------------------------------------------------

STATE = {
    "format": 3, "tfdist": "1", "position": [1, 0, None], "initial_epoch": 0, "steps": 4,
    "stopped": False, "setup": {}, "others": {}, "callbacks": {}, "global_seed": False,
    "arrays": 0,
}  # fmt: skip


def written(folder: Path, state: bytes, sums: str | None = None) -> Path:
    """Writes a checkpoint without tensors, with the right checksums."""
    checkpoint = folder / "epoch-00001-step-0000000"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_bytes(state)
    (checkpoint / "tensors.index").write_bytes(b"x")
    if sums is None:
        names = ("state.json", "tensors.index")
        digests = [hashlib.sha256((checkpoint / n).read_bytes()).hexdigest() for n in names]
        sums = "".join(f"{d}  {n}\n" for d, n in zip(digests, names, strict=True))
    (checkpoint / "SHA256SUMS").write_text(sums)
    return folder


@pytest.mark.quick
@pytest.mark.parametrize(
    "state", [b"[" * 100_000, b"[1]", b"\xff", b"{", b"1" * 5000], ids=[*"abcde"]
)
def test_a_state_that_is_none_is_damage(state: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="all damaged"):
        files.latest(written(tmp_path, state))


@pytest.mark.quick
@pytest.mark.parametrize(
    "change",
    [{"format": True}, {"tfdist": 1}, {"arrays": -1.0}, {"arrays": 10**18}, {"steps": "x"},
     {"callbacks": []}, {"position": None}],
)  # fmt: skip
def test_a_state_with_other_fields_is_refused(
    change: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    strategy = tfdist.init("single").strategy
    written(tmp_path, json.dumps({**STATE, **change}).encode())
    monkeypatch.setattr(TensorReader, "specs", {})
    lease = Lease(tmp_path)
    with pytest.raises(CheckpointError, match=r"must be as tfdist|must be among"):
        reading.last_checkpoint(lease, tmp_path, strategy)
    lease.release()


@pytest.mark.quick
def test_checksums_of_files_elsewhere_are_damage(tmp_path: Path) -> None:
    sums = "0  ../../../../dev/zero\n0  state.json\n0  tensors.index\n"
    with pytest.raises(CheckpointError, match="all damaged"):
        files.latest(written(tmp_path, json.dumps(STATE).encode(), sums))


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=9,
)


@pytest.mark.quick
@given(state=st.binary(max_size=99) | values.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=60, deadline=None, database=None)
def test_any_state_is_read_or_refused(state: bytes, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    with contextlib.suppress(CheckpointError):
        found = files.latest(written(folder, state))
        assert found is not None
        assert isinstance(found.state, dict)


@pytest.mark.quick
@given(encoded=values)
@settings(max_examples=100, deadline=None, database=None)
def test_any_state_of_callbacks_is_restored_or_refused(encoded: Any) -> None:
    callback = Patient()
    (name,) = CallbackState([callback]).state([])
    for state in ({name: encoded}, {name: {"wait": encoded, "seen": encoded}}):
        with contextlib.suppress(CheckpointError):
            CallbackState([callback]).restore(state, [np.ones(2)].__getitem__)
        # Its own attributes may be restored, whatever they are. Settings and methods may not.
        assert (callback.monitor, callback.min_delta) == ("loss", 0)
        assert type(callback) is Patient
        assert callback.note.__func__ is Patient.note


@pytest.mark.parametrize("is_private", [False, pytest.param(True, marks=pytest.mark.full)])
def test_who_may_read_a_checkpoint(is_private: bool, tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    privacy = tfdist.DPSGD(l2_norm_clip=1.0, noise_multiplier=4.0, delta=1e-4)
    options = {"privacy": privacy} if is_private else {}
    tfdist.fit(model, X, Y, checkpoint=tmp_path / "run", verbose=0, **options)
    (folder,) = (tmp_path / "run").glob("epoch-*")
    modes = {path.stat().st_mode & 0o077 for path in (folder, *folder.iterdir())}
    if is_private:
        assert modes == {0}
        assert (tmp_path / "run" / "privacy.json").stat().st_mode & 0o077 == 0
    else:
        assert modes != {0}


@pytest.mark.full
def test_a_flood_of_damaged_states(tmp_path: Path) -> None:
    rng = random.Random(1)
    whole = json.dumps(STATE).encode()
    for number in range(2000):
        state = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            state[rng.randrange(len(state))] = rng.randrange(256)
        with contextlib.suppress(CheckpointError):
            files.latest(written(tmp_path / str(number), bytes(state)))
