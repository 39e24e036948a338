"""The check of client-level privacy: it finds what was broken on purpose, and nothing else."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist.errors import ArgumentError
from tfdist.privacy import check
from tfdist.privacy.checking.report import CheckReport
from tfdist.privacy.mechanism.client_updates import ClientUpdates
from tfdist.privacy.mechanism.grid import Rounding

IDS = np.repeat(np.arange(30), 4)
ROWS = np.random.default_rng(0).normal(size=(120, 11)).astype("float32")
X, Y = ROWS[:, :8], ROWS[:, 8:]


def measured(parts: tuple[str, ...], **settings: Any) -> CheckReport:
    keras.utils.set_random_seed(1)
    layers = [keras.Input((8,)), keras.layers.Dense(40, "relu"), keras.layers.Dense(3)]
    model = keras.Sequential(layers)
    model.compile("adam", "mse")
    privacy = tfdist.ClientDP(**{
        "l2_norm_clip": 0.5, "noise_multiplier": 2.0, "delta": 1e-3,
        "sampling_probability": 0.3, **settings,
    })  # fmt: skip
    averaging = tfdist.FedAvg(
        local_steps=2, clients=IDS, weighting="uniform", privacy=privacy,
        server_optimizer=keras.optimizers.Adam(0.1),
    )  # fmt: skip
    before = model.get_weights()
    report = check(
        model, X, Y, federated=averaging, batch_size=4, effort=0.05, parts=parts,
        strategy="single",
    )  # fmt: skip
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not tfdist.privacy.model_history.of(model).ledger.phases
    return report


def failed(report: CheckReport) -> set[str]:
    return {fact.name for fact in report.failures}


@pytest.mark.parametrize("parts", [
    ("noise",),
    pytest.param(("draws", "contributions", "noise"), marks=pytest.mark.full),
])  # fmt: skip
def test_a_sound_mechanism_passes(parts: tuple[str, ...]) -> None:
    report = measured(parts)
    assert report.passed, str(report)
    assert report["noise: standard deviation"].measured == pytest.approx(1.0, abs=0.05)
    if len(parts) > 1:
        assert report["contributions"].measured == pytest.approx(1.0, abs=1e-3)  # reached
        assert len(report.facts) > 15


DEVIATION = "noise: standard deviation over the right one"


def test_noise_that_is_too_small_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Rounding.counts

    def halved(self: Any, value: Any, normal: Any, unit: Any) -> Any:
        return counts(self, value, normal / 2, unit)

    monkeypatch.setattr(Rounding, "counts", halved)
    report = measured(("noise",))
    assert DEVIATION in failed(report)
    assert report[DEVIATION].measured == pytest.approx(0.5, abs=0.03)


@pytest.mark.full
def test_noise_of_a_single_replica_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each of two replicas had to add half of the variance, and one did not."""
    made = Rounding.__init__

    def of_two(self: Any, noise: float, bound: float, replicas: int) -> None:
        made(self, noise, bound, 2)

    monkeypatch.setattr(Rounding, "__init__", of_two)
    report = measured(("noise",))
    assert report[DEVIATION].measured == pytest.approx(0.5**0.5, abs=0.03)
    assert DEVIATION in failed(report)


@pytest.mark.full
def test_noise_that_is_repeated_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    renew = ClientUpdates.restart
    monkeypatch.setattr(
        ClientUpdates, "restart", lambda self, seed, first, _=None: renew(self, 3, first)
    )
    assert "noise: independent between steps, p-value" in failed(measured(("noise",)))


@pytest.mark.full
def test_an_update_that_is_not_clipped_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClientUpdates, "clip", lambda self, update: list(update))
    assert "contributions: of one client, in units of l2_norm_clip" in failed(
        measured(("contributions",))
    )


@pytest.mark.full
def test_a_divisor_of_drawn_clients_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    mean = ClientUpdates.mean

    def halved(self: Any, total: Any) -> Any:
        return [tf.cast(part, tf.float64) / 2 for part in mean(self, total)]

    monkeypatch.setattr(ClientUpdates, "mean", halved)
    assert any(name.startswith("division") for name in failed(measured(("draws",))))


@pytest.mark.quick
def test_settings_that_cannot_be_measured_are_refused() -> None:
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    examples = tfdist.DPSGD(1.0, noise_multiplier=1.0, delta=1e-3)
    averaging = tfdist.FedAvg(local_steps=1, clients=IDS, privacy=examples)
    with pytest.raises(ArgumentError, match="pass the DPSGD as `privacy` alone"):
        check(model, X, Y, federated=averaging)
    clients = tfdist.ClientDP(1.0, noise_multiplier=1.0, delta=1e-3)
    averaging = tfdist.FedAvg(local_steps=1, weighting="uniform", privacy=clients)
    with pytest.raises(ArgumentError, match="must have `clients`"):
        check(model, X, Y, federated=averaging)
    turns = tfdist.ClientDPFTRL(1.0, noise_multiplier=1.0, delta=1e-3)
    averaging = tfdist.FedAvg(local_steps=1, clients=IDS, weighting="uniform", privacy=turns)
    with pytest.raises(ArgumentError, match="independent noise"):
        check(model, X, Y, federated=averaging)
