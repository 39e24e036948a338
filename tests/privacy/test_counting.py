"""Which steps count, and which noise a step gets, whatever callbacks, crashes and files do."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import math
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.parameters import in_part
from tfdist.data.batches import PyDatasetBatches
from tfdist.data.separation import SeparationCheck
from tfdist.errors import ArgumentError, CheckpointError
from tfdist.privacy import Ledger, Phase, model_history
from tfdist.privacy.accounting.correlated import coefficients, sensitivity
from tfdist.privacy.outside_changes import OutsideChanges

L = keras.layers
NUMBERS = 2000
SPENT = Ledger((Phase(0.2, 1.0, 500),))


def sgd(noise: float = 1.0, **options: Any) -> tfdist.DPSGD:
    return tfdist.DPSGD(1.0, noise_multiplier=noise, delta=1e-3, **options)


def ftrl(**options: Any) -> tfdist.DPFTRL:
    return tfdist.DPFTRL(1.0, noise_multiplier=1.0, delta=1e-3, bands=4, **options)


def still() -> Any:
    """A model whose gradients are 0 on `zeros`: what moves it is noise alone."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((40,)), L.Dense(50, use_bias=False, name="still")])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    return model


ZEROS = np.zeros((20, 40), "float32"), np.zeros((20, 50), "float32")


def train(model: Any, *, steps: int = 4, privacy: Any = None, **options: Any) -> Any:
    given = {"batch_size": 5, "epochs": steps // 4, "verbose": 0}
    return tfdist.fit(model, *ZEROS, privacy=privacy or sgd(), **given, **options)


class Watch(keras.callbacks.Callback):  # type: ignore[misc]
    """Keeps what each step has added, and what the disk holds after one."""

    def __init__(self, snapshot: tuple[int, Path, Path] | None = None) -> None:
        super().__init__()
        self.added: list[Any] = []
        self._snapshot = snapshot

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._before = self.model.get_weights()[0].ravel()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.added.append(5 * (self._before - self.model.get_weights()[0].ravel()))
        if self._snapshot is not None and len(self.added) == self._snapshot[0]:
            _, disk, kept = self._snapshot
            while not [*disk.glob("epoch-*"), *disk.glob("*.h5")]:  # a thread writes it
                time.sleep(0.01)
            shutil.copytree(disk, kept)


class SetBack(keras.callbacks.Callback):  # type: ignore[misc]
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = str(path / "r.weights.h5")

    def on_train_begin(self, logs: Any = None) -> None:
        self.model.save_weights(self._path)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.model.optimizer.iterations.assign(0)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.load_weights(self._path)


# --- callbacks --------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", in_part([1, 2], full=[1]))
def test_no_callback_moves_the_count_or_the_noise(tmp_path: Path, at_once: int) -> None:
    model = still()
    model.steps_per_execution = at_once
    watch = Watch()
    report = train(model, steps=12, callbacks=[SetBack(tmp_path), watch]).privacy
    assert report.ledger.steps == len(watch.added) * at_once == 12
    assert (report.uncounted_steps, report.changes) == (0, 0)
    # Independent, so that the deviation of an execution's sum is known, and no two are alike.
    added = np.array(watch.added)
    assert added.std() == pytest.approx(math.sqrt(at_once), rel=0.05)
    correlation = np.corrcoef(added)[np.triu_indices(len(added), 1)]
    assert np.abs(correlation).max() < 5 / math.sqrt(NUMBERS)
    budget = tfdist.PrivacyBudget(report.epsilon * 1.5)
    watch = Watch()
    spent = train(model, steps=400, callbacks=[budget, SetBack(tmp_path), watch]).privacy
    assert spent.ledger.steps == 12 + at_once * len(watch.added) < 60
    assert spent.epsilon <= budget.max_epsilon


@pytest.mark.parametrize("privacy", [None, sgd()])
def test_no_callback_trains_what_trains_privately(privacy: Any) -> None:
    model = still()
    inner = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: tfdist.fit(model, *ZEROS, verbose=0, privacy=privacy)
    )
    with pytest.raises(ArgumentError, match="A callback must not train"):
        train(model, callbacks=[inner])
    assert train(model).privacy.ledger.steps == 8


class Meddles(keras.callbacks.Callback):  # type: ignore[misc]
    """Loads and restores weights, sets others twice, and makes an update."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        model = self.model
        for trains in (model.train_on_batch, functools.partial(keras.Model.fit, model)):
            with pytest.raises(ArgumentError, match="A callback must not train"):
                trains(*ZEROS)
        if epoch == 0:
            self._first = model.get_weights()
            model.load_weights(self._path)
        elif epoch == 1:
            model.set_weights(self._first)
        elif epoch == 2:
            model.set_weights([self._first[0] + 1])
        else:
            model.optimizer.apply([tf.ones((40, 50))], model.trainable_variables)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.model.optimizer.iterations == 6:
            weights = self.model.get_weights()
            weights[0][3, 7] += 1e-3  # a single number
            self.model.set_weights(weights)


def test_what_callbacks_do_to_the_weights_is_noted(tmp_path: Path) -> None:
    other, path = still(), tmp_path / "other.weights.h5"
    other.set_weights([np.ones((40, 50))])
    model_history.keep(other, model_history.History(SPENT))
    other.save_weights(path)
    model = still()
    report = train(model, steps=16, callbacks=[Meddles(path)]).privacy
    assert (report.uncounted_steps, report.changes) == (1, 2)
    assert report.ledger.steps == 500 + 16  # the file is no change: it has its own steps
    assert model_history.of(model).changes == 2
    assert model_history.changed_since(model) == (0, False)
    # Keras's own callbacks compute what they set from released weights.
    given = [keras.callbacks.EarlyStopping(), keras.callbacks.SwapEMAWeights()]
    watched = OutsideChanges(model, pytest.fail).watched([*given, Meddles(path)])
    assert watched[:2] == given
    assert len(watched) == 5


ONES = np.ones((20, 40), "float32"), ZEROS[1]


def train_plainly(model: Any, *callbacks: Any, **options: Any) -> Any:
    """Makes 4 updates in each epoch, which move the weights."""
    return model.fit(*ONES, batch_size=5, verbose=0, callbacks=list(callbacks), **options)


class Begins(keras.callbacks.Callback):  # type: ignore[misc]
    """Makes updates before the first step, and saves the weights that it has set."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        self._update(2)

    def on_train_begin(self, logs: Any = None) -> None:
        self._update(3)
        self.model.set_weights([np.ones((40, 50))])  # as who restores a training by himself
        self.model.optimizer.iterations.assign_add(30)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.set_weights([np.zeros((40, 50))])
        self.model.save(self._path)

    def _update(self, times: int) -> None:
        for _ in range(times):
            self.model.optimizer.apply([tf.ones((40, 50))], self.model.trainable_variables)


def test_what_callbacks_do_before_the_first_step_is_not_private(tmp_path: Path) -> None:
    model, path = still(), tmp_path / "saved.keras"
    report = train(model, callbacks=[Begins(path)]).privacy
    assert (report.ledger.steps, report.uncounted_steps, report.changes) == (4, 35, 1)
    assert model_history.of(keras.models.load_model(path)) == model_history.of(model)


def test_other_ways_to_change_the_weights_are_noted() -> None:
    model = still()
    model.compile(keras.optimizers.SGD(1.0, momentum=0.5), "mse")

    def schedule(epoch: int, rate: float) -> float:
        if epoch == 1:
            model.set_weights([np.ones((40, 50))])
        return rate / 2

    def push(epoch: int, logs: Any) -> None:
        model.optimizer.learning_rate = 0.5
        if epoch == 1:
            model.optimizer.momentums[0].assign(np.ones((40, 50)))

    given = keras.callbacks.LearningRateScheduler(schedule)
    pushes = keras.callbacks.LambdaCallback(on_epoch_end=push)
    report = train(model, steps=8, callbacks=[given, pushes]).privacy
    assert (report.ledger.steps, report.uncounted_steps, report.changes) == (8, 0, 2)


# --- crashes ----------------------------------------------------------------------------


def killed_and_resumed(tmp_path: Path, make: Any, **first: Any) -> tuple[Any, Any, Any]:
    """Trains 40 steps, and again from what the disk held after 17, with 10 saved."""
    disk, kept = tmp_path / "disk", tmp_path / "copy"
    one, other = Watch((17, disk, kept)), Watch()
    saver = tfdist.Checkpoint(disk, every=10)
    train(still(), steps=40, privacy=make(**first), checkpoint=saver, callbacks=[one])
    saver = tfdist.Checkpoint(kept, every=10)
    report = train(still(), steps=40, privacy=make(), checkpoint=saver, callbacks=[other])
    return one.added, other.added[10:], report.privacy  # the checkpoint has the first 10


def test_a_killed_training_counts_every_step(tmp_path: Path) -> None:
    before, after, report = killed_and_resumed(tmp_path, sgd, spent=SPENT)
    assert len(after) == 30
    # 17 were made, of which 10 are in the weights, and 30 more; `spent` is in the checkpoint.
    spent, first, second = report.ledger.phases
    assert spent == SPENT.phases[0]
    assert 17 <= first.steps <= 18
    assert second.steps == 30
    assert abs(np.corrcoef(before[10], after[0])[0, 1]) < 5 / math.sqrt(NUMBERS)
    (tmp_path / "copy" / "privacy.json").unlink()
    with pytest.raises(CheckpointError, match="must lie beside the checkpoints"):
        train(still(), steps=44, checkpoint=tmp_path / "copy")
    (tmp_path / "copy" / "privacy.json").write_text("{")
    with pytest.raises(CheckpointError, match="must be readable"):
        train(still(), steps=44, checkpoint=tmp_path / "copy")


def test_steps_that_are_made_again_have_other_noise(tmp_path: Path) -> None:
    before, after, report = killed_and_resumed(tmp_path, ftrl)
    lost, whole = report.ledger.mechanisms
    assert (whole.steps, whole.after) == (40, 0)
    assert lost.after == 10
    assert 7 <= lost.steps <= 8
    # Their own noise is new on both; what they take back of steps before is the same.
    difference = np.array(before[10]) - after[0]
    assert difference.std() == pytest.approx(math.sqrt(2), rel=0.1)
    back = np.array(before[10]) + after[0]  # twice what is taken back of three steps, and 2 own
    taken = 4 * sum(f**2 for f in coefficients(4)[1:])
    assert back.std() == pytest.approx(math.sqrt(2 + taken), rel=0.1)
    changed = ZEROS[0].copy()
    changed[3] = 1.0
    for given, privacy in (((changed, ZEROS[1]), ftrl()), (ZEROS, ftrl())):
        model = still()
        if given is ZEROS:
            model.compile(keras.optimizers.SGD(1.0), "mae")
        with pytest.raises(ArgumentError, match="must be of the same training"):
            tfdist.fit(
                model, *given, batch_size=5, epochs=11, verbose=0, privacy=privacy,
                checkpoint=tmp_path / "copy",
            )  # fmt: skip


@pytest.mark.parametrize("make", in_part([sgd, ftrl], full=[sgd]))
def test_two_that_go_on_from_copies_add_up(tmp_path: Path, make: Any) -> None:
    disk, copies = tmp_path / "disk", [tmp_path / "a", tmp_path / "b"]

    def privacy() -> Any:  # as a script that is started again makes it
        return make(spent=Ledger((Phase(0.2, 1.0, 500),)))

    def goes_on(where: Path, *callbacks: Any) -> Any:
        saver, given = tfdist.Checkpoint(where, every=2), list(callbacks)
        return train(still(), steps=8, privacy=privacy(), checkpoint=saver, callbacks=given)

    goes_on(disk, Watch((3, disk, copies[0])))
    shutil.copytree(*copies)
    one, other = (goes_on(where).privacy for where in copies)
    assert (one.ledger.steps, other.ledger.steps) == (509, 509)  # 3, and 6 from step 2 on
    both = one.ledger.merged(other.ledger)
    assert both.steps == other.ledger.merged(one.ledger).merged(both).steps == 500 + 3 + 6 + 6
    together = train(still(), privacy=make(spent=one.ledger.merged(other.ledger))).privacy
    assert together.ledger.steps == both.steps + 4
    if make is ftrl:
        parts = sorted((p.after, p.steps) for p in both.mechanisms[1:])
        assert parts == [(0, 8), (2, 1), (2, 6)]
        costs = [p.gaussian_square for p in both.mechanisms[1:]]
        assert sum(costs) > 2 * sensitivity(4, None, 8) ** 2 - sensitivity(4, None, 2) ** 2


class BreakError(Exception):
    pass


class Break(keras.callbacks.Callback):  # type: ignore[misc]
    def __init__(self, epoch: int = 1) -> None:
        super().__init__()
        self._epoch = epoch

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == self._epoch:
            raise BreakError


class BreakAtOnce(keras.callbacks.Callback):  # type: ignore[misc]
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        raise BreakError


def resumed(kind: str, path: Path, *callbacks: Any) -> dict[str, Any]:
    if kind == "checkpoint":
        return {"checkpoint": path, "callbacks": list(callbacks)}
    return {"callbacks": [keras.callbacks.BackupAndRestore(path), *callbacks]}


def test_a_target_is_met_by_all_processes_together(tmp_path: Path) -> None:
    target = tfdist.DPSGD(1.0, target_epsilon=1.0, delta=1e-3, accountant="rdp")
    whole = train(still(), steps=8, privacy=target).privacy
    with pytest.raises(BreakError):
        train(still(), steps=8, privacy=target, checkpoint=tmp_path, callbacks=[Break()])
    resumed = train(still(), steps=8, privacy=target, checkpoint=tmp_path).privacy
    assert [phase.steps for phase in resumed.ledger.phases] == [4, 4]
    assert (resumed.ledger, resumed.epsilon) == (whole.ledger, whole.epsilon)


def test_what_a_backup_has_lost_counts(tmp_path: Path) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"

    def backup(where: Path) -> Any:
        return keras.callbacks.BackupAndRestore(where, save_freq=10)

    target = tfdist.DPSGD(1.0, target_epsilon=1.0, delta=1e-3)
    watch = Watch((17, disk, kept))
    train(still(), steps=40, privacy=target, callbacks=[backup(disk), watch])
    report = train(still(), steps=40, privacy=target, callbacks=[backup(kept)]).privacy
    # 40 were planned for the target: with the 17 that were made fewer are left.
    assert 37 <= report.ledger.steps <= 40
    assert 0.9 < report.epsilon <= 1.0
    assert len({phase.noise_multiplier for phase in report.ledger.phases}) == 1
    assert not kept.exists()


def test_a_backup_of_other_training_is_not_private(tmp_path: Path) -> None:
    def backup() -> Any:
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    with pytest.raises(BreakError):
        train_plainly(still(), backup(), Break(), epochs=3)
    with pytest.raises(BreakError):
        train(still(), steps=12, callbacks=[backup(), Break(2)])
    report = train(still(), steps=12, callbacks=[backup()]).privacy
    assert (report.ledger.steps, report.uncounted_steps, report.changes) == (8, 4, 0)


@pytest.mark.parametrize("kind", in_part(["callbacks", "checkpoint"], full=["callbacks"]))
def test_training_between_an_interruption_and_its_continuation(
    tmp_path: Path, kind: str
) -> None:
    model = still()
    with pytest.raises(BreakError):
        train(model, **resumed(kind, tmp_path, BreakAtOnce()))
    assert [path.name for path in tmp_path.iterdir()] == ["privacy.json"]
    train_plainly(model)
    report = train(model, **resumed(kind, tmp_path)).privacy
    assert (report.ledger.steps, report.uncounted_steps, report.changes) == (5, 4, 0)


# --- files ------------------------------------------------------------------------------


def test_files_say_what_was_spent(tmp_path: Path) -> None:
    model = still()
    kept = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    first = train(model, steps=8, callbacks=[kept]).privacy
    model.save_weights(tmp_path / "w.weights.h5")
    for path, steps in (("1.keras", 4), ("2.keras", 8), ("w.weights.h5", 8)):
        loaded = still() if path == "w.weights.h5" else None
        if loaded is None:
            loaded = keras.models.load_model(tmp_path / path)
        else:
            loaded.load_weights(tmp_path / path)
        report = train(loaded).privacy
        assert report.ledger.steps == steps + 4
        assert (report.uncounted_steps, report.changes) == (0, 0)
        assert f"spent in {steps + 4} steps" in report.line()
    # Given as well, they count once; a model of its layers has them too.
    assert train(loaded, privacy=sgd(spent=first.ledger)).privacy.ledger.steps == 16
    around = keras.Sequential([keras.Input((40,)), loaded.get_layer("still")])
    around.compile("sgd", "mse")
    assert train(around).privacy.ledger.steps == 20


def test_files_say_what_else_was_trained(tmp_path: Path) -> None:
    model, weights = still(), str(tmp_path / "w.weights.h5")
    model_history.keep(model, model_history.History(SPENT))
    train_plainly(model, keras.callbacks.ModelCheckpoint(tmp_path / "kept.keras"))
    model.save_weights(weights)
    loaded = still()
    loaded.load_weights(weights)
    saved = keras.models.load_model(tmp_path / "kept.keras")
    for copied in (loaded, saved, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert model_history.of(copied) == model_history.History(SPENT, uncounted=4)
    train_plainly(saved)
    again = pickle.loads(pickle.dumps(saved))
    assert model_history.of(again).uncounted == 8
    assert model_history.changed_since(again) == (0, False)


def quantized(model: Any) -> Any:
    model.quantize("int8")
    return model


def around(layer: Any) -> Any:
    return keras.Sequential([keras.Input((40,)), layer])


def adapted(model: Any) -> Any:
    layer = model.get_layer("still")
    layer.quantize("int8")
    layer.enable_lora(2)
    return around(layer)


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize`")
@pytest.mark.parametrize(
    "change",
    [
        quantized,
        adapted,
        lambda model: around(quantized(model).get_layer("still")),
        lambda model: around(copy.deepcopy(model.get_layer("still"))),
        lambda model: pickle.loads(pickle.dumps(quantized(model))),
        lambda model: tfdist.privacy.make_private_model(model)[0],
    ],
)
def test_other_weights_of_a_layer_keep_what_was_spent(change: Any) -> None:
    model = still()
    model_history.keep(model, model_history.History(SPENT))
    assert model_history.of(change(model)).ledger == SPENT
    with model_history.forgotten(model):
        assert model_history.of(model) == model_history.History()
    assert model_history.of(model).ledger == SPENT


def test_what_is_not_counted_is_noted() -> None:
    model = still()
    train(model)
    tfdist.fit(model, *ZEROS, batch_size=5, verbose=0)
    report = train(model).privacy
    assert (report.ledger.steps, report.uncounted_steps, report.changes) == (8, 4, 0)
    assert "4 updates before, or between" in report.statement()
    model.set_weights([np.ones((40, 50))])
    report = train(model).privacy
    assert (report.ledger.steps, report.uncounted_steps, report.changes) == (12, 4, 1)
    assert report.line().endswith("; other training of the weights is not counted")
    model.set_weights([np.zeros((40, 50))])
    copied, _ = tfdist.privacy.make_private_model(model)
    assert model_history.of(copied) == dataclasses.replace(model_history.of(model), changes=2)


# --- ledgers ----------------------------------------------------------------------------


def test_other_groupings_do_not_compose() -> None:
    model, groups = still(), np.arange(20) // 2
    for _ in range(2):
        report = train(model, privacy=sgd(group_ids=groups.copy())).privacy
    assert report.ledger.steps == 8
    with pytest.raises(ArgumentError, match="must have the same `group_ids`"):
        train(model, privacy=sgd(group_ids=np.arange(20) % 10))
    written = json.loads(json.dumps(report.ledger.to_dict()))
    assert Ledger.from_dict(written) == report.ledger
    with pytest.raises(ArgumentError, match="must have the same `group_ids`"):
        train(still(), privacy=sgd(group_ids=np.arange(20) % 10, spent=report.ledger))


def test_what_a_ledger_says_goes_with_it(capsys: Any) -> None:
    first = train(still(), privacy=sgd(seed=3)).privacy
    assert not first.secret
    saved = Ledger.from_dict(json.loads(json.dumps(first.ledger.to_dict())))
    assert not saved.secret
    model = still()
    report = train(model, privacy=sgd(spent=saved.add(Phase(0.2, 1.0, 5)))).privacy
    assert (report.secret, report.ledger.steps) == (False, 13)
    for text in (report.statement(), tfdist.privacy.statement(report.ledger, delta=1e-3)):
        assert text.startswith("There is no guarantee")
        assert text.count("There is no guarantee") == 1
    assert report.line().endswith("a seed was given")
    # Another phase that is made by hand is of other steps, as far as anyone can tell.
    again = sgd(spent=saved.merged(Ledger((Phase(0.2, 1.0, 5),))))
    capsys.readouterr()
    report = tfdist.fit(model, *ZEROS, batch_size=5, verbose=2, privacy=again).privacy
    assert report.ledger.steps == 13 + 5 + 4
    assert "`spent` has 5 steps that are counted besides 5 like them" in capsys.readouterr().out


@pytest.mark.quick
def test_two_histories_of_one_training_count_once() -> None:
    def phase(steps: int, run_id: str = "", **options: Any) -> Phase:
        return Phase(0.1, 2.0, steps, run_id=run_id, **options)

    early, late = Ledger((phase(4, "a"),)), Ledger((phase(9, "a"), phase(3, "b")))
    assert early.merged(late).steps == late.merged(early).steps == 12
    assert early.merged(Ledger((phase(4, "c"),))).steps == 8
    by_hand = Ledger((phase(5), Phase(0.2, 1.0, 7)))
    assert by_hand.merged(by_hand) == by_hand
    assert by_hand.merged(Ledger.from_dict(by_hand.to_dict())) == by_hand
    assert by_hand.merged(Ledger((phase(5),))).steps == 17  # of somebody else
    turns = {"bands": 2, "separation": 3}
    grown = Ledger((Phase(1.0, 1.0, 4, run_id="a", **turns),)).merged(
        Ledger((Phase(1.0, 1.0, 9, run_id="a", **turns),))
    )
    assert [p.steps for p in grown.phases] == [9]  # one mechanism, not two
    alone = Ledger((Phase(1.0, 1.0, 4, **turns), Phase(1.0, 1.0, 4, **turns)))
    assert alone.merged(Ledger(alone.phases[:1])) == alone.merged(alone) == alone
    assert alone.merged(Ledger((Phase(1.0, 1.0, 4, **turns),))).steps == 12


@pytest.mark.quick
@pytest.mark.parametrize("separation", [None, 2, 3, 5])
def test_no_pattern_moves_lost_steps_more_than_is_said(separation: int | None) -> None:
    for bands, after, steps in itertools.product((1, 2, 4), (1, 2, 5, 7), (1, 3, 5)):
        every = range(after + steps)
        inverse = sum(f * np.eye(len(every), k=-i) for i, f in enumerate(coefficients(bands)))
        matrix = np.linalg.inv(inverse)
        patterns = [
            p
            for count in range(1, 2 if separation is None else len(every) // separation + 2)
            for p in itertools.combinations(every, count)
            if separation is None or all(b - a >= separation for a, b in itertools.pairwise(p))
        ]
        worst = max(np.linalg.norm(matrix[after:, list(p)].sum(1)) for p in patterns)
        assert worst <= sensitivity(bands, separation, steps, after) + 1e-9


# --- promises ---------------------------------------------------------------------------


def passes(check: SeparationCheck, datasets: list[Any]) -> None:
    for dataset in datasets:
        check.begin_pass()
        for _ in check.watching(dataset):
            check.made += 1  # type: ignore[attr-defined]


def a_check(separation: int | None) -> Any:
    check = SeparationCheck(separation, lambda: check.made)
    check.made = 0
    return check


@pytest.mark.quick
def test_examples_that_come_back_early_are_seen() -> None:
    rows = np.arange(40, dtype="float32")[:, None]
    rows[7] = rows[31]  # two examples with the same values
    dataset = tf.data.Dataset.from_tensor_slices((rows, {"y": rows[:, 0]}))
    batches = dataset.batch(10)
    passes(a_check(4), [batches, batches, batches])
    passes(a_check(None), [batches])
    other = tf.data.Dataset.from_tensor_slices((rows[::-1], {"y": rows[::-1, 0]})).batch(10)
    for separation, given, message in (
        (5, [batches, batches], "an example of step 1 again in step 5"),
        (4, [batches, other], "an example of step 4 again in step 5"),
        (4, [batches.take(2), batches], "an example of step 1 again in step 3"),
        (None, [batches.repeat(2)], "a batch of step 1 again in step 5"),
    ):
        check = a_check(separation)
        with pytest.raises(tf.errors.OpError):
            passes(check, given)
        assert message in check.problem


def turned(dataset: Any) -> Any:
    """Batches in the reverse order in each second pass, by Python."""
    passes = itertools.count()

    def batches() -> Any:
        return reversed(list(dataset)) if next(passes) % 2 else iter(dataset)

    made = tf.data.Dataset.from_generator(batches, output_signature=dataset.element_spec)
    return made.apply(tf.data.experimental.assert_cardinality(4))


@pytest.mark.parametrize(
    ("make", "separation", "options", "message"),
    [
        (lambda d: d.repeat(), None, {"steps_per_epoch": 8}, "data that repeats itself"),
        (lambda d: d.repeat(2), None, {}, "data that repeats itself"),
        (lambda d: d.repeat(2), 8, {}, "min_separation=8 and 4 batches"),
        (
            lambda d: tf.data.Dataset.from_tensor_slices(next(iter(d))).repeat(4).batch(5),
            2,
            {},
            "min_separation=2 and 1 batches",
        ),
        (lambda d: d, 5, {"epochs": 2}, "min_separation=5 and 4 batches"),
        (lambda d: d.shuffle(4, seed=1), 4, {"epochs": 2}, "reshuffle_each_iteration=False"),
        (lambda d: turned(d), 4, {"epochs": 2}, "an example of step 4 again in step 5"),
    ],
)
def test_promises_that_data_cannot_keep_are_refused(
    make: Any, separation: int | None, options: dict[str, Any], message: str
) -> None:
    rows = np.arange(20, dtype="float32")
    data = np.repeat(rows[:, None], 40, 1), np.repeat(rows[:, None], 50, 1)
    dataset = make(tf.data.Dataset.from_tensor_slices(data).batch(5))
    with pytest.raises(ArgumentError, match=message):
        tfdist.fit(
            still(), dataset, verbose=0, privacy=ftrl(min_separation=separation), **options
        )


@pytest.mark.quick
def test_a_py_dataset_that_fit_shuffles_keeps_no_promise() -> None:
    class Pages(keras.utils.PyDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return 3

        def __getitem__(self, page: int) -> Any:
            return np.full((2, 1), page, "float32")

    def check(separation: int | None, comes_again: bool, shuffle: bool = True) -> None:
        pages = PyDatasetBatches(Pages(), None, shuffle=shuffle, seed=1)
        pages.check_order(separation, comes_again)

    check(3, comes_again=False)
    check(1, comes_again=True)
    check(3, comes_again=True, shuffle=False)
    with pytest.raises(ArgumentError, match=r"steps that follow each other. Pass fit\(shuffle"):
        check(3, comes_again=True)


def test_a_frozen_model_brings_what_was_spent(tmp_path: Path) -> None:
    model = still()
    train(model)
    model.trainable = False
    model.save(tmp_path / "frozen.keras")
    loaded = keras.models.load_model(tmp_path / "frozen.keras")
    loaded.get_layer("still").trainable = loaded.trainable = True
    loaded.compile("sgd", "mse")
    assert train(loaded).privacy.ledger.steps == 8


def test_a_relation_holds_for_all_steps_or_is_refused() -> None:
    model = still()
    correlated = train(model, privacy=ftrl()).privacy
    for call in (
        lambda: train(model, privacy=sgd()),
        lambda: correlated.ledger.epsilon(1e-3),
        lambda: tfdist.privacy.statement(correlated.ledger, delta=1e-3),
    ):
        with pytest.raises(ArgumentError, match="`relation` must be 'replace_special' or"):
            call()
    both = train(model, privacy=sgd(relation="replace_special")).privacy
    assert both.ledger.steps == 8
    assert both.epsilon > correlated.epsilon
