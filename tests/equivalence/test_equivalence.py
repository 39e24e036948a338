"""The promise: weights, optimizers and history equal one process's, wherever it ran.

`make test` runs the spine on each strategy, and every other case on one of them in turn;
`make test-full` runs all on all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.equivalence.own_code import CASES, FAMILIES
from tests.places.clusters import PLACES, Clusters, on

TWO = ("mirrored-2", "multi_worker-2", "horovod-2", "parameter_server-2")
# Those in which the number of replicas changes what each computes or how it is summed.
SPINE = (
    "rows_961",
    "rows_3",
    "rows_1",
    "gradient_accumulation",
    "cnn_synchronized_batch_norm",
    "embedding_lstm",
    "dropout",
    "own_train_step",
    "two_optimizers",
    "poisson_some_batches_empty",
    "power_sgd",
    "private",
)
# One strategy has all that three replicas change; the others what they do in ways of their own.
SPINE_ON_MORE = {
    "multi_worker-3": ("rows_961", "rows_1", "cnn_synchronized_batch_norm"),
    # Replicas without rows; at the edge of an overflow, the more replicas the more it matters.
    "mirrored-4": ("rows_1", "loss_scaling"),
}
# These depend on what a replica computes, not on how replicas sum, so `make test` does them on
# two strategies. How each strategy sums is tested by its contract.
ON_TWO_STRATEGIES = {
    "rows_3": ("mirrored-2", "horovod-2"),
    "gradient_accumulation": ("mirrored-2", "parameter_server-2"),
    "dropout": ("mirrored-2", "horovod-2"),
    "own_train_step": ("mirrored-2", "multi_worker-2"),
    "two_optimizers": ("mirrored-2", "parameter_server-2"),
    "poisson_some_batches_empty": ("mirrored-2", "horovod-2"),
    "power_sgd": ("mirrored-2", "horovod-2"),
    "private": ("mirrored-2", "multi_worker-2"),
}
OLDEST = {
    "multi_worker-2": ("rows_961", "embedding_lstm", "own_train_step", "private"),
    "mirrored-2": ("rows_961", "cnn_synchronized_batch_norm", "private"),
}
# In `make test-full` only: the costly ones whose parts other cases have.
COSTLY = (
    "augmented_where_repeated",
    "every_optimizer",
    "masked_tagging",
    "private_augmented",
    "private_bias_corrected_adam",
    "private_class_weight_and_mixed_precision",
    "private_clipped_by_layer",
    "private_compiled_by_xla",
    "private_in_turn",
    "private_long_and_rebalanced",
    "private_masked_tagging",
    "private_microbatches_and_dropout",
    "recomputed_words",
    "rows_960",
)
# With the optimizer's state in parts; `rows_961` clips by a norm. `make test-full` does all on
# `mirrored-2`; how the strategies differ is tested by their contracts.
ZERO = {
    "mirrored-2": ("rows_961",),
    "multi_worker-2": ("adamw_ema",),
    "horovod-2": ("embedding_lstm",),
    "multi_worker-3": ("rows_1",),
}
# What `tfdist.Zero` refuses.
WITHOUT_ZERO = (
    "power_sgd",
    "callbacks_that_predict_and_assign",
    "a_metric_of_lists",
    "optimizers_of_ones_own",
)
# With the weights in parts too. `rows_961` has regularizers, `embedding_lstm` rows and a loop.
ZERO_3 = {
    "mirrored-2": ("rows_961",),
    "multi_worker-2": ("two_optimizers",),
    "horovod-2": ("embedding_lstm",),
}
# In `make test-full`, on three and four replicas: uneven cuts, and shares without rows.
ZERO_3_ON_MORE = {
    "mirrored-3": ("rows_961", "embedding_lstm"),
    "mirrored-4": ("rows_961",),
    "multi_worker-3": ("rows_1",),
    "horovod-3": ("rows_1",),
}
# In `make test-full`, on four replicas: layers in parts, on a mesh of 2 x 2 and one of 1 x 4.
MESHES = ("mesh_2x2", "mesh_1x4")
ON_MESHES = (
    *(name for name in SPINE if name not in ("power_sgd", "private")),  # which are refused
    "adamw_ema", "loss_scaling", "masked_tagging", "mixed_precision", "sgd_momentum",
)  # fmt: skip
# In half precision the sum over a share is rounded to 11 bits before shares are summed.
TOLERANCE = {
    "mixed_precision": 1e-3,
    "private_class_weight_and_mixed_precision": 1e-3,
    "power_sgd": 1e-9,  # in float64
    "double_precision": 1e-12,
}
# Their steps are no mean over rows, so each replica computes whole batches. All others share
# them: if they did not, the weights would be right all the same, but nothing would be faster.
WHOLE_BATCHES = (
    "a_layer_with_a_variable_of_tensorflow",
    "a_metric_of_lists",
    "a_metric_that_is_no_sum",
    "a_variable_of_tensorflow",
    "accumulation_by_hand",
    "codebook",
    "losses_of_a_layer",
    "sharpness_aware",
    "stateful_rnn",
    "sum_over_a_batch",
)
REFUSED = {"power_sgd": "parameter_server"}  # whose state would be on servers

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


def always() -> dict[str, list[str]]:
    """Gives the cases of `make test` by place: each family comes to each strategy."""
    chosen = {
        place: [n for n in SPINE if place in ON_TWO_STRATEGIES.get(n, TWO)] for place in TWO
    }
    chosen |= {place: list(names) for place, names in SPINE_ON_MORE.items()}
    for number, names in enumerate(FAMILIES.values()):
        others = [name for name in names if name not in (*SPINE, *COSTLY)]
        for turn, name in enumerate(others, start=number):
            chosen[TWO[turn % len(TWO)]].append(name)
    return chosen


def cells() -> Iterator[Any]:
    """Gives each place and case, with what the test needs to be done."""
    chosen = always()
    for place in PLACES[1:]:
        for name in CASES:
            if place.startswith(REFUSED.get(name, "none")):
                continue
            task = f"tests.equivalence.program {name}"
            marks = [on("single-1", task), on(place, task)]
            if name not in chosen.get(place, ()):
                marks.append(pytest.mark.full)
            if name in OLDEST.get(place, ()):
                marks.append(pytest.mark.oldest)
            yield pytest.param(place, name, task, marks=marks, id=f"{place}-{name}")
            for kind in MESHES if place == "mirrored-4" and name in ON_MESHES else ():
                on_mesh = f"{task} {kind}"
                marks = [on("single-1", task), on(place, on_mesh), pytest.mark.full]
                cell = f"{place}-{name}-{kind}"
                yield pytest.param(place, name, on_mesh, marks=marks, id=cell)
            for kind, always_done in (("zero", ZERO), ("zero3", ZERO_3)):
                is_in_full = place == "mirrored-2" and name not in WITHOUT_ZERO
                is_in_full |= kind == "zero3" and name in ZERO_3_ON_MORE.get(place, ())
                is_refused = kind == "zero3" and name.startswith("private")
                if is_refused or not (is_in_full or name in always_done.get(place, ())):
                    continue
                with_zero = f"{task} {kind}"
                marks = [on("single-1", task), on(place, with_zero)]
                if name not in always_done.get(place, ()):
                    marks.append(pytest.mark.full)
                cell = f"{place}-{name}-{kind}"
                yield pytest.param(place, name, with_zero, marks=marks, id=cell)


@pytest.mark.parametrize(("place", "name", "task"), cells())
def test_the_training_equals_one_process_s(
    place: str, name: str, task: str, clusters: Clusters
) -> None:
    (expected,) = clusters.outcomes("single-1", " ".join(task.split()[:2]))
    received, *others = clusters.outcomes(place, task)
    tolerance = TOLERANCE.get(name, 1e-5)
    assert received["in_shares"] or name in WHOLE_BATCHES
    for what in ("weights", "optimizer"):
        for there, here in zip(received[what], expected[what], strict=True):
            for theirs, ours in zip(there, here, strict=True):
                expected_values = np.asarray(ours, np.float64)
                assert np.isfinite(expected_values).all()
                distance = np.linalg.norm(theirs - expected_values)
                assert distance <= tolerance * (np.linalg.norm(expected_values) + 1e-9), what
    assert received["history"].keys() == expected["history"].keys()
    for metric, values in expected["history"].items():
        np.testing.assert_allclose(
            received["history"][metric], values, max(tolerance, 1e-5), err_msg=metric
        )
    assert received["plain"], "a variable is not a plain one again"
    for other in others:
        assert other["history"] == received["history"]
        for what in ("weights", "optimizer"):
            for there, here in zip(other[what], received[what], strict=True):
                for theirs, ours in zip(there, here, strict=True):
                    np.testing.assert_array_equal(theirs, ours)
