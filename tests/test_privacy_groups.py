"""Users and augmented copies: what is clipped together, drawn together, and counted as one."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.test_privacy_clipping import FAST, SLOW, close
from tfdist.privacy import clipping
from tfdist.privacy.together import Copies, Groups, Together

L = keras.layers
Units = list[list[int]]


def loop(
    model: Any, x: Any, y: Any, clip: float, units: Units, scale: float = 1.0
) -> tuple[list[Any], Any]:
    """Takes the gradients of single examples, adds up those of each unit, and clips the sum."""
    variables = model.trainable_variables
    sums, norms = [np.zeros(v.shape) for v in variables], []
    for unit in units:
        total = [np.zeros(v.shape) for v in variables]
        for i in unit:
            one_x, one_y = (
                tf.nest.map_structure(lambda a, i=i: a[i : i + 1], part) for part in (x, y)
            )
            with tf.GradientTape() as tape:
                loss = model.compute_loss(one_x, one_y, model(one_x, training=True))
            found = tape.gradient(loss, variables)
            total = [
                t if g is None else t + scale * tf.convert_to_tensor(g).numpy()
                for t, g in zip(total, found, strict=True)
            ]
        norm = np.sqrt(sum((t.astype("float64") ** 2).sum() for t in total))
        norms.append(norm)
        factor = min(1.0, clip / norm) if norm else 1.0
        sums = [s + t * factor for s, t in zip(sums, total, strict=True)]
    return sums, np.array(norms)


def some(structure: Any, rows: list[int]) -> Any:
    return tf.nest.map_structure(lambda leaf: np.asarray(leaf)[rows], structure)


WAYS: dict[str, tuple[list[int], Together, Units, float]] = {
    "users": ([0, 1, 2, 3, 4], Groups(tf.constant([7, 7, 7, 2, 9]), 3), [[0, 1, 2], [3], [4]], 1),
    "copies": ([0, 1, 2, 3], Copies(2), [[0, 1], [2, 3]], 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_what_is_clipped_together_equals_a_loop(name: str) -> None:
    model, all_x, all_y = (FAST | SLOW)[name]()
    for rows, together, units, scale in WAYS.values():
        x, y = some(all_x, rows), some(all_y, rows)
        _, norms = loop(model, x, y, 1e9, units, scale)
        clip = float(np.median(norms))
        expected, _ = loop(model, x, y, clip, units, scale)
        mask = np.ones(len(rows), bool)
        received = clipping.clipped_sum(model, x, y, mask, clip, together=together)
        close([received.norms, *received.sums], [norms, *expected])


def test_a_group_with_something_not_finite_counts_nothing_and_others_do() -> None:
    for name in ("dense", "dense_many_positions", "embedding"):
        model, x, y = FAST[name]()
        weight = np.array([1, np.nan, 1, 1, 1], "float32")
        units = Groups(tf.constant([1, 1, 1, 2, 3]), 3)
        received = clipping.clipped_sum(model, x, y, np.ones(5, bool), 0.1, weight, False, units)
        expected, norms = loop(model, x, y, 0.1, [[3], [4]])
        close([received.norms, *received.sums], [[0, *norms], *expected])
