"""Users and augmented copies: what is clipped together, drawn together, and counted as one."""

from __future__ import annotations

import functools
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.parameters import in_part
from tests.privacy.test_clipping import FAST, Units, clipped, close, gradients_of_each, some
from tfdist import data
from tfdist._keras import layers as keras_layers
from tfdist.errors import ArgumentError
from tfdist.privacy import Ledger, Phase, Poisson
from tfdist.privacy.mechanism import clipping
from tfdist.privacy.mechanism.clipping_groups import Groups
from tfdist.privacy.sampling.users import PoissonOfUsers, Users
from tfdist.strategies.base import Place

L = keras.layers


def loop(
    model: Any, x: Any, y: Any, clip: float, units: Units, scale: float = 1.0
) -> tuple[list[Any], Any]:
    """Takes the gradients of single examples, adds up those of each unit, and clips the sum."""
    rows = [row for unit in units for row in unit]
    if not rows:
        return [np.zeros(v.shape) for v in model.trainable_variables], np.zeros(0)
    gradients = gradients_of_each(model, some(x, rows), some(y, rows))
    numbers = iter(range(len(rows)))
    return clipped(gradients, [[next(numbers) for _ in unit] for unit in units], clip, scale)


def test_a_group_with_something_not_finite_counts_nothing_and_others_do() -> None:
    for name in ("dense", "dense_many_positions", "embedding"):
        model, x, y = FAST[name]()
        weight = np.array([1, np.nan, 1, 1, 1], "float32")
        units = Groups(tf.constant([1, 1, 1, 2, 3]), 3)
        received = clipping.clipped_sum(
            model, x, y, np.ones(5, bool), 0.1, weight, False, units
        )
        expected, norms = loop(model, x, y, 0.1, [[3], [4]])
        close([received.norms, *received.sums], [[0, *norms], *expected])


# --- in fit -----------------------------------------------------------------------------

CLIP = 0.5


def rows(count: int = 60) -> tuple[Any, Any, Any]:
    """Examples, and whose they are: users have between 1 and 9 of them, anywhere."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(count, 6)).astype("float32"), rng.integers(0, 3, size=count)
    names = np.array(["anna", "ben", "cleo", "dora", "emil", "fay", "gus", "hal", "ida", "jo"])
    return x, y, names[np.minimum(rng.geometric(0.2, count), 10) - 1]


def classifier(*layers: Any, optimizer: Any = None, **options: Any) -> Any:
    keras.utils.set_random_seed(1)
    made = layers or (L.Dense(8, activation="relu", kernel_regularizer="l2"), L.Dense(3))
    model = keras.Sequential([keras.Input((6,)), *made])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.SGD(0.5), loss, metrics=["accuracy"], **options)
    return model


def drawn_users(ids: Any, most: int | None, batch_size: int, step: int, seed: int) -> Any:
    """The rows of each user drawn into a step."""
    users = Users(ids, most)
    sampler = PoissonOfUsers(users, Poisson()).bind(None, len(ids))
    drawn = sampler.rows(step, num_rows=len(ids), batch_size=batch_size, seed=seed)
    found: dict[str, list[int]] = {}
    for row in drawn:
        found.setdefault(ids[row], []).append(int(row))
    return found


@functools.cache
def by_hand(steps: int, most: int | None) -> Any:
    """User-level DP-SGD without noise, one example after the other; gives the weights."""
    x, y, ids = rows()
    model = classifier()
    for step in range(steps):
        units = list(drawn_users(ids, most, 15, step, 3).values())
        add_clipped(model, x, y, units, 15)
    return model.get_weights()


def add_clipped(
    model: Any, x: Any, y: Any, units: Units, batch_size: int, scale: float = 1.0
) -> None:
    """Makes one step by hand."""
    variables = model.trainable_variables
    with keras_layers.without_regularizers(variables):
        sums, _ = loop(model, x, y, CLIP, units, scale)
    for variable, summed in zip(variables, sums, strict=True):
        penalty = 2 * 0.01 * variable.numpy() if variable.regularizer else 0.0
        variable.assign(variable.numpy() - 0.5 * (summed / batch_size + penalty))


FITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all_rows": ({}, {}),
    "some_rows": ({}, {"max_rows_per_group": 3}),
    "microbatches": ({}, {"max_rows_per_group": 3, "microbatch_size": 7}),
    "small_microbatches": ({}, {"microbatch_size": 1}),
    "asked_to_compile": ({"jit_compile": True}, {}),
}


@pytest.mark.parametrize("name", in_part(FITS, full=["some_rows", "small_microbatches"]))
def test_fit_with_users_does_what_the_algorithm_says(name: str) -> None:
    compiled, settings = FITS[name]
    x, y, ids = rows()
    expected = by_hand(8, settings.get("max_rows_per_group"))
    model = classifier(**compiled)
    privacy = tfdist.DPSGD(CLIP, noise_multiplier=0.0, delta=1e-2, group_ids=ids, **settings)
    options = {"batch_size": 15, "epochs": 2, "steps_per_epoch": 4, "verbose": 0, "seed": 3}
    tfdist.fit(model, x, y, privacy=privacy, **options)
    for received, wanted in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(received, wanted, rtol=2e-4, atol=1e-6)


@pytest.mark.quick
def test_users_are_drawn_whole_and_independently() -> None:
    _, _, ids = rows(200)
    counts = dict(zip(*np.unique(ids, return_counts=True), strict=True))
    seen = dict.fromkeys(counts, 0)
    chosen: set[int] = set()
    for step in range(400):
        for user, mine in drawn_users(ids, 8, 20, step, 1).items():
            assert len(set(mine)) == len(mine) == min(8, counts[user])
            assert set(ids[mine]) == {user}
            seen[user] += 1
            chosen.update(mine)
    kept = sum(min(8, count) for count in counts.values())
    probability = 20 / kept
    deviation = np.sqrt(400 * probability * (1 - probability))
    assert all(abs(n - 400 * probability) < 5 * deviation for n in seen.values())
    assert len(chosen) == 200  # whose rows are many gives others in another step


def test_a_user_changes_the_sum_by_no_more_than_the_norm() -> None:
    """Without one user the noiseless step differs by at most the norm, over the batch size."""
    x, y, ids = rows()
    moved = []
    start = classifier(L.Dense(3)).get_weights()
    for kept in (np.ones(len(x), bool), ids != "ben"):
        weight = np.where(kept, 1e4, 0.0).astype("float32")
        model = classifier(L.Dense(3), optimizer=keras.optimizers.SGD(1.0))
        model.set_weights(start)
        before = np.concatenate([w.ravel() for w in start])
        privacy = tfdist.DPSGD(CLIP, noise_multiplier=0.0, delta=1e-2, group_ids=ids)
        options = {"batch_size": 60, "verbose": 0, "steps_per_epoch": 1}
        tfdist.fit(model, x, y, sample_weight=weight, privacy=privacy, **options)
        moved.append(np.concatenate([w.ravel() for w in model.get_weights()]) - before)
    difference = 60 * np.linalg.norm(moved[0] - moved[1])
    assert difference == pytest.approx(CLIP, rel=1e-3)  # the user was clipped, and is gone


def test_users_are_what_is_counted_and_said(capsys: Any) -> None:
    x, y, ids = rows()
    privacy = tfdist.DPSGD(CLIP, noise_multiplier=2.0, delta=1e-2, group_ids=ids)
    model = classifier()
    report = tfdist.fit(model, x, y, batch_size=15, verbose=2, privacy=privacy).privacy
    users = len(set(ids))
    assert report.ledger == Ledger((Phase(0.25, 2.0, 4, None, users, "user"),))
    assert report.epsilon == pytest.approx(
        tfdist.privacy.epsilon(
            sampling_probability=0.25, noise_multiplier=2.0, steps=4, delta=1e-2
        )
    )
    text = report.statement()
    for part in (
        "all examples of one user, added or removed",
        "each user drawn into each step",
        "each user's gradients added up and clipped",
        "numbers of examples and of users",
        "with several ids",
    ):
        assert part in text
    assert "not for a person who contributed several" not in text
    assert capsys.readouterr().out.strip().endswith("spent in 4 steps, for each user")
    assert Ledger.from_dict(report.ledger.to_dict()) == report.ledger
    plain = tfdist.DPSGD(CLIP, noise_multiplier=2.0, delta=1e-2)
    before = model.get_weights()
    with pytest.raises(ArgumentError, match="must protect the same unit: examples, users"):
        tfdist.fit(model, x, y, batch_size=15, verbose=0, privacy=plain)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_quantile_is_of_users() -> None:
    x, y, ids = rows()
    privacy = tfdist.DPSGD(
        1e-3, noise_multiplier=0.0, delta=1e-2, group_ids=ids, target_quantile=0.5
    )
    options = {"batch_size": 60, "epochs": 30, "verbose": 0, "steps_per_epoch": 1}
    model = classifier(L.Dense(3), optimizer=keras.optimizers.SGD(0.0))
    shown = tfdist.fit(model, x, y, privacy=privacy, **options).history["l2_norm_clip"]
    # All users are above it, so each step multiplies it by exp(0.2 * 0.5).
    assert shown[10] == pytest.approx(1e-3 * np.exp(1.0), rel=1e-3)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"group_ids": np.zeros(5)}, {}, "whole number or a name for each example"),
        ({"group_ids": np.array([1, "1"] * 30, object)}, {}, "values of type int and str"),
        ({"group_ids": np.array(["a", np.nan] * 30, object)}, {}, "none may be missing"),
        ({"group_ids": np.zeros(59, int)}, {}, "must have one number or name for each example"),
        ({"max_rows_per_group": 2}, {}, "must be given with `group_ids`"),
        ({"max_rows_per_group": 0, "group_ids": np.zeros(60, int)}, {}, "`max_rows_per_group`"),
        ({"group_ids": np.zeros(60, int)}, {"shard": "local"}, "Leave `shard` out"),
        ({"group_ids": np.zeros(60, int)}, {"validation_split": 0.5}, "of other users"),
    ],
)
def test_users_that_cannot_be_protected(settings: Any, options: Any, message: str) -> None:
    x, y, _ = rows()

    def train() -> None:
        privacy = tfdist.DPSGD(CLIP, noise_multiplier=1.0, delta=1e-2, **settings)
        tfdist.fit(classifier(), x, y, verbose=0, privacy=privacy, **options)

    with pytest.raises(ArgumentError, match=message):
        train()


# --- augmented copies -------------------------------------------------------------------

COPIED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "microbatches": ({}, {"microbatch_size": 7}),
    "compiled": ({"jit_compile": True}, {}),
    "compiled_microbatches": ({"jit_compile": True}, {"microbatch_size": 7}),
    "users": ({}, {"max_rows_per_group": 3}),
}


@functools.cache
def copies_by_hand(of_users: bool) -> Any:
    """DP-SGD without noise on means over 3 copies, one after the other; gives the weights."""
    x, y, ids = rows()
    augment = tfdist.Augment(L.GaussianNoise(0.5))
    sampler: Any = Poisson(capacity=len(x))
    if of_users:
        sampler = PoissonOfUsers(Users(ids, 3), Poisson())
    read = data.SourceSettings(
        8, 4, sampler, False, 3, training=True, augment=augment, private=True, copies=3
    )
    model = classifier()
    for share in data.read(x, y, None, read).shares(Place()).take(8):
        copies = [column.numpy()[: int(share.rows)] for column in share.data]  # no padding
        of = share.groups.numpy() if of_users else np.arange(len(copies[0])) // 3
        units = [list(np.flatnonzero(of == u)) for u in dict.fromkeys(of)] if share.rows else []
        add_clipped(model, *copies, units, 8, 1 / 3)
    return model.get_weights()


@pytest.mark.parametrize(
    "name", in_part(COPIED, full=["compiled", "compiled_microbatches", "microbatches"])
)
def test_the_mean_over_augmented_copies_is_clipped(name: str) -> None:
    compiled, settings = COPIED[name]
    x, y, ids = rows()
    if name == "users":
        settings = {**settings, "group_ids": ids}
    expected = copies_by_hand(name == "users")
    augment = tfdist.Augment(L.GaussianNoise(0.5))
    model = classifier(**compiled)
    privacy = tfdist.DPSGD(CLIP, noise_multiplier=0.0, delta=1e-2, augmentations=3, **settings)
    options = {"batch_size": 8, "epochs": 2, "steps_per_epoch": 4, "verbose": 0, "seed": 3}
    tfdist.fit(model, x, y, privacy=privacy, augment=augment, **options)
    for received, wanted in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(received, wanted, rtol=5e-4, atol=1e-5)


@pytest.mark.quick
def test_copies_need_something_that_changes_them() -> None:
    x, y, _ = rows()
    privacy = tfdist.DPSGD(CLIP, noise_multiplier=1.0, delta=1e-2, augmentations=2)
    with pytest.raises(ArgumentError, match="must be given with `augment`"):
        tfdist.fit(classifier(), x, y, verbose=0, privacy=privacy)
