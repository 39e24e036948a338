"""Arrays that are distributed over the workers, and sampled as one global data set.

The rows of the global data set are numbered worker by worker. Every worker draws the same
global batch, as row numbers, and computes the rows that it holds. No row leaves its worker.
A sampler that draws by class gets labels that are made from counts: then each worker's rows
are numbered class by class.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from tfdist.data import leaves
from tfdist.data.arrays import Arrays
from tfdist.data.local_rows import RowsPerWorker
from tfdist.data.source import Share
from tfdist.errors import ArgumentError
from tfdist.samplers import Rows, Sampler, Weighted
from tfdist.samplers.labelled import Labelled
from tfdist.strategies.base import Place, Strategy

Tensor = Any


@dataclass(frozen=True)
class LocalShard:
    """Each worker passes only its own rows; the `shard` argument of `fit`.

    `shard="local"` means `LocalShard()`. The workers tell each other once how many rows of
    each class they hold, and nothing else. The model is trained on the global data set: every
    row counts once an epoch, on whichever worker it is. The weights equal those of one process
    that has the rows of all workers, worker after worker. A worker may hold any number of
    rows, even none: arrays of shape [0, ...].

    Args:
        weight_by: "examples": every row has the same weight. "workers": every worker that
            holds rows has the same weight, split equally between its rows.

    Raises:
        ArgumentError: `weight_by` is neither.

    Example:
        >>> import keras, numpy as np, tfdist
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> x, y = np.ones((10, 4), "float32"), np.ones((10, 1), "float32")
        >>> history = tfdist.fit(model, x, y, shard=tfdist.LocalShard(), verbose=0)
    """

    weight_by: str = "examples"

    def __post_init__(self) -> None:
        if self.weight_by not in ("examples", "workers"):
            raise ArgumentError(
                "`weight_by` must be 'examples' or 'workers'. Received: "
                f"weight_by={self.weight_by!r}."
            )


def local_shard(shard: Any, strategy: Strategy) -> LocalShard | None:
    """Reads the `shard` argument.

    Args:
        shard: None, "local" or a `LocalShard`.
        strategy: The strategy.

    Raises:
        ArgumentError: `shard` is none of these, or the strategy's workers have no data of
            their own, or a worker may leave the run and take its data away.
    """
    if shard is None:
        return None
    if isinstance(shard, str) and shard == "local":
        shard = LocalShard()
    if not isinstance(shard, LocalShard):
        raise ArgumentError(
            "`shard` must be None, if all workers pass the same data, or 'local' or a "
            f"tfdist.LocalShard, if each passes what it holds. Received: shard={shard!r}."
        )
    obstacle = "the chief alone runs the script" if strategy.has_servers else None
    obstacle = "rows leave with their worker" if strategy.elastic else obstacle
    if obstacle is not None:
        raise ArgumentError(
            f"`shard` must be None where {obstacle}. Received: shard={shard!r} with "
            f"{strategy.name}. Use multi_worker, or horovod that is not elastic."
        )
    return shard


def bind(sampler: Sampler, holdings: RowsPerWorker) -> Sampler:
    """Returns the sampler that draws from the global data set.

    Args:
        sampler: The sampler that `fit` was given.
        holdings: How many rows every worker holds.

    Raises:
        ArgumentError: The sampler must know more of the rows than their class.
    """
    if isinstance(sampler, Weighted):
        raise ArgumentError(
            "`sampler` must not need more than counts when each worker passes what it holds. "
            "Received: Weighted, whose weights would have to leave a worker. Pass them as "
            "sample_weight."
        )
    if isinstance(sampler, Labelled):
        if holdings.names is None:
            raise ArgumentError(
                f"`{type(sampler).__name__}` must know the rows' classes. Received: targets "
                "that are not classes. Pass them: labels=..., on every worker its own."
            )
        sampler = dataclasses.replace(sampler, labels=None)  # type: ignore[type-var]
        return sampler.bind(holdings.labels(), sum(holdings.rows))
    return sampler.bind(None, sum(holdings.rows))


@dataclass
class LocalArrays(Arrays):
    """The rows of one worker; the sampler draws row numbers of the global data set.

    Attributes:
        holdings: How many rows every worker holds.
        worker: The number of this worker.
        order: This worker's rows in the order of the global data set; None if the order is
            the same.
    """

    holdings: RowsPerWorker
    worker: int
    order: Rows | None

    _facts: ClassVar[int] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.holdings.rows[self.worker]:  # a share has at least a padding row
            self.data = tf.nest.map_structure(leaves.blank, self.data)

    @property
    def num_rows(self) -> int:
        """Examples of all workers."""
        return sum(self.holdings.rows)

    @property
    def num_local_rows(self) -> int:
        """Examples of this worker, or 1 padding row if it has none."""
        return max(1, self.holdings.rows[self.worker])

    @property
    def _full_batch(self) -> None:
        """None: the rows of a batch are not split equally over the workers."""

    @property
    def common_data(self) -> Any:
        """None: each worker has its own rows."""
        return None

    @property
    def columns(self) -> Any:
        """None: only this worker has its rows."""
        return None

    def _draw(self, first: int) -> tuple[list[Rows], list[list[int]]]:
        """Draws global batches, and selects this worker's rows of each.

        Returns:
            For each batch the numbers of the local rows, and three facts: how many local rows
            there are, how many rows of the batch earlier workers hold, and all its rows.
        """
        begin, end = self.holdings.first_rows[self.worker :][:2]
        own_rows, facts = [], []
        for batch in self._sample(first):
            rows = batch[(batch >= begin) & (batch < end)] - begin
            own_rows.append(rows if self.order is None else self.order[rows])
            facts.append([len(rows), int((batch < begin).sum()), len(batch)])
        return own_rows, facts

    def _share(self, place: Place, rows: Tensor, facts: Tensor, replica: Tensor) -> Share:
        """Gathers a local replica's part of the worker's rows."""
        # Here the rows of a global batch are counted worker by worker: a share begins after
        # the rows of earlier workers and replicas.
        num_own, before, total = tf.unstack(facts)
        number, replicas = replica - place.first_replica, place.local_replicas
        begin, end = num_own * number // replicas, num_own * (number + 1) // replicas
        any_row = tf.zeros([1], tf.int64)
        share_rows = tf.cond(end > begin, lambda: rows[begin:end], lambda: any_row)
        return self._gather_share(share_rows, end - begin, total, before + begin)

    def fingerprint(self) -> str:
        """Returns the row counts of all workers and a hash of the sampler's rows, as text."""
        digest = hashlib.sha256(self.first_rows()).hexdigest()[:12]
        return f"{self.holdings} of {self.spec_text()}, {digest}"

    def report(self) -> str | None:
        """Returns a table of the workers' rows, and what it means for training."""
        holdings, steps = self.holdings, min(self.steps or 1, 64)
        rows_drawn = np.concatenate(
            self.sampler.batches(
                0, steps, num_rows=self.num_rows, batch_size=self.batch_size, seed=self.seed
            )
        )
        edges = np.array(holdings.first_rows[1:-1])
        per_step = np.bincount(
            np.searchsorted(edges, rows_drawn, side="right"), minlength=len(holdings.rows)
        )
        mean = (per_step / steps).tolist()
        lines = ["tfdist: each worker trains on the rows that it holds:", holdings.table(mean)]
        skew = holdings.skew()
        if skew is not None:
            lines.append(
                f"skew of the classes between workers: {skew:.2f} (0: the same shares on all, "
                "1: no class on two); batches are drawn from the global data set, so weights "
                "do not depend on it"
            )
        share = per_step.max() / max(1, per_step.sum())
        lines.append(
            f"a step waits for the largest part: worker {int(per_step.argmax())} computes "
            f"{share:.0%} of the rows, so {len(holdings.rows)} workers can be at most "
            f"{1 / share:.1f} times as fast as one"
        )
        return "\n".join(lines)
