"""One process's place in the cluster, its strategy and its seed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import keras

from tfdist import _keras, strategies, watchdog
from tfdist.cluster import Cluster
from tfdist.errors import StrategyError
from tfdist.strategies.base import Strategy
from tfdist.strategies.tf_distribute import adopt


@dataclass(frozen=True)
class Session:
    """What this process trains with.

    Attributes:
        strategy: Where the replicas are.
        reason: Why this strategy, a few words.
        seed: What `init` was given, for the sampler too, or None.
    """

    strategy: Strategy
    reason: str
    seed: int | None

    @property
    def is_chief(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.strategy.place.is_chief

    def sampler_seed(self, seed: int | None) -> int:
        """Chooses the seed of one `fit`.

        Args:
            seed: What `fit` was given, or None.

        Returns:
            That one, else `init`'s, else one that follows from the state of Python's `random`
            (which `keras.utils.set_random_seed` seeds); the same on every worker.
        """
        chosen = self.seed if seed is None else seed
        return int(self.strategy.broadcast_object(_next_seed() if chosen is None else chosen))

    def describe(self, batch_size: int | None) -> str:
        """Says in one line what was chosen, why, and how a batch is split.

        Args:
            batch_size: Examples of a full global batch, if known.
        """
        split = self.strategy.describe(batch_size)
        return f"tfdist: {self.strategy.name} ({self.reason}): {split}"


@dataclass
class _Drawn:
    """The state of Python's generator at the last fit, and how many fits it has seen."""

    state: Any = None
    generator: Any = None
    fits: int = 0


def _next_seed() -> int:
    """Gives a seed, another each time, and leaves Python's generator where it is.

    Keras draws initial weights from that generator, and its own `fit` draws nothing. Who seeds
    again begins again.
    """
    state, generator = random.getstate(), _keras.generator()
    if state != _drawn.state or generator is not _drawn.generator:
        _drawn.state, _drawn.generator, _drawn.fits = state, generator, 0
    text = f"{state} {_drawn.fits}"
    _drawn.fits += 1
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


_drawn = _Drawn()
_sessions: dict[Any, Session] = {}
_current: Session | None = None


def init(
    strategy: Any = "auto",
    seed: int | None = None,
    *,
    hang_limit: float | None = None,
    on_hang: str | None = None,
) -> Session:
    """Connects this process to the others and seeds every worker alike.

    `tfdist run` calls it before the script. A script that something else starts on several
    workers (a TF_CONFIG from Kubernetes, `srun`) calls it right after its imports: a worker
    must be connected before TensorFlow does anything else in it. In a single process it is
    needed only to set a seed, and `fit` calls it when nobody did.

    Args:
        strategy: "auto" to keep what this process has, at first to choose from the
            environment; a name ("single", "mirrored",
            "multi_worker", "horovod", "parameter_server", "tpu"); or an instance of
            `tf.distribute.Strategy`, `tfdist.Horovod` or `tfdist.ParameterServer`.
        seed: Seeds Python, NumPy, Keras and TensorFlow, and the sampler of `fit`. With None
            a single process keeps the seeds that it has, and the workers of a cluster take
            one that the chief draws.
        hang_limit: Seconds without progress after which a report says who is where; 0 for
            never. None for TFDIST_HANG_LIMIT, else 60.
        on_hang: "end" the run then, or only "report". None for TFDIST_ON_HANG, else "end".

    Returns:
        The session.

    Raises:
        ArgumentError: `hang_limit` or `on_hang` has no meaning.
        StrategyError: The strategy cannot run here, or it is too late to connect.
        ClusterError: The description of the cluster is malformed.

    Example:
        >>> import tfdist
        >>> tfdist.init(seed=1).strategy.name
        'single'
    """
    global _current
    watchdog.configure(hang_limit, on_hang)
    _current = _begin(strategy, seed)
    return _current


def _begin(strategy: Any, seed: int | None) -> Session:
    cluster = Cluster.from_environment()
    key: Any
    if isinstance(strategy, str) and strategy == "auto" and _current is not None:
        made, reason = _current.strategy, _current.reason
        key = next(key for key, known in _sessions.items() if known.strategy is made)
    elif isinstance(strategy, str):
        cls, reason = strategies.choose(strategy, cluster)
        key = cls.name
        made = _sessions[key].strategy if key in _sessions else _make(cls, cluster)
    else:
        key, reason = strategy, "as passed"
        made = _sessions[key].strategy if key in _sessions else _adopt(strategy)
    # A script that has seeded its workers by itself has done it alike.
    is_seeded = _keras.is_seeded()
    if seed is not None or (made.place.num_workers > 1 and not is_seeded):
        drawn = random.SystemRandom().getrandbits(31) if seed is None else seed
        keras.utils.set_random_seed(int(made.broadcast_object(drawn)))
    _sessions[key] = Session(made, reason, seed)
    return _sessions[key]


def _make(cls: type[Strategy], cluster: Cluster) -> Strategy:
    if _current is not None and _current.strategy.place.num_workers > 1:
        raise StrategyError(
            "A process that is connected to other workers keeps its strategy. Received: "
            f"strategy={cls.name!r} after {_current.strategy.name!r}."
        )
    return cast(Callable[[Cluster], Strategy], cls)(cluster)


def _adopt(strategy: Any) -> Strategy:
    return strategy if isinstance(strategy, Strategy) else adopt(strategy)


def current(strategy: Any = "auto") -> Session:
    """Gives the session for a strategy, beginning one if need be.

    Args:
        strategy: As in `init`; "auto" is what `init` chose, if it was called.
    """
    if isinstance(strategy, str) and strategy == "auto":
        return init() if _current is None else _current
    known = _sessions.get(strategy)
    if known is not None:
        return known
    if _current is None:
        return init(strategy)
    return _begin(strategy, _current.seed)


def is_chief() -> bool:
    """Tells whether this process is the one that writes files.

    Returns:
        True in a single process, and on one worker of a cluster.

    Example:
        >>> import tfdist
        >>> if tfdist.is_chief():
        ...     print("saved once")
        saved once
    """
    return current().is_chief
