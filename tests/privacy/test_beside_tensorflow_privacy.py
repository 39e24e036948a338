"""tensorflow-privacy as the reference: the same sums, epsilons and attacks.

`make test` installs it apart (see the Makefile), since it pins versions that tfdist cannot use,
and its package cannot be imported whole with TensorFlow 2.21, only module by module.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import keras
import numpy as np
import pytest
import sklearn.utils
import tensorflow as tf
from sklearn import metrics
from sklearn.metrics import _ranking

from tfdist.privacy import AuditReport, audit, epsilon
from tfdist.privacy.mechanism import clipping

APART = Path(sys.prefix, "tensorflow-privacy")
MODULES = "tensorflow_privacy.privacy"


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets the modules be imported one by one, for one test."""
    # Its documented way to leave out what needs Keras 2.
    monkeypatch.setattr(sys, "skip_tf_privacy_import", True, raising=False)
    # At the end: what is installed for the tests comes first.
    monkeypatch.setattr(sys, "path", [*sys.path, str(APART)])
    # Two names that it takes from scikit-learn, which has them no more; one was joblib's.
    monkeypatch.setattr(
        sklearn.utils, "parallel_backend", joblib.parallel_backend, raising=False
    )
    if not hasattr(_ranking, "_binary_clf_curve"):
        monkeypatch.setattr(_ranking, "_binary_clf_curve", counts_by_threshold, raising=False)
    pytest.importorskip("tensorflow_privacy")
    yield
    for name in [name for name in sys.modules if name.startswith("tensorflow_privacy")]:
        del sys.modules[name]


def counts_by_threshold(y_true: Any, y_score: Any) -> tuple[Any, Any, Any]:
    """Counts false and true positives; only an interval rests on it that is not compared."""
    _, false, _, true, thresholds = metrics.confusion_matrix_at_thresholds(y_true, y_score)
    return false, true, thresholds


def module(name: str) -> Any:
    return importlib.import_module(f"{MODULES}.{name}")


@pytest.mark.parametrize("clip", [0.05, 0.5, 1e6])
def test_sums_are_those_of_its_query(clip: float) -> None:
    keras.utils.set_random_seed(1)
    layers = [
        keras.layers.Conv2D(4, 3, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(5),
    ]
    model = keras.Sequential([keras.Input((6, 6, 2)), *layers])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 6, 6, 2)).astype("float32") * rng.uniform(0.1, 3, (9, 1, 1, 1))
    x, y = x.astype("float32"), rng.integers(0, 5, 9)

    query = module("dp_query.gaussian_query").GaussianSumQuery(l2_norm_clip=clip, stddev=0.0)
    state = query.initial_global_state()
    params = query.derive_sample_params(state)
    variables = [v.value for v in model.trainable_variables]
    sample = query.initial_sample_state([tf.TensorSpec(v.shape, v.dtype) for v in variables])
    for row in range(len(x)):
        with tf.GradientTape() as tape:
            loss = model.loss(y[row : row + 1], model(x[row : row + 1], training=True))
        sample = query.accumulate_record(params, sample, tape.gradient(loss, variables))
    expected, _, _ = query.get_noised_result(sample, state)

    received = clipping.clipped_sum(model, x, y, np.ones(len(x), bool), clip)
    assert (received.norms.numpy() > clip).any() == (clip < 1)
    for ours, theirs in zip(received.sums, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(
    ("probability", "noise", "epochs", "delta"),
    [(256 / 60000, 1.1, 15, 1e-5), (0.01, 4.0, 100, 1e-5), (0.1, 3.0, 5, 1e-6)],
)
def test_epsilon_is_its_accountants(
    accountant: str, probability: float, noise: float, epochs: int, delta: float
) -> None:
    library = module("analysis.compute_dp_sgd_privacy_lib")
    theirs = library._compute_dp_sgd_example_privacy(
        epochs,
        noise,
        delta,
        used_microbatching=False,
        poisson_subsampling_probability=probability,
        accountant_type=library.AccountantType[accountant.upper()],
    )
    ours = epsilon(
        sampling_probability=probability,
        noise_multiplier=noise,
        steps=int(np.ceil(epochs / probability)),
        delta=delta,
        accountant=accountant,
    )
    assert ours == pytest.approx(theirs, rel=1e-4)


def attack(members: Any, others: Any) -> Any:
    """Lets its threshold attack tell members by their losses."""
    attacks = "privacy_tests.membership_inference_attack"
    structures = module(f"{attacks}.data_structures")
    results = module(f"{attacks}.membership_inference_attack").run_attacks(
        structures.AttackInputData(loss_train=members, loss_test=others),
        attack_types=[structures.AttackType.THRESHOLD_ATTACK],
    )
    (result,) = results.single_attack_results
    return result


def test_the_attack_is_its_attack() -> None:
    rng = np.random.default_rng(0)
    # Rounded, so that some are equal.
    members, others = rng.gamma(1.0, size=400).round(2), rng.gamma(1.5, size=300).round(2)
    theirs = attack(members, others)
    ours = AuditReport(-np.concatenate([members, others]), np.repeat([True, False], [400, 300]))
    assert ours.auc == pytest.approx(theirs.get_auc(), abs=1e-9)
    assert ours.advantage == pytest.approx(theirs.get_attacker_advantage(), abs=1e-9)


def test_the_attack_on_a_model_is_its_attack() -> None:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x[:100], y[:100], epochs=30, verbose=0)
    losses = keras.losses.sparse_categorical_crossentropy(y, model(x), from_logits=True)
    theirs = attack(losses[:100].numpy(), losses[100:].numpy())
    ours = audit(model, (x[:100], y[:100]), (x[100:], y[100:]))
    assert ours.auc > 0.55
    assert ours.auc == pytest.approx(theirs.get_auc(), abs=1e-4)
