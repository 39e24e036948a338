"""One `fit` whose clients make private steps by themselves: their sampling, noise and cost."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import data
from tfdist.data.arrays import Arrays
from tfdist.errors import ArgumentError
from tfdist.federated.settings import FedAvg
from tfdist.federated.source import Rounds
from tfdist.privacy import leaking_callbacks
from tfdist.privacy.accounting.dp_sgd import noise_for
from tfdist.privacy.accounting.ledger import EXAMPLE, Ledger, Phase
from tfdist.privacy.accounting.report import careless_delta
from tfdist.privacy.accounting.silos import Silos
from tfdist.privacy.counted_run import CountedRun
from tfdist.privacy.dpftrl import DPFTRL
from tfdist.privacy.federated_checks import check_request, fingerprint_of
from tfdist.privacy.mechanism import clipping, comparison, independence, unfit_layers
from tfdist.privacy.mechanism.mechanism import Mechanism
from tfdist.privacy.mechanism.silo_step import SiloStep, SiloSteps
from tfdist.privacy.sampling.poisson import Poisson
from tfdist.privacy.settings import DPSGD
from tfdist.samplers import Sampler
from tfdist.training.request import Request

_NO_LIMIT = 2**53  # rows of a local step: batches need not have one shape


class SiloRun(CountedRun[DPSGD]):
    """A `fit` whose clients each make steps of DP-SGD, from its arguments to its report.

    Each client draws its own examples, with the probability `batch_size` / its examples, and
    adds all noise by itself. An example takes part in the steps of its client alone, so its
    epsilon is that of these steps, and the largest is reported.

    Args:
        federated: The argument `federated` of `fit`, with `privacy`.
        request: The other arguments of `fit`.

    Attributes:
        sampler: The sampler of the rows of each local step.
        steps: The local steps. They are set by `plan`.

    Raises:
        ArgumentError: The model or an argument cannot be used in such a training.
        MissingPackageError: dp-accounting is not installed.
    """

    steps: SiloSteps

    def __init__(self, federated: FedAvg, request: Request) -> None:
        privacy = federated.privacy
        assert isinstance(privacy, DPSGD)  # `api` has looked
        _check_settings(privacy)
        check_request(request)
        _check_sampler(request)
        super().__init__(privacy, request)
        unfit_layers.check_model(request.model)
        assert federated.local_steps is not None  # `FedAvg` has checked it
        self._local_steps = federated.local_steps
        self.sampler: Sampler = Poisson(capacity=_NO_LIMIT)
        # Whoever knows the seed knows which rows were drawn, and other members must not: the
        # seed of `fit` is that of all workers, so this one is a worker's own.
        self.row_seed = self.seed if self.is_seeded else secrets.randbits(127)
        self._silos = Silos((), 1, self._local_steps)
        self._begin_count(request, not self.is_seeded, self._local_steps)
        self._step: SiloStep | None = None

    def step_of(self, model: Any, strategy: Any) -> SiloStep:
        """Returns the step of a model; see `federated.protection.LocalProtection`.

        Args:
            model: A compiled, built `keras.Model`.
            strategy: The strategy on whose replicas it trains.
        """
        return self.steps.make(model, strategy)

    def plan(self, source: data.Source, epochs: int) -> None:
        """Calibrates the noise, and checks the model on a few rows.

        Args:
            source: The rounds.
            epochs: The number of rounds.

        Raises:
            ArgumentError: The budget is spent, or the gradients of single examples cannot be
                computed.
        """
        assert isinstance(source, Rounds)
        privacy, clients = self.privacy, source.plan.clients
        self.planned_steps = max(0, epochs)
        batch_size = source.plan.batch_size
        sizes = tuple(int(size) for size in clients.sizes)
        self._silos = silos = Silos(sizes, batch_size, self._local_steps)
        probability = min(1.0, batch_size / max(1, min(filter(None, sizes), default=1)))
        phase = Phase(probability, 0.0, 1, unit=EXAMPLE)
        phase = self._spending.named(phase, fingerprint_of(clients))
        _joined(self.ledger(0), silos.phases(phase, 0, 1)).check_unit()
        noise = self._find_noise(phase)
        phase = dataclasses.replace(phase, noise_multiplier=noise)
        self._spending.plan(phase, self.planned_steps, silos)
        self.noise_multiplier = noise
        assert not callable(privacy.l2_norm_clip)
        mechanism = Mechanism(
            privacy.l2_norm_clip,
            noise,
            float(batch_size),
            privacy.microbatch_size,
            privacy.clipping == "per_layer",
            expected_units=float(batch_size),
        )
        self.steps = SiloSteps(mechanism, clients.number, self._local_steps)
        arrays = source.drawn_from
        assert isinstance(arrays, Arrays)
        self._mask_seed = int(arrays.seed)
        self._try(arrays)
        leaking_callbacks.check_names(self._callbacks, self._model.get_metrics_result())

    def _find_noise(self, phase: Phase) -> float:
        """Returns the noise of the settings, or the least for the target."""
        privacy = self.privacy
        if privacy.target_epsilon is None:
            assert privacy.noise_multiplier is not None
            assert not callable(privacy.noise_multiplier)
            return privacy.noise_multiplier
        # A training that continues keeps its noise: steps of one phase must be equal.
        earlier = self._spending.earlier_noise(phase, self._silos)
        if earlier is not None:
            return earlier
        one = dataclasses.replace(phase, noise_multiplier=1.0)
        phases = self._silos.phases(one, 0, max(1, self.planned_steps))
        spent = self.ledger(0)
        if not spent.parts:  # then the client with the fewest examples costs most
            phases = [max(phases, key=lambda p: p.sampling_probability)]
        noise = noise_for(
            phases,
            privacy.target_epsilon,
            self._delta,
            accountant=privacy.accountant,
            relation=privacy.relation,
            spent=spent,
        )
        return float(self._session.strategy.broadcast_object(noise))

    def _try(self, arrays: Arrays) -> None:
        """Checks the model and its metrics on a few rows of this process."""
        most = max(4, self.privacy.microbatch_size or comparison.ROWS)
        rows = np.linspace(0, arrays.num_local_rows - 1, min(comparison.ROWS, most))
        rows = np.unique(rows.astype(np.int64))  # neighbours may be equal, so not the first
        batch = tf.nest.map_structure(lambda column: tf.gather(column, rows), arrays.data)
        x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
        independence.check(self._model, x, y, weight, self.steps.mechanism.l2_norm_clip)
        unfit_layers.check_metrics(self._model, x, y, sample_weight=weight)

    def notice(self) -> str | None:
        """Says how large the noise is, and warns of a large `delta` and of slow parts."""
        mechanism = self.steps.mechanism
        deviation = self.noise_multiplier * mechanism.l2_norm_clip / mechanism.expected_batch
        noise = (
            "each local step is private by itself, with noise of standard deviation "
            f"{deviation:.2g} on each number of its gradient"
        )
        slow = (
            [] if self._spending.before.ledger.phases else clipping.computed_alone(self._model)
        )
        alone = f"computed for one example after the other, exact but slow: {', '.join(slow)}"
        careless = careless_delta(self.ledger(self.planned_steps), self._delta)
        lines = [noise, alone if slow else None, careless, self._spending.notice()]
        return "\ntfdist: ".join(filter(None, lines))

    @property
    def common_settings(self) -> dict[str, Any]:
        """The settings that must be equal on all workers."""
        privacy = self.privacy
        return {
            "privacy of examples, by each client": (privacy.l2_norm_clip, self._delta),
            "clipping": privacy.clipping,
            "noise_multiplier": self.noise_multiplier,
            "relation": privacy.relation,
            "clients' sizes and steps": self._silos.to_dict(),
            "spent before": self.ledger(0),
        }

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that must not change in a continued training."""
        return {
            "l2_norm_clip": self.privacy.l2_norm_clip,
            **self._silos.to_dict(),
            **self._phase_settings(),
        }

    def watched(self, callbacks: Any, step: Any) -> Any:
        """Adds callbacks that count rounds, and renews the noise.

        Args:
            callbacks: A list of callbacks, or a `CallbackList`.
            step: The step of the training.
        """
        assert isinstance(step, SiloStep)
        step.masks.renew(self._mask_seed)
        step.spot_checks.begin(self._local_steps)
        self._step = step
        return self._counted(callbacks, step)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Returns a context for the training. Its steps count even if it fails."""
        with super().counting():
            try:
                yield
                if self._step is not None:
                    self._step.spot_checks.raise_if_failed()
            except tf.errors.InvalidArgumentError as error:
                if self._step is not None:
                    self._step.spot_checks.raise_if_failed(error)
                raise


def _joined(ledger: Ledger, phases: list[Phase]) -> Ledger:
    for phase in phases:
        ledger = ledger.add(phase)
    return ledger


def _check_settings(privacy: DPSGD) -> None:
    """Refuses settings of steps that are not alike, or that need the rows of all clients."""
    if isinstance(privacy, DPFTRL):
        raise ArgumentError(
            "`privacy` of FedAvg must be a tfdist.DPSGD or tfdist.ClientDP: the noise of "
            "DPFTRL is subtracted in later steps, which begin from other weights here. "
            "Received: a tfdist.DPFTRL. Use DPSGD."
        )
    if privacy.is_scheduled:
        raise ArgumentError(
            "`noise_multiplier` and `l2_norm_clip` must be numbers in FedAvg(privacy=...): "
            "steps are counted by rounds, which are alike. Received: a schedule. Pass numbers."
        )
    for name, reason in (
        ("target_quantile", "a norm would follow the examples of one client after the other"),
        ("group_ids", "the rows of a user may lie with several clients"),
        ("bands", "later steps begin from other weights, without the noise to subtract"),
    ):
        if (value := getattr(privacy, name)) is not None:
            raise ArgumentError(
                f"`{name}` must be None in FedAvg(privacy=...): {reason}. Received: {name} of "
                f"type {type(value).__name__}. Leave it out."
            )
    if privacy.augmentations > 1:
        raise ArgumentError(
            "`augmentations` must be 1 in FedAvg(privacy=...), which takes no `augment`. "
            f"Received: augmentations={privacy.augmentations!r}. Leave it out."
        )


def _check_sampler(request: Request) -> None:
    """Refuses data and samplers that the accounting does not cover."""
    if any(map(data.is_composite, tf.nest.flatten(request.x))):
        raise ArgumentError(
            "`x` must be dense in private training: each example has a gradient of its own. "
            "Received: x with a sparse or ragged leaf. Convert it with tensor.to_tensor() or "
            "matrix.toarray()."
        )
    if request.sampler is not None:
        raise ArgumentError(
            "`sampler` must be None in FedAvg(privacy=DPSGD(...)): each client draws its rows "
            f"by independent coins. Received: sampler of type {type(request.sampler).__name__}"
            ". Leave it out."
        )
