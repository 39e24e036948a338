"""Measures the mechanism of client-level privacy, by rounds of `fit` itself."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from tfdist import api
from tfdist.errors import ArgumentError
from tfdist.federated.settings import FedAvg
from tfdist.privacy.accounting.ledger import Ledger
from tfdist.privacy.checking.columns import Columns, mapped, selected
from tfdist.privacy.checking.draw_tests import draw_facts
from tfdist.privacy.checking.noise_tests import noise_facts
from tfdist.privacy.checking.noises import sampled
from tfdist.privacy.checking.recorder import subject_of
from tfdist.privacy.checking.report import Finding
from tfdist.privacy.client_dp import ClientDP
from tfdist.privacy.mechanism.mechanism import noise_beside_count

Floats = NDArray[np.float64]
_CLIENTS = 8  # of the user's, on which noise and contributions are measured
_DRAWN = 200  # clients of the model of draws
_ROUNDS = 32
_TOLERANCE = 1e-3
_SCALES = (1.0, 1e3, 1e30)  # of the inputs, and of the learning rate


@dataclass(frozen=True)
class ClientCheck:
    """Measures rounds of protected clients.

    Args:
        model: A compiled, built `keras.Model`.
        columns: The user's data.
        federated: The user's settings, with a `ClientDP` and `clients`.
        batch_size: As in `fit`.
        strategy: As in `fit`.
    """

    model: Any
    columns: Columns
    federated: FedAvg
    batch_size: int
    strategy: Any

    @property
    def privacy(self) -> ClientDP:
        """The settings that are measured: a multiplier of 1 in place of a target."""
        privacy = self.federated.privacy
        assert isinstance(privacy, ClientDP)
        multiplier = privacy.noise_multiplier
        return dataclasses.replace(
            privacy,
            noise_multiplier=1.0 if multiplier is None else multiplier,
            target_epsilon=None,
            spent=Ledger(),
            seed=None,
        )

    @property
    def ids(self) -> NDArray[np.int64]:
        """The number of each row's client, shape [rows]."""
        numbers = np.unique(np.asarray(self.federated.clients), return_inverse=True)[1]
        return np.asarray(numbers, np.int64).reshape(-1)

    def draws(self, rounds: int, alpha: float) -> list[Finding]:
        """Trains a model with a weight for each client, and reads which clients took part.

        Args:
            rounds: The number of rounds.
            alpha: The probability of a false alarm of each test.
        """
        count, privacy = _DRAWN, self.privacy
        norm = privacy.l2_norm_clip
        private = dataclasses.replace(
            privacy, noise_multiplier=0.0, max_examples=None, target_quantile=None
        )
        ids, options = np.arange(count), {"weighting": "uniform", "local_steps": 1}
        federated = self._averaging(ids, private, **options)
        number = keras.Input((), dtype="int32", name="tfdist_number")
        table = keras.layers.Embedding(count, 1, "zeros", name="tfdist_table")
        model = keras.Model(number, table(number), name="tfdist_draws")
        model.compile("sgd", "mse", jit_compile=False)
        columns = np.arange(count, dtype=np.int32), np.full((count, 1), -1e3 * norm), None
        with self._measuring(model, 1.0):
            moved = self._rounds(model, columns, federated, rounds)
        q = privacy.sampling_probability
        parts = np.abs(moved) * (q * count) / norm
        taken = parts > 0.5
        return [
            Finding(
                "division: a client's part, over l2_norm_clip over the expected clients",
                float(parts[taken].mean()) if taken.any() else 0.0,
                1.0,
                1 - _TOLERANCE,
                1 + _TOLERANCE,
                f"{int(taken.sum())} parts, of rounds of any size",
            ),
            *draw_facts(taken, q, alpha),
        ]

    def contributions(self) -> list[Finding]:
        """Compares sums with and without one client, whose update may be large."""
        rows = self._rows()
        some = selected(self.columns, rows)
        ids = self.ids[rows]
        last = ids == ids.max()
        private = _without_noise(self.privacy)
        largest = 0.0
        for scale in _SCALES:
            columns = _scaled(some, last, scale)
            sums = [
                self._sum(selected(columns, np.flatnonzero(keep)), ids[keep], private, scale)
                for keep in (np.ones(len(ids), bool), ~last)
            ]
            largest = max(largest, float(np.linalg.norm(sums[0] - sums[1])))
        # Updates are read from the weights, which are rounded in each of two rounds.
        rounding = 2 * len(np.unique(ids)) * 2.0**-23 * float(np.linalg.norm(_flat(self.model)))
        return [
            Finding(
                "contributions: of one client, in units of l2_norm_clip",
                largest / private.l2_norm_clip,
                1.0,
                -math.inf,
                1 + _TOLERANCE + rounding / private.l2_norm_clip,
                "inputs and learning rates as they are, times 1e3 and times 1e30",
            )
        ]

    def noise(self, numbers: int, alpha: float, rng: np.random.Generator) -> list[Finding]:
        """Measures the noise on updates of clients that train with a learning rate of 0.

        Args:
            numbers: About how many random numbers to measure.
            alpha: The probability of a false alarm of each test.
            rng: The random generator for the choice of weights.
        """
        privacy, rows = self.privacy, self._rows()
        assert privacy.noise_multiplier is not None
        ids = self.ids[rows]
        clients = len(np.unique(ids))
        noise, private = privacy.noise_multiplier, privacy
        if privacy.target_quantile is not None:
            # The default noise of the count is that of the user's number of clients.
            expected = privacy.sampling_probability * (self.ids.max() + 1)
            count_noise = privacy.count_noise or expected / 20
            private = dataclasses.replace(
                privacy, count_noise=float(count_noise), clip_learning_rate=0.0
            )
            noise = noise_beside_count(noise, count_noise)
        federated = self._averaging(ids, private, local_steps=1)
        with self._measuring(self.model, 0.0):
            weights = sampled(self.model.trainable_variables, numbers // _ROUNDS, rng)
            for variable in self.model.trainable_variables:
                variable.assign(np.zeros(variable.shape))  # so that updates are not rounded
            columns = selected(self.columns, rows)
            # Two calls: noise must be new in each.
            halves = [
                self._rounds(self.model, columns, federated, _ROUNDS // 2) for _ in range(2)
            ]
        divisor = privacy.sampling_probability * clients
        z = np.concatenate(halves)[:, weights.columns] * divisor
        return noise_facts(z / (noise * privacy.l2_norm_clip), weights.blocks, alpha)

    # --- rounds ---------------------------------------------------------------------------

    def _rows(self) -> NDArray[np.int64]:
        """The rows of some clients."""
        return np.flatnonzero(self.ids < _CLIENTS)

    def _averaging(self, ids: Any, privacy: ClientDP, **options: Any) -> FedAvg:
        return dataclasses.replace(
            self.federated, clients=ids, privacy=privacy, server_optimizer=None, **options
        )

    @contextlib.contextmanager
    def _measuring(self, model: Any, rate: float) -> Iterator[None]:
        """Trains with SGD, and restores the model afterwards."""
        with subject_of(model, self.strategy):
            vars(model)["optimizer"] = keras.optimizers.SGD(rate)
            yield

    def _rounds(self, model: Any, columns: Columns, federated: FedAvg, rounds: int) -> Floats:
        """Makes rounds, and returns what each subtracted from the weights."""
        weights = [_flat(model)]
        note = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: weights.append(_flat(model))
        )
        x, y, sample_weight = columns
        api.fit(
            model,
            x,
            y,
            sample_weight=sample_weight,
            batch_size=self.batch_size,
            epochs=rounds,
            verbose=0,
            strategy=self.strategy,
            callbacks=[note],
            federated=federated,
            verify_every=0,
        )
        moved: Floats = -np.diff(np.array(weights), axis=0)
        return moved

    def _sum(self, columns: Columns, ids: Any, privacy: ClientDP, scale: float) -> Floats:
        """Returns the sum of the clipped updates of all clients, in one round."""
        federated = self._averaging(ids, privacy)
        with self._measuring(self.model, min(scale, 1e6)):
            moved = self._rounds(self.model, columns, federated, 1)
        total: Floats = moved[0] * len(np.unique(ids))
        return total


def check_federated(model: Any, x: Any, federated: Any, privacy: Any) -> None:
    """Refuses settings that a check of clients does not measure.

    Args:
        model: A `keras.Model`.
        x: As in `check`.
        federated: As in `check`.
        privacy: As in `check`.

    Raises:
        ArgumentError: There are such settings.
    """
    protects = isinstance(federated, FedAvg) and isinstance(federated.privacy, ClientDP)
    if privacy is not None or not protects:
        raise ArgumentError(
            "`federated` must be a FedAvg with a ClientDP as `privacy`, and without `privacy` "
            f"besides. Received: federated={federated!r}, privacy={privacy!r}. To check the "
            "local steps of FedAvg(privacy=DPSGD(...)), pass the DPSGD as `privacy` alone."
        )
    if federated.privacy.turns > 1 or federated.privacy.bands is not None:
        raise ArgumentError(
            "`federated` must have independent noise for a check. Received: "
            f"privacy={federated.privacy!r}. Use ClientDP."
        )
    ids = np.asarray(federated.clients)
    if ids.ndim != 1 or federated.secure is not None:
        raise ArgumentError(
            "`federated` must have `clients` and no `secure` for a check, which makes rounds "
            f"of some clients. Received: clients of shape {ids.shape}, "
            f"secure={federated.secure!r}."
        )
    if not model.built:
        raise ArgumentError(
            f"`model` must be built for a check of clients. Received: {model.name!r}, which is "
            "not. Give it an Input."
        )


def _without_noise(privacy: ClientDP) -> ClientDP:
    """All clients in each round, without noise, and with equal random numbers in each `fit`."""
    return dataclasses.replace(
        privacy,
        noise_multiplier=0.0,
        sampling_probability=1.0,
        clip_learning_rate=0.0,
        seed=1,
    )


def _flat(model: Any) -> Floats:
    values = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
    return np.concatenate([np.asarray(value, np.float64).ravel() for value in values])


def _scaled(columns: Columns, rows: NDArray[np.bool_], scale: float) -> Columns:
    """Multiplies the inputs of some rows, if they are real numbers."""

    def scaled(column: Any) -> Any:
        if not np.issubdtype(column.dtype, np.floating):
            return column
        factors = np.where(rows, scale, 1.0).reshape(-1, *[1] * (column.ndim - 1))
        with np.errstate(over="ignore"):
            return (column * factors).astype(column.dtype)

    x, y, sample_weight = columns
    return mapped(scaled, x), y, sample_weight
