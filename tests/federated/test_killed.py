"""A worker that is killed in the middle of a secure sum: the round is made again."""

from __future__ import annotations

import pickle
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.federated.killed import PARTS, ROUNDS, STRUCK
from tests.federated.reference import federated_averaging, in_float64, model_of
from tests.jobs import finished, tfdist_run

pytestmark = [pytest.mark.cluster, pytest.mark.waits, pytest.mark.full]


@pytest.mark.timeout(400)
def test_the_round_is_made_again_with_other_masks(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed.py")
    root = str(script.parents[2])
    command = tfdist_run(3, script, tmp_path, options=["--max-restarts", "2"])
    status, printed = finished(command, 300, {"PYTHONPATH": root})
    assert status == 0, printed
    with in_float64():
        model = model_of(keras.optimizers.SGD(0.1, momentum=0.9))
        federated_averaging(
            model, PARTS, ROUNDS, batch_size=16,
            optimizer=lambda: keras.optimizers.SGD(0.1, momentum=0.9),
        )  # fmt: skip
        expected = model.get_weights()
    for worker in range(3):
        weights = pickle.loads((tmp_path / f"final-{worker}").read_bytes())
        for ours, theirs in zip(weights, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-8)
    messages = [pickle.loads(p.read_bytes()) for p in tmp_path.glob(f"sent-*-{STRUCK}-*")]
    assert len(messages) > 3
    blocks = {m[i : i + 16] for m in messages for i in range(0, len(m) - 15, 16)}
    assert len(blocks) == sum(len(m) // 16 for m in messages)  # none twice
