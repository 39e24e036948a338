"""`tfdist.privacy.check` measures the mechanism of private training on a model."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tfdist import _keras, data
from tfdist.errors import ArgumentError, MissingPackageError
from tfdist.federated.settings import FedAvg
from tfdist.privacy.accounting.arguments import check_choice, check_count, check_number
from tfdist.privacy.checking.adversarial import HUGE, NOT_A_NUMBER, families
from tfdist.privacy.checking.clients import ClientCheck, check_federated
from tfdist.privacy.checking.columns import Columns, as_columns, joined, rows_of, selected
from tfdist.privacy.checking.contributions import (
    Neighbours,
    Noiseless,
    compare_neighbours,
    largest_contribution,
)
from tfdist.privacy.checking.draws import Draws, measure_draws
from tfdist.privacy.checking.noises import NoiseCheck
from tfdist.privacy.checking.recorder import subject_of
from tfdist.privacy.checking.report import CheckReport, Finding
from tfdist.privacy.sampling.rates import PoissonLike
from tfdist.privacy.schedules import without_schedules
from tfdist.privacy.settings import DPSGD

PARTS = ("draws", "contributions", "noise")
FALSE_ALARM = 1e-4
_ALPHA = FALSE_ALARM / 25  # of each test: there are fewer
_OWN = 48  # the most of the user's rows that are used
_NUMBERS, _STEPS, _ROUNDS = 400_000, 240, 2


def check(
    model: Any,
    x: Any,
    y: Any = None,
    privacy: DPSGD | None = None,
    *,
    federated: FedAvg | None = None,
    batch_size: int = 32,
    sample_weight: Any = None,
    sampler: Any = None,
    strategy: Any = "auto",
    parts: Sequence[str] = PARTS,
    effort: float = 1.0,
    seed: int = 0,
) -> CheckReport:
    """Measures whether private training on a model matches the assumptions of its epsilon.

    Epsilon rests on four properties. Each is measured by `tfdist.fit` itself, with the model,
    the data, the settings and the strategy of the training:

    - Noise has the right deviation, and is independent between weights, steps, calls and
      resumed runs.
    - No example contributes more than `l2_norm_clip`: not yours, not scaled ones, and not those
      of a search for large contributions.
    - A missing example changes nothing else.
    - Each step draws each example by an independent coin, and divides by the expected batch.

    The check uses an optimizer that records gradients and changes no weight. The model is
    restored, with its ledger and random state. A model that was not built is built.

    Args:
        model: A compiled `keras.Model`.
        x: Arrays of examples, as in `fit`. The report is computed from them without noise.
        y: Targets, as in `fit`.
        privacy: The `tfdist.DPSGD` or `tfdist.DPFTRL` of the training. Its `seed` is not used.
            With a `target_epsilon`, the check uses a noise multiplier of 1.
        federated: In place of `privacy`: a `tfdist.FedAvg` with `clients` and a
            `tfdist.ClientDP`. Then rounds are measured, and whole clients in place of examples:
            the noise on their sum, what one client contributes, and who is drawn.
        batch_size: As in `fit`.
        sample_weight: As in `fit`.
        sampler: As in `fit`.
        strategy: As in `fit`.
        parts: The properties to measure: "draws", "contributions" and "noise". Draws are
            measured on a model with a weight for each example, the others on your model.
        effort: The amount of measurements, above 0. The default 1 takes half a minute or less
            on a small model.
        seed: The seed of the examples to try, equal on all workers. It has no effect on the
            measured random numbers.

    Returns:
        A report. `report.passed` is the result, and `print(report)` shows all findings.

    Raises:
        ArgumentError: `fit` would refuse the arguments, or they cannot be measured.
        MissingPackageError: SciPy or dp-accounting is not installed.

    Example:
        >>> import keras, numpy as np, tfdist
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
        >>> model.compile("sgd", "mse")
        >>> rng = np.random.default_rng(0)
        >>> x, y = rng.normal(size=(100, 8)), rng.normal(size=(100, 3))
        >>> privacy = tfdist.DPSGD(l2_norm_clip=1.0, noise_multiplier=2.0, delta=1e-3)
        >>> report = tfdist.privacy.check(model, x, y, privacy, batch_size=10, effort=0.1)
        >>> report.passed
        True
    """
    began = time.monotonic()
    if federated is not None:
        check_federated(model, x, federated, privacy)
    _check_arguments(model, x, privacy, batch_size, effort, seed, is_needed=federated is None)
    for part in parts:
        check_choice("parts", part, PARTS)
    if federated is not None:
        columns = as_columns(x, y, sample_weight)
        of_clients = ClientCheck(model, columns, federated, batch_size, strategy)
        facts, notes = _of_clients(of_clients, parts, effort, np.random.default_rng(seed))
        return CheckReport(tuple(facts), tuple(notes), FALSE_ALARM, time.monotonic() - began)
    assert privacy is not None
    columns = as_columns(x, y, sample_weight)
    facts, notes = _of_examples(
        model, columns, privacy, batch_size, sampler, strategy, parts, effort, seed
    )
    return CheckReport(tuple(facts), tuple(notes), FALSE_ALARM, time.monotonic() - began)


def _of_examples(
    model: Any,
    columns: Columns,
    privacy: DPSGD,
    batch_size: int,
    sampler: Any,
    strategy: Any,
    parts: Sequence[str],
    effort: float,
    seed: int,
) -> tuple[list[Finding], list[str]]:
    """Measures steps with protected examples."""
    notes = _notes(privacy, sampler)
    if privacy.target_epsilon is not None:
        multiplier = privacy.noise_multiplier or 1.0  # with a target it can only be a schedule
        privacy = dataclasses.replace(privacy, target_epsilon=None, noise_multiplier=multiplier)
    fixed = without_schedules(privacy)
    if privacy.samples and privacy.bands is not None:
        fixed = dataclasses.replace(fixed, bands=None)
        parts = [part for part in parts if part == "contributions"]
    rng = np.random.default_rng(seed)
    row_numbers = np.sort(
        rng.choice(rows_of(columns), min(_OWN, rows_of(columns)), replace=False)
    )
    if isinstance(sampler, PoissonLike):
        sampler = sampler.bind(columns[1], rows_of(columns))
    draws = Draws(fixed, rows_of(columns), batch_size, columns[1], sampler, strategy)
    facts = []
    is_repeatable = False
    if "draws" in parts and getattr(sampler, "capacity", None) is None:
        facts += measure_draws(draws, math.ceil(_STEPS * effort), _ALPHA)
    with subject_of(model, strategy) as subject:
        if "contributions" in parts:
            examples = selected(columns, row_numbers)
            neighbours = _contributions(Noiseless(subject, fixed), examples, effort, rng)
            facts, notes = [*facts, *neighbours.facts], [*notes, *neighbours.notes]
            is_repeatable = neighbours.draws_nothing
        if "noise" in parts and privacy.noise_multiplier == 0:
            notes.append("noise: noise_multiplier is 0, and nothing is private")
        elif "noise" in parts:
            numbers = math.ceil(_NUMBERS * effort)
            noiseless = Noiseless(subject, privacy)
            noise = NoiseCheck(
                noiseless, columns, batch_size, row_numbers, is_repeatable, numbers
            )
            facts += noise.facts(_ALPHA, rng)
    return facts, notes


def _of_clients(
    clients: ClientCheck, parts: Sequence[str], effort: float, rng: np.random.Generator
) -> tuple[list[Finding], list[str]]:
    """Measures rounds of protected clients."""
    facts: list[Finding] = []
    notes = ["the noise on the count of an adaptive norm, and the server's optimizer"]
    if "draws" in parts:
        facts += clients.draws(max(20, math.ceil(_STEPS * effort)), _ALPHA)
    if "contributions" in parts:
        facts += clients.contributions()
    if "noise" in parts and clients.privacy.noise_multiplier == 0:
        notes.append("noise: noise_multiplier is 0, and nothing is private")
    elif "noise" in parts:
        facts += clients.noise(math.ceil(_NUMBERS * effort), _ALPHA, rng)
    return facts, notes


def _contributions(
    noiseless: Noiseless, some: Columns, effort: float, rng: np.random.Generator
) -> Neighbours:
    """Measures contributions and neighbours."""
    model = noiseless.subject.model
    facts = largest_contribution(noiseless, some, round(_ROUNDS * effort), rng)
    strange = selected(families(model, selected(some, [0]), rng), [HUGE, NOT_A_NUMBER])
    rows = joined([strange, selected(some, np.arange(min(32, rows_of(some))))])
    is_half = _keras.computes_in(model, "bfloat16", "float16")
    neighbours = compare_neighbours(noiseless, rows, is_half)
    return dataclasses.replace(neighbours, facts=(*facts, *neighbours.facts))


def _notes(privacy: DPSGD, sampler: Any) -> list[str]:
    notes = []
    if privacy.target_epsilon is not None:
        notes.append(
            "the noise that `target_epsilon` leads to: measured with a multiplier of 1, or the "
            "schedule as it is"
        )
    if privacy.samples and privacy.bands is not None:
        notes.append("draws and noise: not with `bands`")
    if privacy.is_scheduled:
        notes.append("contributions and draws: with the first step's norm of a schedule")
    if privacy.augmentations > 1:
        notes.append("augmentations: measured without")
    if getattr(sampler, "capacity", None) is not None:
        notes.append("draws: a `capacity` makes each depend on the others")
    return notes


def _check_arguments(
    model: Any,
    x: Any,
    privacy: Any,
    batch_size: Any,
    effort: Any,
    seed: Any,
    is_needed: bool,
) -> None:
    if not isinstance(model, keras.Model) or not model.compiled:
        raise ArgumentError(
            "`model` must be a compiled keras.Model. Received: model of type "
            f"{type(model).__name__}. Call model.compile(...) first."
        )
    if is_needed and not isinstance(privacy, DPSGD):
        raise ArgumentError(
            "`privacy` must be a tfdist.DPSGD or tfdist.DPFTRL. Received: "
            f"privacy={privacy!r}. Pass the settings that you give to `fit`."
        )
    if not data.is_arrays(x):
        raise ArgumentError(
            "`x` must be arrays: the check tries single examples. Received: x of type "
            f"{type(x).__name__}. Pass some examples of the data set as arrays."
        )
    check_count("batch_size", batch_size, 1)
    check_number("effort", effort, 0, open_ends=True)
    check_count("seed", seed, 0)
    try:
        import scipy.stats  # noqa: F401
    except ImportError:
        raise MissingPackageError(
            "A check needs SciPy. Received: an installation without it. "
            'Install it: pip install "tfdist[privacy]".'
        ) from None
