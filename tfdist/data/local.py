"""Arrays of which each worker holds some: a sampler draws from the union that nobody has.

Rows of the union are numbered worker by worker. Every worker draws the same global batch,
in numbers, computes the rows that it holds, and no row travels. A sampler that draws by
class gets labels that are made up from counts: then a worker's rows are numbered class by
class.
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
from tfdist.data.local_rows import Holdings
from tfdist.data.source import Share
from tfdist.errors import ArgumentError
from tfdist.samplers import Rows, Sampler, Weighted
from tfdist.samplers.labelled import Labelled
from tfdist.strategies.base import Place, Strategy

Tensor = Any


@dataclass(frozen=True)
class LocalShard:
    """Each worker passes only the rows that it holds; the `shard` argument of `fit`.

    `shard="local"` means `LocalShard()`. The workers tell each other how many rows of each
    class they hold, once, and nothing else. Then the union of all rows is trained on: every
    row counts once an epoch, whoever holds it, and weights equal those of one process that
    has all rows, worker by worker. A worker may hold any number of rows, also none: arrays of
    shape [0, ...].

    Args:
        weight_by: "examples": every row has the same weight. "workers": every worker that
            holds rows has the same weight, its rows share it.

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
        strategy: Where the replicas are.

    Raises:
        ArgumentError: It is none of these, workers have no data of their own, or may leave
            with it.
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


def bind(sampler: Sampler, holdings: Holdings) -> Sampler:
    """Gives the sampler that draws from the union.

    Args:
        sampler: What `fit` was given.
        holdings: What every worker holds.

    Raises:
        ArgumentError: The sampler must know more of rows than their class.
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
    """The rows that one worker holds; the sampler's numbers are those of the union.

    Attributes:
        holdings: What every worker holds.
        worker: This one.
        order: Its rows in the order in which the union has them, or None for their own.
    """

    holdings: Holdings
    worker: int
    order: Rows | None

    _facts: ClassVar[int] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.holdings.rows[self.worker]:  # a share has a row, if one that counts nothing
            self.data = tf.nest.map_structure(leaves.blank, self.data)

    @property
    def num_rows(self) -> int:
        """Examples of all workers."""
        return sum(self.holdings.rows)

    @property
    def num_local_rows(self) -> int:
        """Examples that this worker holds, or 1 that stands for none."""
        return max(1, self.holdings.rows[self.worker])

    @property
    def _full_batch(self) -> None:
        """None: shares of a batch have as many rows as are held where."""

    @property
    def held(self) -> Any:
        """None: each worker has its own."""
        return None

    @property
    def columns(self) -> Any:
        """None: only this worker has its rows."""
        return None

    def _drawn(self, first: int) -> tuple[list[Rows], list[list[int]]]:
        """Draws global batches; gives this worker's rows of each.

        Returns:
            For each the numbers of the local rows; and how many they are, how many of the
            batch are held by workers before, and how many it has.
        """
        begin, end = self.holdings.first_rows[self.worker :][:2]
        own, facts = [], []
        for batch in self._sampled(first):
            rows = batch[(batch >= begin) & (batch < end)] - begin
            own.append(rows if self.order is None else self.order[rows])
            facts.append([len(rows), int((batch < begin).sum()), len(batch)])
        return own, facts

    def _share(self, place: Place, rows: Tensor, facts: Tensor, replica: Tensor) -> Share:
        """Gathers a local replica's part of the worker's rows."""
        own, before, total = tf.unstack(facts)
        number, replicas = replica - place.first_replica, place.local_replicas
        begin, end = own * number // replicas, own * (number + 1) // replicas
        any_row = tf.zeros([1], tf.int64)
        mine = tf.cond(end > begin, lambda: rows[begin:end], lambda: any_row)
        return self._dealt(mine, end - begin, total, before + begin)

    def fingerprint(self) -> str:
        """Sums up what all workers hold, and a step of the sampler; no row."""
        digest = hashlib.sha256(self.first_rows()).hexdigest()[:12]
        return f"{self.holdings} of {self.spec_text()}, {digest}"

    def report(self) -> str | None:
        """Says what each worker holds, and what that means for training."""
        holdings, steps = self.holdings, min(self.steps or 1, 64)
        drawn = np.concatenate(
            self.sampler.batches(
                0, steps, num_rows=self.num_rows, batch_size=self.batch_size, seed=self.seed
            )
        )
        edges = np.array(holdings.first_rows[1:-1])
        per_step = np.bincount(
            np.searchsorted(edges, drawn, side="right"), minlength=len(holdings.rows)
        )
        mean = (per_step / steps).tolist()
        lines = ["tfdist: each worker trains on the rows that it holds:", holdings.table(mean)]
        skew = holdings.skew()
        if skew is not None:
            lines.append(
                f"skew of the classes between workers: {skew:.2f} (0: the same shares on all, "
                "1: no class on two); batches are drawn from the union, so weights do not "
                "depend on it"
            )
        share = per_step.max() / max(1, per_step.sum())
        lines.append(
            f"a step waits for the largest part: worker {int(per_step.argmax())} computes "
            f"{share:.0%} of the rows, so {len(holdings.rows)} workers can be at most "
            f"{1 / share:.1f} times as fast as one"
        )
        return "\n".join(lines)
