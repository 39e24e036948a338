"""The accountants: dp-accounting's results for steps, and their composition.

Needs no TensorFlow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import dp_accounting as dp
import numpy as np
from dp_accounting.pld import privacy_loss_distribution as plds

from tfdist.errors import ArgumentError
from tfdist.privacy.accounting.phase import Phase
from tfdist.privacy.accounting.pld import Array, LossDistributions, Losses

_WHOLE_ORDERS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512)


def rdp_epsilon(phases: Sequence[Phase], delta: float, relation: str) -> float:
    """Bounds the epsilon of steps by Rényi divergences.

    Args:
        phases: The steps, all of them with noise.
        delta: Between 0 and 1.
        relation: As in `tfdist.privacy.epsilon`.

    Raises:
        ArgumentError: The method does not support such steps.
    """
    truncating = [phase for phase in phases if phase.truncates]
    if truncating:
        raise ArgumentError(
            "`accountant` must be 'pld' for steps with a capacity. Received: accountant='rdp' "
            f"with {truncating[0]}. Use accountant='pld'."
        )
    if relation == "replace_one":
        raise ArgumentError(
            "`accountant` must be 'pld' for Poisson sampling with relation='replace_one'. "
            "Received: accountant='rdp'. Use accountant='pld', or another relation."
        )
    accountant = dp.rdp.RdpAccountant(neighboring_relation=_relation(relation))
    for phase in phases:
        accountant.compose(phase.event())
    return float(accountant.get_epsilon(delta))


@functools.lru_cache(maxsize=40)  # more than a schedule has levels
def _step(
    probability: float,
    noise: float,
    limits: tuple[int, int] | None,
    relation: str,
    interval: float,
    log_left_out: float,
) -> list[tuple[Array, int, float]]:
    """Computes the distribution of a step by dp-accounting, in each direction of a relation.

    Returns:
        For each direction the probabilities, the first multiple of the grid's step, and the
        probability of an infinite loss. A symmetric relation has one direction.
    """
    options = {
        "value_discretization_interval": interval,
        "log_mass_truncation_bound": log_left_out,
        "neighboring_relation": _relation(relation),
    }
    if limits is None:
        distribution = plds.from_gaussian_mechanism(noise, sampling_prob=probability, **options)
    else:  # the cost is proven in Ganesh et al., arXiv 2508.15089
        rows, capacity = limits
        distribution = plds.from_truncated_subsampled_gaussian_mechanism(
            rows, probability, capacity, noise, **options
        )
    directions = [distribution._pmf_remove]
    if not distribution._symmetric:
        directions.append(distribution._pmf_add)
    dense = [pmf.to_dense_pmf() for pmf in directions]
    return [(np.asarray(p._probs), int(p._lower_loss), float(p._infinity_mass)) for p in dense]


def gaussian_epsilon(mean: float, delta: float) -> float:
    """Returns the epsilon of a Gaussian mechanism, in closed form.

    dp-accounting computes it (Balle and Wang, "Improving the Gaussian mechanism for
    differential privacy", ICML 2018, theorem 8). A margin for its rounding errors and its
    search is added.

    Args:
        mean: The sensitivity over the standard deviation of the noise.
        delta: Between 0 and 1.
    """
    return float(dp.get_epsilon_gaussian(1 / mean, delta)) * (1 + 1e-9) + 1e-11


def pld_epsilon(
    phases: Sequence[Phase], delta: float, relation: str, coarseness: float
) -> float:
    """Computes the epsilon of steps by distributions of the privacy loss.

    Args:
        phases: The steps, all of them with noise.
        delta: Between 0 and 1.
        relation: As in `tfdist.privacy.epsilon`.
        coarseness: The factor by which the grid of losses is coarser than usual.
    """
    square = sum(phase.gaussian_square for phase in phases)
    sampled = [phase for phase in phases if not phase.gaussian_square]
    if not sampled:
        return gaussian_epsilon(math.sqrt(square) * (1 + (relation == "replace_one")), delta)
    interval = coarseness * _interval(phases, delta)
    steps = sum(phase.steps for phase in sampled) + 1
    # The left-out tail of a step counts as an infinite loss. All tails together must be a small
    # part of delta.
    log_left_out = min(-50.0, -10.0 * math.ceil(math.log(1e5 * steps / delta) / 10))
    kinds: list[tuple[list[tuple[Array, int, float]], int]] = []
    if square:
        kinds.append((_step(1.0, square**-0.5, None, relation, interval, log_left_out), 1))
    for phase in sampled:
        limits = None
        if phase.truncates:
            assert phase.num_rows is not None
            assert phase.capacity is not None
            limits = phase.num_rows, phase.capacity
        q, (noise, times) = phase.sampling_probability, phase.independent
        kinds.append((_step(q, noise, limits, relation, interval, log_left_out), times))
    # A symmetric distribution is used for both directions.
    return max(
        LossDistributions(
            [Losses(*of_step[min(direction, len(of_step) - 1)], n) for of_step, n in kinds],
            interval,
        ).epsilon(delta)
        for direction in range(max(len(of_step) for of_step, _ in kinds))
    )


def _interval(phases: Sequence[Phase], delta: float) -> float:
    """Chooses the step of the grid to which privacy losses are rounded, to the safe side.

    A step of 1e-4 is within 1 % for an epsilon around 1. A smaller epsilon needs a finer grid,
    and a larger one would need gigabytes. A coarse bound by RDP gives the scale.
    """
    rdp = dp.rdp.RdpAccountant(_WHOLE_ORDERS)
    for phase in phases:
        rdp.compose(phase.event(truncated=False))
    scale = float(rdp.get_epsilon(delta))
    step = max(1e-5, 1e-4 * min(1.0, scale), 2e-6 * scale)
    # Few different values, so that `_step` finds its results in the cache.
    return float(2.0 ** (math.floor(2 * math.log2(step)) / 2))


def _relation(name: str) -> Any:
    return dp.NeighboringRelation[name.upper()]
