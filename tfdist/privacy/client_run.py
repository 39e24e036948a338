"""One `fit` with client-level privacy: its drawn clients, its noise and its cost."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from tfdist import data
from tfdist.errors import ArgumentError
from tfdist.federated.settings import FedAvg
from tfdist.federated.source import Rounds
from tfdist.privacy import leaking_callbacks
from tfdist.privacy.accounting.ledger import CLIENT, Phase
from tfdist.privacy.accounting.report import careless_delta
from tfdist.privacy.calibration import check_count_noise, find_noise
from tfdist.privacy.client_dp import ClientDP
from tfdist.privacy.client_dpftrl import ClientDPFTRL
from tfdist.privacy.counted_run import CountedRun
from tfdist.privacy.federated_checks import check_request, fingerprint_of
from tfdist.privacy.mechanism.client_norm import AdaptiveNorm
from tfdist.privacy.mechanism.client_updates import ClientUpdates
from tfdist.privacy.planning import StepPlan, in_its_turn
from tfdist.training.request import Request


class ClientRun(CountedRun[ClientDP]):
    """A `fit` with client-level privacy, from its arguments to its report.

    A step of the ledger is a round.

    Args:
        federated: The argument `federated` of `fit`, with `privacy`.
        request: The other arguments of `fit`.

    Attributes:
        mechanism: The clipping and the noise. It is set by `plan`.

    Raises:
        ArgumentError: An argument cannot be used with client-level privacy.
        MissingPackageError: dp-accounting is not installed.
    """

    mechanism: ClientUpdates

    def __init__(self, federated: FedAvg, request: Request) -> None:
        privacy = federated.privacy
        if not isinstance(privacy, ClientDP):
            raise ArgumentError(
                "`privacy` of FedAvg must be a tfdist.ClientDP or None. Received: "
                f"privacy={privacy!r}."
            )
        check_request(request)
        super().__init__(privacy, request)
        assert federated.local_steps is not None  # `FedAvg` has checked it
        is_secret = not self.is_seeded or self.takes_turns
        self._begin_count(request, is_secret, federated.local_steps)
        self._source: Rounds | None = None
        if self.takes_turns and federated.secure is not None:
            raise ArgumentError(
                "`secure` must be None with ClientDPFTRL, whose noise is added to the sum of "
                f"all clients. Received: secure={federated.secure!r}. Leave it out, or use "
                "ClientDP."
            )

    @property
    def takes_turns(self) -> bool:
        """Whether clients take part in turn, so that no round is drawn in secret."""
        return isinstance(self.privacy, ClientDPFTRL)

    def plan(self, source: data.Source, epochs: int) -> None:
        """Calibrates the noise.

        Args:
            source: The rounds.
            epochs: The number of rounds.

        Raises:
            ArgumentError: The budget is spent, or there is too little noise.
        """
        assert isinstance(source, Rounds)
        privacy, clients = self.privacy, source.plan.clients
        probability = privacy.sampling_probability
        self.planned_steps = max(0, epochs)
        phase = Phase(probability, 0.0, 1, num_rows=clients.number, unit=CLIENT)
        if self.takes_turns:
            self._source = source
            phase = dataclasses.replace(phase, bands=privacy.bands, separation=privacy.turns)
        phase = self._spending.named(phase, fingerprint_of(clients))
        self.ledger(0).add(phase).check_unit()
        self.ledger(0).add(phase).check_relation(privacy.relation)
        expected = probability * clients.number / privacy.turns
        planned = StepPlan(self.planned_steps, phase, expected, expected)
        noise, _ = find_noise(privacy, self._session, self._spending, planned, phase)
        phase = dataclasses.replace(phase, noise_multiplier=noise)
        self._spending.plan(phase, self.planned_steps)
        self.noise_multiplier = noise
        self.mechanism = ClientUpdates(
            privacy.l2_norm_clip,
            noise,
            probability,
            clients.number,
            self._session.strategy,
            self._adaptive_norm(noise, expected),
            privacy.turns,
            privacy.bands,
        )
        leaking_callbacks.check_names(self._callbacks, self._model.get_metrics_result())

    def _adaptive_norm(self, noise: float, expected: float) -> AdaptiveNorm | None:
        privacy = self.privacy
        if privacy.target_quantile is None:
            return None
        count_noise = expected / 20 if privacy.count_noise is None else privacy.count_noise
        check_count_noise(count_noise, noise, "updates", "more clients")
        return AdaptiveNorm(
            privacy.l2_norm_clip,
            privacy.target_quantile,
            privacy.clip_learning_rate,
            count_noise,
        )

    def notice(self) -> str | None:
        """Says how large the noise is, and warns of a large `delta`."""
        which = "each round" if self.privacy.target_quantile is None else "the first round"
        noise = (
            f"{which} adds noise of standard deviation {self.mechanism.deviation:.2g} to "
            "each weight of the server's update"
        )
        careless = careless_delta(self.ledger(self.planned_steps), self._delta)
        lines = [noise, careless, self._spending.notice()]
        return "\ntfdist: ".join(filter(None, lines))

    @property
    def common_settings(self) -> dict[str, Any]:
        """The settings that must be equal on all workers."""
        return {
            "client-level privacy": (self.privacy.l2_norm_clip, self._delta),
            "sampling_probability": self.privacy.sampling_probability,
            "noise_multiplier": self.noise_multiplier,
            "relation": self.privacy.relation,
            **self._adaptive_settings(),
            "max_examples": self.privacy.max_examples,
            "turns": (self.privacy.turns, self.privacy.bands),
            "spent before": self.ledger(0),
        }

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that must not change in a continued training."""
        return {
            "l2_norm_clip": self.privacy.l2_norm_clip,
            **self._adaptive_settings(),
            **self._weights(),
            **self._phase_settings(),
            # A client's part of earlier rounds is a part of the mechanism of later ones.
            **self._in_turn(),
        }

    def _adaptive_settings(self) -> dict[str, Any]:
        names = ("target_quantile", "clip_learning_rate", "count_noise")
        if self.privacy.target_quantile is None:
            return {}
        return {name: getattr(self.privacy, name) for name in names}

    def _in_turn(self) -> dict[str, Any]:
        """Describes the turns of clients, and what they contribute."""
        if self._source is None:
            return {}
        turns = hashlib.sha256(self._source.plan.turn_of.tobytes()).hexdigest()
        return {"turns": turns, **in_its_turn(self._model, self._source)}

    def _weights(self) -> dict[str, Any]:
        # Left out if it is None: checkpoints of earlier versions do not have it.
        most = self.privacy.max_examples
        return {} if most is None else {"max_examples": most}

    def watched(self, callbacks: Any) -> Any:
        """Adds callbacks that count rounds, and renews the noise.

        Args:
            callbacks: A list of callbacks, or a `CallbackList`.
        """
        return self._counted(callbacks, self.mechanism, [*self.mechanism.logs()])
