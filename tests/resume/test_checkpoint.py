"""Checkpoints: what is stopped and started again ends with the bits of what was not."""

from __future__ import annotations

import collections
import datetime
import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.equivalence.cases import table
from tfdist import watchdog
from tfdist.errors import ArgumentError, CheckpointError, Preempted
from tfdist.resume.checkpoint import files, plain, processors
from tfdist.resume.checkpoint.callbacks import CallbackState
from tfdist.resume.checkpoint.shards import Piece

STEPS = 7  # of an epoch
quick = pytest.mark.quick


class StoppedError(Exception):
    pass


@quick
def test_a_wait_for_the_disk_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def slow(*args: Any) -> None:
        end = time.monotonic() + 5
        while watchdog.here.doing is None and time.monotonic() < end:
            time.sleep(0.01)
        seen.append(watchdog.here.doing)

    monkeypatch.setattr(files, "write", slow)
    tfdist.fit(model(), *table(20), verbose=0, checkpoint=tmp_path)
    assert watchdog.SAVING in seen
    assert watchdog.here.doing is None


class Stop(keras.callbacks.Callback):
    """Raises after a step, in validation after it, or at the end of its epoch."""

    def __init__(self, when: str, step: int) -> None:
        super().__init__()
        self.when = when
        self.step = step

    def _stop(self, when: str) -> None:
        if when == self.when and int(self.model.optimizer.iterations) == self.step:
            raise StoppedError

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._stop("before")

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._stop("after")

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self._stop("validation")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._stop("epoch")


class Batches(keras.callbacks.Callback):
    """Notes the numbers that callbacks are told, and changes what is no plain dict."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []
        self.counts: Any = collections.defaultdict(int)
        self.epoch = -1

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seen.append((self.epoch, batch))
        self.counts[batch] += 1


def model(units: int = 8, optimizer: Any = None) -> Any:
    keras.utils.set_random_seed(3)
    layers = [
        keras.Input((20,)),
        keras.layers.Dense(units, activation="relu"),
        keras.layers.Dropout(0.3),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(3),
    ]
    made = keras.Sequential(layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made.compile(optimizer or keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"])
    return made


def train(checkpoint: Any, *extra: Any, made: Any = None, x: Any = None, **options: Any) -> Any:
    """Trains; gives all that must be the same."""
    made = made or model()
    batches = Batches()
    callbacks = [
        batches,
        keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=10.0),
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
        *extra,
    ]
    data = (*table(200),) if x is None else (x,)
    arrays = {"batch_size": 32} if x is None else {}
    settings = {"epochs": 3, "seed": 3, "verbose": 0, **arrays, **options}
    history = tfdist.fit(
        made,
        *data,
        validation_data=table(50),
        callbacks=callbacks,
        checkpoint=checkpoint,
        **settings,
    )
    state = [v.numpy() for v in (*made.variables, *made.optimizer.variables)]
    return state, history.history, history.epoch, batches.seen, dict(batches.counts)


def assert_same(found: Any, expected: Any) -> None:
    for ours, theirs in zip(found[0], expected[0], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert found[1:] == expected[1:]


def stopped_and_started(checkpoint: Any, stop: Stop, **options: Any) -> Any:
    with pytest.raises(StoppedError):
        train(checkpoint, stop, **options)
    return train(checkpoint, **options)


@pytest.fixture(scope="module")
def whole() -> Any:
    return train(None)


@pytest.mark.parametrize(
    ("when", "step", "every"),
    [
        ("before", 0, "epoch"),
        ("after", 2, 1),
        ("after", 9, "epoch"),
        ("after", 10, 3),
        ("after", STEPS, 1),
        ("validation", STEPS, STEPS),
        ("validation", 2 * STEPS, 1),
        ("epoch", STEPS, 2),
        ("epoch", 3 * STEPS, 1),
        ("after", 12, datetime.timedelta(microseconds=1)),
    ],
)
def test_a_stopped_run_ends_with_the_same_bits(when, step, every, whole, tmp_path) -> None:
    checkpoint = tfdist.Checkpoint(tmp_path, every=every)
    assert_same(stopped_and_started(checkpoint, Stop(when, step)), whole)
    assert_same(train(checkpoint), whole)  # it has ended: nothing is trained
    assert 1 <= len(list(tmp_path.iterdir())) <= 3


def test_several_steps_at_once_and_another_number_of_them(whole, tmp_path) -> None:
    checkpoint = tfdist.Checkpoint(tmp_path, every=2)

    def several(steps: int) -> Any:
        made = model()
        made.steps_per_execution = steps
        return made

    with pytest.raises(StoppedError):
        train(checkpoint, Stop("after", 11), made=several(4))
    found = train(checkpoint, made=several(3))
    assert_same((*found[:3], None), (*whole[:3], None))


def test_more_epochs_go_on_from_the_last(whole, tmp_path) -> None:
    train(tmp_path, epochs=2)
    assert_same(train(tmp_path, epochs=3), whole)


def test_what_a_callback_has_stopped_stays_stopped(tmp_path) -> None:
    def fit() -> Any:
        stopping = keras.callbacks.EarlyStopping("loss", baseline=0.0, patience=1)
        return train(tmp_path, stopping, epochs=9)

    first = fit()
    assert len(first[2]) < 9
    assert_same(fit(), first)


@quick
def test_what_a_checkpoint_leaves_to_train_is_said(tmp_path, capsys) -> None:
    x, y = table(32)

    def said(epochs: int, x: Any = x, callbacks: Any = None, verbose: int = 2) -> str:
        net = keras.Sequential([keras.Input((20,)), keras.layers.Dense(3)])
        net.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        history = tfdist.fit(
            net, x, y, epochs=epochs, checkpoint=tmp_path, callbacks=callbacks, verbose=verbose
        )
        printed = capsys.readouterr()
        assert len(history.epoch) == (min(epochs, 2) if verbose else 2)
        return printed.out if verbose else printed.err

    assert "tfdist: training goes on" not in said(1)
    assert "has all 1 epochs: nothing is left to train. Raise `epochs`" in said(1)
    again = said(2)
    assert "training goes on from" in again
    assert "other values" not in again
    assert "nothing is left" in said(2, x + 1.0)
    assert said(2, verbose=0) == ""
    # The weights are others than asked for, so it is said in any case.
    fewer = said(1, verbose=0)
    assert "tfdist: warning: " in fewer
    assert "has 2 epochs, and 1 are asked for: nothing is left" in fewer
    assert "the weights are those after epoch 2." in fewer
    stop = keras.callbacks.LambdaCallback()
    stop.on_epoch_end = lambda *_: setattr(stop.model, "stop_training", True)
    for folder in tmp_path.iterdir():
        shutil.rmtree(folder)
    said(1)
    assert "with other values in its arrays" in said(2, x + 1.0, [stop])
    assert "a callback ended the training" in said(3)


@quick
def test_other_processors_are_said(tmp_path, capsys, monkeypatch) -> None:
    x, y = table(32)

    def warned(epochs: int) -> str:
        net = keras.Sequential([keras.Input((20,)), keras.layers.Dense(3)])
        net.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        tfdist.fit(net, x, y, epochs=epochs, checkpoint=tmp_path, verbose=0)
        return capsys.readouterr().err

    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "3")
    warned(1)
    assert warned(2) == ""
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "5")
    assert warned(2) == ""  # nothing is left to train
    said = warned(3)
    assert "the workers have 5 threads (" in said
    assert "and had 3 threads (" in said
    assert "not bit by bit" in said
    assert warned(4) == ""  # the last checkpoint is of these processors


@quick
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"replicas": 4, "workers": [[1, "avx2"]]}, None),
        ({"strategy": "horovod", "workers": [[1, "avx2"]]}, None),
        ({"workers": [[2, "avx512f"], [2, "avx512f"]]}, "had 2, 2 threads (avx512f)"),
        ({"workers": 3}, "had others"),
        ({"workers": [[1]]}, "had others"),
    ],
)
def test_other_processors_matter_at_as_many_replicas(changes, expected) -> None:
    now = {"strategy": "multi_worker", "replicas": 2, "workers": [[1, "avx2"], [1, "avx2"]]}
    warning = processors.warning_of(now, now | changes)
    assert warning is None if expected is None else expected in warning
    assert processors.warning_of(now, None) is None


@quick
def test_a_warning_saves_and_sigterm_saves_and_ends(tmp_path, capsys) -> None:
    signals = {3: signal.SIGUSR1, 5: signal.SIGTERM}

    class Signalled(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch + 1 in signals:
                os.kill(os.getpid(), signals[batch + 1])

    net = keras.Sequential([keras.Input((20,)), keras.layers.Dense(3)])
    net.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    options = {"checkpoint": tmp_path, "callbacks": [Signalled()], "verbose": 0}
    with pytest.raises(Preempted):
        tfdist.fit(net, *table(64), batch_size=8, **options)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"epoch-00000-step-000000{step}" for step in signals]
    said = capsys.readouterr()
    assert "after a warning signal, training is saved and goes on" in said.out
    assert "saved after step 5 of epoch 1; the run ends with status 75" in said.out
    assert said.err.count("SIGTERM: when this step is made") == 1


class Rearranging(keras.utils.PyDataset):
    """Batches that `on_epoch_end` puts into another order."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.y = table(200)
        self.turn = 0

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> Any:
        rows = np.arange(index * 28, index * 28 + 28 + self.turn) % 200
        return self.x[rows], self.y[rows]

    def on_epoch_end(self) -> None:
        self.turn += 1


def shuffled(batches: int) -> Any:
    dataset = tf.data.Dataset.from_tensor_slices(table(200))
    return dataset.shuffle(200, seed=1).batch(-(-200 // batches))


def endless() -> Any:
    rng = np.random.default_rng(0)
    x, y = table(200)
    while True:
        rows = rng.integers(0, 200, 32)
        yield x[rows], y[rows]


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda: shuffled(STEPS), None),
        (lambda: shuffled(STEPS).filter(lambda *_: True), None),  # of unknown length
        (lambda: shuffled(30), STEPS),  # goes on where the last epoch stopped
        (endless, STEPS),
        (Rearranging, None),
    ],
    ids=["dataset", "unknown", "continuing", "generator", "py_dataset"],
)
def test_every_kind_of_data_goes_on(make, steps, tmp_path) -> None:
    options = {"steps_per_epoch": steps}
    keras.utils.set_random_seed(3)  # from which shuffles follow, before the first data set
    expected = train(None, x=make(), **options)
    with pytest.raises(StoppedError):
        train(tfdist.Checkpoint(tmp_path, every=1), Stop("after", 10), x=make(), **options)
    found = train(tfdist.Checkpoint(tmp_path, every=1), x=make(), **options)
    assert_same(found, expected)


def test_loss_scale_and_augmentation_and_a_drawn_seed_go_on(tmp_path) -> None:
    def fit(checkpoint: Any, *extra: Any, random_seed: int = 5) -> Any:
        optimizer = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.01), dynamic_growth_steps=4
        )
        augment = tfdist.Augment([keras.layers.GaussianNoise(0.1)])
        made = model(optimizer=optimizer)
        keras.utils.set_random_seed(random_seed)  # from which the sampler's seed is drawn
        return train(checkpoint, *extra, made=made, augment=augment, seed=None)

    expected = fit(None)
    checkpoint = tfdist.Checkpoint(tmp_path, every=5)
    with pytest.raises(StoppedError):
        fit(checkpoint, Stop("after", 10))
    assert_same(fit(checkpoint, random_seed=6), expected)


def test_private_training_goes_on_and_counts_what_was_spent(tmp_path) -> None:
    def fit(checkpoint: Any, *extra: Any, noise: float = 1.0) -> Any:
        made = keras.Sequential([keras.Input((20,)), keras.layers.Dense(3)])
        keras.utils.set_random_seed(3)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        made.compile("sgd", loss)
        privacy = tfdist.DPSGD(l2_norm_clip=1.0, noise_multiplier=noise, delta=1e-3, seed=5)
        history = tfdist.fit(
            made, *table(200), batch_size=32, epochs=2, verbose=0, privacy=privacy,
            callbacks=list(extra), checkpoint=checkpoint,
        )  # fmt: skip
        return [v.numpy() for v in made.variables], history.history, history.privacy.ledger

    def seeded(*arguments: Any, **options: Any) -> Any:
        keras.utils.set_random_seed(3)
        return fit(*arguments, **options)

    expected = seeded(None)
    checkpoint = tfdist.Checkpoint(tmp_path, every=2)
    with pytest.raises(StoppedError):
        seeded(checkpoint, Stop("after", 9))
    with pytest.raises(ArgumentError, match="privacy="):
        seeded(checkpoint, noise=2.0)
    assert_same(seeded(checkpoint), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 16}, "batch_size=16, and 32"),
        ({"seed": 4}, "seed=4, and 3"),
        ({"shuffle": False}, "sampler='Sequential', and 'Uniform'"),
        ({"steps_per_epoch": 5}, "steps_per_epoch=5, and 7"),
        ({"made": lambda: model(units=9)}, r"shape \(20, 9\).*shape \(20, 8\)"),
        ({"made": lambda: model(optimizer="sgd")}, "optimizer='SGD', and 'Adam'"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(change, message, tmp_path) -> None:
    train(tmp_path, epochs=1)
    change = {k: v() if callable(v) else v for k, v in change.items()}
    with pytest.raises(ArgumentError, match=f"(?s)must be of the same.*{message}"):
        train(tmp_path, **change)


def test_damaged_checkpoints_are_named_and_passed_over(whole, tmp_path, capfd) -> None:
    train(tfdist.Checkpoint(tmp_path, every=3))
    last, before = sorted(tmp_path.iterdir())[::-1][:2]
    (data,) = last.glob("tensors.data*")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    (before / "state.json").unlink()
    assert_same(train(tfdist.Checkpoint(tmp_path, every=3)), whole)
    errors = capfd.readouterr().err
    assert f"{last} is damaged ({data.name} has another checksum)" in errors
    assert f"{before} is damaged (state.json is missing)" in errors
    first, *others = sorted(tmp_path.glob("epoch-*"))
    (first / "SHA256SUMS").write_text("cut")
    for folder in others:
        (folder / "SHA256SUMS").unlink()
    named = sorted(path.name for path in tmp_path.glob("*epoch-*"))
    for _ in range(2):  # the next try does not begin anew either
        with pytest.raises(CheckpointError, match=r"all damaged .*SHA256SUMS is cut off"):
            train(tmp_path)
        assert sorted(path.name for path in tmp_path.glob("*epoch-*")) == named
    for folder in (first, *others):
        folder.rename(folder.with_name(f"damaged-again-{folder.name}"))
    with pytest.raises(CheckpointError, match=r"all damaged .*renamed before"):
        train(tmp_path)


def test_a_checkpoint_that_cannot_be_read_is_not_damaged(tmp_path) -> None:
    train(tfdist.Checkpoint(tmp_path, every=3))
    last = max(tmp_path.glob("epoch-*"))
    sums = last / "SHA256SUMS"
    sums.rename(tmp_path / "aside")
    sums.symlink_to(sums)  # an error that is neither a missing file nor another content
    with pytest.raises(CheckpointError, match=r"must be readable\. Received: .*SHA256SUMS"):
        train(tfdist.Checkpoint(tmp_path, every=3))
    assert last.is_dir()


def test_a_training_whose_directory_another_one_took_writes_no_more(tmp_path) -> None:
    def take(epoch: int, logs: Any) -> None:
        if epoch == 1:  # as a job that was queued again, while this process was stopped
            lease = tmp_path / ".lease"
            other = json.loads(lease.read_text()) | {
                "host": "other",
                "kernel": "x",
                "token": "x",
            }
            lease.write_text(json.dumps(other))

    with pytest.raises(CheckpointError, match=r"which process \d+ on other has taken"):
        train(tmp_path, keras.callbacks.LambdaCallback(on_epoch_end=take))
    assert not list(tmp_path.glob("epoch-00002-*"))
    assert (tmp_path / ".lease").exists()


class FilesMayNotGrow(keras.callbacks.Callback):
    """What a full disk does: after the first checkpoint no file may be longer than a line."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch == 1:
            deadline = time.monotonic() + 20
            while not list(self.directory.glob("epoch-*")) and time.monotonic() < deadline:
                time.sleep(0.01)
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, most))


def test_a_failed_write_is_raised_and_leaves_the_last_one(whole, tmp_path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointError, match=r"must be written to .*File too large"):
            train(tmp_path, FilesMayNotGrow(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-00001-step-0000000"]
    assert_same(train(tmp_path), whole)


@quick
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "`every`"),
        ({"every": True}, "`every`"),
        ({"every": "30s"}, "`every`"),
        ({"every": datetime.timedelta(0)}, "`every`"),
        ({"keep": 0}, "`keep`"),
        ({"directory": ""}, "`directory`"),
        ({"directory": 5}, "`directory`"),
    ],
)
def test_settings_are_checked(arguments, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        tfdist.Checkpoint(**{"directory": "here", **arguments})


@quick
def test_a_directory_that_cannot_be_written_is_refused_before_training(tmp_path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(CheckpointError, match="must be a directory that can be written"):
        tfdist.fit(model(), *table(10), checkpoint=file / "below", verbose=0)
    with pytest.raises(ArgumentError, match="`checkpoint`"):
        tfdist.fit(model(), *table(10), checkpoint=5, verbose=0)
    with pytest.raises(CheckpointError, match="room"):
        files.check_room(tmp_path, 2**70)
    with pytest.raises(ArgumentError, match="rows"):  # and the directory is free again
        tfdist.fit(model(), np.ones((3, 20)), np.ones(4), checkpoint=tmp_path / "a", verbose=0)
    assert list((tmp_path / "a").iterdir()) == []


@quick
def test_tensors_are_in_tensorflows_own_format(tmp_path) -> None:
    files.write(tmp_path, 0, 5, [Piece("a", tf.range(3))], {"b": 1}, keep=1)
    files.write(tmp_path, 1, 0, [Piece("a", tf.range(4))], {"b": 2}, keep=1)
    (folder,) = tmp_path.iterdir()
    reader = tf.train.load_checkpoint(str(folder / "tensors"))
    assert reader.get_tensor("a").tolist() == [0, 1, 2, 3]
    assert json.loads((folder / "state.json").read_text()) == {"b": 2}
    saved = files.latest(tmp_path)
    assert saved is not None
    assert saved.state == {"b": 2}


@quick
def test_plain_data_comes_back_as_it_was() -> None:
    given = {
        "numbers": [None, True, 3, 0.1, float("inf")],
        ("a", 1): {1, 2},
        "bytes": b"\x00\xff",
        "array": np.arange(6.0).reshape(2, 3),
        "scalar": np.float32(0.1),
        "tensor": tf.constant([1, 2]),
    }
    arrays: list[Any] = []
    written = json.loads(json.dumps(plain.encode(given, arrays)))
    found = plain.decode(written, arrays.__getitem__)
    assert list(found) == list(given)
    for name in ("numbers", ("a", 1), "bytes", "scalar"):
        assert found[name] == given[name]
        assert type(found[name]) is type(given[name])
    np.testing.assert_array_equal(found["array"], given["array"])
    assert found["tensor"].numpy().tolist() == [1, 2]
    for other in (len, object(), keras.layers.Dense(1), np.array([object()])):
        with pytest.raises(plain.NotPlain):
            plain.encode([other], [])


@quick
def test_only_what_training_changed_is_put_back() -> None:
    class Counting(keras.callbacks.Callback):
        def __init__(self, patience: int) -> None:
            super().__init__()
            self.patience, self.wait = patience, 0

    before, after = Counting(patience=2), Counting(patience=5)
    memory = CallbackState([before])
    before.wait = 1
    arrays: list[Any] = []
    state = memory.state(arrays)
    CallbackState([after]).restore(state, arrays.__getitem__)
    assert (after.patience, after.wait) == (5, 1)


@quick
def test_a_callback_may_say_itself_what_its_state_is() -> None:
    class Own(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.generator = np.random.default_rng(0)

        def checkpoint_state(self) -> Any:
            return self.generator.bit_generator.state

        def restore_checkpoint_state(self, state: Any) -> None:
            self.generator.bit_generator.state = state

    one, other = Own(), Own()
    one.generator.random(3)
    arrays: list[Any] = []
    state = json.loads(json.dumps(CallbackState([one]).state(arrays)))
    CallbackState([other]).restore(state, arrays.__getitem__)
    assert other.generator.random() == one.generator.random()


@quick
def test_where_a_release_keeps_its_callbacks_does_not_matter() -> None:
    one, other = (keras.callbacks.EarlyStopping("loss") for _ in range(2))
    memory = CallbackState([one])
    one.wait = 3
    (name, state), *_ = memory.state([]).items()
    assert name == "keras.EarlyStopping 1"
    older = {"keras.src.callbacks.early_stopping.EarlyStopping 1": state}
    CallbackState([other]).restore(older, [].__getitem__)
    assert other.wait == 3
