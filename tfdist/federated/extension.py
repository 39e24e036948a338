"""Federated training as a part of `fit`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import tensorflow as tf

from tfdist import _keras, data
from tfdist.data.arrays import Arrays
from tfdist.data.local import LocalArrays
from tfdist.errors import ArgumentError, DisagreementError
from tfdist.federated import clients as of
from tfdist.federated import masks
from tfdist.federated.clients import Clients
from tfdist.federated.plan import RoundPlan
from tfdist.federated.protection import LocalProtection, Protecting
from tfdist.federated.round import Federation
from tfdist.federated.settings import check
from tfdist.federated.snapshot import RoundSnapshot
from tfdist.federated.source import Rounds
from tfdist.federated.sums import CLIPPED
from tfdist.federated.validation import (
    check_clients,
    check_model,
    check_request,
    check_secure,
)
from tfdist.step.prepared import PreparedModel
from tfdist.strategies.base import Place
from tfdist.training.extension import Extension
from tfdist.training.request import Request


class FederatedTraining(Extension):
    """Makes each epoch a round of federated training.

    Args:
        federated: The argument `federated` of `fit`.
        protecting: The extension that protects clients, or their examples, or None. It is
            bound before.

    Raises:
        ArgumentError: `federated` is not valid.
    """

    name = "federated"
    needs_state = True

    def __init__(self, federated: Any, protecting: Protecting | None = None) -> None:
        self._settings = check(federated)
        self._protecting = protecting
        self._clients: Clients | None = None
        self._snapshot = RoundSnapshot()

    def choose(self, request: Request) -> Request:
        """Refuses what cannot be federated. Each client computes its own, whole batches."""
        check_request(request, self._protecting is not None)
        if self._settings.secure is None:
            return replace(request, whole_batch=False)
        check_secure(request, self._settings.secure)
        masks.require_cryptography()
        # Workers with rows of their own must not tell each other of which classes they are.
        return replace(request, whole_batch=False, is_private=True)

    def source(self, request: Request, source: data.Source) -> data.Source:
        """Makes rounds of the rows."""
        assert isinstance(source, Arrays)
        self._clients = self._find_clients(request, source)
        check_clients(self._clients, self._settings)
        holders = int((self._clients.sizes > 0).sum())
        wanted = self._settings.clients_per_round
        if wanted is not None and wanted > holders:
            raise ArgumentError(
                "`clients_per_round` must be at most the number of clients that hold rows. "
                f"Received: clients_per_round={wanted} and {holders} clients."
            )
        return self._make_rounds(request, source, self._clients)

    def _make_rounds(self, request: Request, source: Arrays, clients: Clients) -> Rounds:
        """Makes the rounds of clients that were checked."""
        return Rounds(source, self._plan(RoundPlan, request, source, clients))

    def _plan(
        self,
        kind: type[RoundPlan],
        request: Request,
        source: Arrays,
        clients: Clients,
        place: Place | None = None,
    ) -> RoundPlan:
        """Makes a plan.

        Args:
            kind: Its class.
            request: The arguments of `fit`.
            source: The rows.
            clients: The clients.
            place: The replicas among which clients are divided; None for those of the strategy.
        """
        assert request.sampler is not None
        assert request.seed is not None
        local = self._local
        return kind(
            self._settings,
            clients,
            request.session.strategy.place if place is None else place,
            request.sampler if local is None else local.sampler,
            source.batch_size,
            request.seed,
            None if local is None else local.row_seed,
        )

    @property
    def _local(self) -> LocalProtection | None:
        return None if self._protecting is None else self._protecting.local

    def bind(self, request: Request, source: data.Source) -> None:
        """Refuses models whose local steps are not known, and prepares the rounds."""
        assert isinstance(source, Rounds)
        check_model(request, source)
        self._check_alike(request)
        mechanism = None if self._protecting is None else self._protecting.mechanism
        agreed = None if self._settings.secure is None else self._agree_on_masks(request)
        self.round_maker = Federation(self._settings, source, mechanism, agreed, self._local)

    def _check_alike(self, request: Request) -> None:
        """Compares what decides about collectives, before the first of them differs."""
        found = request.session.strategy.gather_objects(repr(self._settings.secure))
        if len(set(found)) > 1:
            listed = ", ".join(f"worker {n}: {secure}" for n, secure in enumerate(found))
            raise DisagreementError(
                f"`secure` must be the same on all workers. Received: {listed}."
            )

    def _agree_on_masks(self, request: Request) -> masks.PairwiseMasks:
        strategy = request.session.strategy
        worker, workers = strategy.place.worker_index, strategy.place.num_workers
        agreed, fingerprint = masks.agree(worker, strategy.gather_objects)
        if request.verbose != 0:  # on each worker, since only people can compare them
            print(
                f"tfdist: secure sum: worker {worker} has the keys of {workers} workers, "
                f"fingerprint {fingerprint}. It is the same on all, unless somebody between "
                "them has exchanged keys.",
                flush=True,
            )
        return agreed

    def callbacks(self, request: Request, callbacks: Any, prepared: PreparedModel) -> Any:
        """Adds what keeps the model as it was before a round."""
        return _keras.around(callbacks, [self._snapshot], [])

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Gives the model the weights before a round that ends by an error."""
        try:
            yield
        except BaseException:
            self._snapshot.restore()
            raise

    def facts(self) -> dict[str, Any]:
        """Returns the settings, which must be equal on all workers."""
        return {"federated": self.settings(), "secure": repr(self._settings.secure)}

    def settings(self) -> Any:
        """Returns the settings and the clients, which must not change when it continues."""
        assert self._clients is not None
        clients = {"kind": self._clients.kind, "number": self._clients.number}
        return self._settings.describe() | clients

    def notice(self, request: Request) -> str | None:
        """Says who the clients are, and what a round is."""
        assert self._clients is not None
        settings = self._settings
        number = settings.clients_per_round
        chosen = "" if number is None else f" of {number:,} of them"
        count, noun = settings.local_steps, "local step"
        if count is None:
            count, noun = settings.local_epochs or 1, "local epoch"
        work = f"{count} {noun}{'s' if count > 1 else ''} each"
        text = f"federated: {self._clients.describe()}; an epoch is a round{chosen}, {work}"
        devices = request.session.strategy.place.local_replicas
        if self._clients.kind == "worker" and devices > 1:
            text += f"; each trains on one of the {devices} devices of its worker"
        if settings.of_clients is not None:
            probability = settings.of_clients.sampling_probability
            text += f"; a round draws each client with probability {probability:g}"
        return text

    def report(self, request: Request, history: Any) -> None:
        """Warns of clipped values, which change the result."""
        clipped = max(history.history.get(CLIPPED, [0.0]), default=0.0)
        if clipped > 0 and request.shows:
            print(
                f"tfdist: warning: up to {clipped:.2g} of the values of a round were clipped "
                "to the max_value of SecureSum, or were not finite",
                flush=True,
            )

    def _find_clients(self, request: Request, source: Arrays) -> Clients:
        strategy, ids = request.session.strategy, self._settings.clients
        is_local = isinstance(source, LocalArrays)
        num_rows = source.num_rows
        if isinstance(source, LocalArrays):
            num_rows = source.holdings.rows[source.worker]
        if ids is not None:
            ids = of.as_ids(ids)
            if request.validation_split and ids.shape == (_num_rows(request.x),):
                ids = ids[:num_rows]
        clients = of.of_ids(ids, num_rows, strategy, is_local)
        if clients is not None:
            return clients
        if isinstance(source, LocalArrays):
            return of.of_workers(source.holdings.rows, source.worker)
        if request.shard is not None:
            return of.of_workers([num_rows], 0)
        assert request.seed is not None
        return of.of_replicas(num_rows, strategy.place, request.seed)


def _num_rows(x: Any) -> int:
    return len(tf.nest.flatten(x)[0])
