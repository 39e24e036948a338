"""The session of a process: its strategy and its seed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import keras

from tfdist import _keras, strategies, watchdog
from tfdist.cluster import Cluster
from tfdist.errors import StrategyError
from tfdist.strategies.base import Strategy
from tfdist.strategies.keras_distribution import check_devices, without_distribution
from tfdist.strategies.model_parallel import ModelParallel, mesh_of_environment
from tfdist.strategies.tf_distribute import adopt
from tfdist.strategies.zero import Zero, of_environment


@dataclass(frozen=True)
class Session:
    """The strategy and the seed of this process.

    Attributes:
        strategy: The strategy.
        reason: Why this strategy was chosen, in a few words.
        seed: The `seed` of `init`, also for the sampler, or None.
        zero: How weights and the optimizer's state are kept in parts, or None.
    """

    strategy: Strategy
    reason: str
    seed: int | None
    zero: Zero | ModelParallel | None = None

    @property
    def is_chief(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.strategy.place.is_chief

    def sampler_seed(self, seed: int | None) -> int:
        """Chooses the seed of one `fit`.

        Args:
            seed: The `seed` of `fit`, or None.

        Returns:
            The seed of `fit`, else that of `init`, else a seed derived from the state of
            Python's `random` (which `keras.utils.set_random_seed` seeds). It is the same on
            every worker.
        """
        fixed_seed = self.seed if seed is None else seed
        local_seed = _next_seed() if fixed_seed is None else fixed_seed
        return int(self.strategy.broadcast_object(local_seed))

    def describe(self, batch_size: int | None) -> str:
        """Returns a line that says which strategy was chosen, why, and how a batch is split.

        Args:
            batch_size: Number of examples of a full global batch, if known.
        """
        split = self.strategy.describe(batch_size)
        return f"tfdist: {self.strategy.name} ({self.reason}): {split}"


@dataclass
class _SeedSequence:
    """The random state at the last `fit`, and the number of seeds derived from it."""

    state: Any = None
    generator: Any = None
    fits: int = 0


def _next_seed() -> int:
    """Derives a new seed from the state of Python's generator, without advancing it.

    Keras draws initial weights from that generator, and the `fit` of Keras draws nothing
    from it. If the script seeds the generator again, the sequence starts again.
    """
    state, generator = random.getstate(), _keras.generator()
    if state != _seeds.state or generator is not _seeds.generator:
        _seeds.state, _seeds.generator, _seeds.fits = state, generator, 0
    text = f"{state} {_seeds.fits}"
    _seeds.fits += 1
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


_seeds = _SeedSequence()
_sessions: dict[Any, Session] = {}
_current: Session | None = None


def init(
    strategy: Any = "auto",
    seed: int | None = None,
    *,
    hang_limit: float | None = None,
    on_hang: str | None = None,
) -> Session:
    """Connects this process to its peers and gives every worker the same seed.

    `tfdist run` calls it before the script. If something else starts your script on several
    workers (a TF_CONFIG from Kubernetes, `srun`), call it right after the imports: a worker
    must connect before TensorFlow does anything else in it. In a single process you need it
    only to set a seed. `fit` calls it if you did not.

    Args:
        strategy: "auto", a name ("single", "mirrored", "multi_worker", "horovod",
            "parameter_server", "tpu"), or an instance of `tf.distribute.Strategy`,
            `tfdist.Horovod`, `tfdist.ParameterServer`, `tfdist.Zero`,
            `tfdist.ModelParallel` or `keras.distribution.ModelParallel`. "auto" keeps the
            strategy that this process has; the first call chooses one that fits the
            environment.
        seed: Seeds Python, NumPy, Keras and TensorFlow, and the sampler of `fit`. With None
            a single process keeps the seeds that it has, and the workers of a cluster take
            a random seed from the chief.
        hang_limit: Seconds without progress after which a report says where each worker
            is; 0 for never. None for TFDIST_HANG_LIMIT, else 60.
        on_hang: "end" to end the run then, or "report" only to report. None for
            TFDIST_ON_HANG, else "end".

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
    _current = _begin(without_distribution(strategy), seed)
    _check_devices(strategy, _current)
    return _current


def _begin(strategy: Any, seed: int | None) -> Session:
    if isinstance(strategy, Zero | ModelParallel):
        _sessions[strategy] = replace(_begin(strategy.on, seed), zero=strategy)
        return _sessions[strategy]
    cluster = Cluster.from_environment()
    zero: Zero | ModelParallel | None = of_environment() or mesh_of_environment()
    key: Any
    # A process connects once, so it keeps its strategy.
    if isinstance(strategy, str) and strategy == "auto" and _current is not None:
        chosen, reason, zero = _current.strategy, _current.reason, _current.zero
        key = next(key for key, past in _sessions.items() if past.strategy is chosen)
    elif isinstance(strategy, str):
        cls, reason = strategies.choose(strategy, cluster)
        key = cls.name
        chosen = _sessions[key].strategy if key in _sessions else _make(cls, cluster)
    else:
        key, reason = strategy, "as passed"
        chosen = _sessions[key].strategy if key in _sessions else _adopt(strategy)
    # A script that seeds its workers itself gives them the same seed: keep that one.
    is_seeded = _keras.is_seeded()
    if seed is not None or (chosen.place.num_workers > 1 and not is_seeded):
        new_seed = random.SystemRandom().getrandbits(31) if seed is None else seed
        keras.utils.set_random_seed(int(chosen.broadcast_object(new_seed)))
    _sessions[key] = Session(chosen, reason, seed, zero)
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
    """Returns the session of a strategy, and begins one if there is none.

    Args:
        strategy: As in `init`. "auto" is the strategy that `init` chose, if it was called.

    Raises:
        StrategyError: Keras was asked for other devices.
    """
    session = _session(without_distribution(strategy))
    _check_devices(strategy, session)
    return session


def is_left_open(strategy: Any) -> bool:
    """Tells whether tfdist chooses what connects the replicas.

    Args:
        strategy: As in `init`.

    Example:
        >>> is_left_open("auto"), is_left_open(Zero(on="mirrored"))
        (True, False)
    """
    connecting = strategy.on if isinstance(strategy, Zero | ModelParallel) else strategy
    return isinstance(connecting, str) and connecting == "auto"


def connected_by(strategy: Any, connecting: Any) -> Any:
    """Replaces what connects the replicas; what is in parts stays so.

    Args:
        strategy: As in `init`.
        connecting: What connects them from now on, as in `init`.

    Returns:
        The value to pass as `strategy`.
    """
    if isinstance(strategy, Zero | ModelParallel):
        return replace(strategy, on=connecting)
    return connecting


def _check_devices(strategy: Any, session: Session) -> None:
    for asked in (strategy, session.zero):
        check_devices(asked, session.strategy.place.num_replicas)


def _session(strategy: Any) -> Session:
    if isinstance(strategy, str) and strategy == "auto":
        return init() if _current is None else _current
    session = _sessions.get(strategy)
    if session is not None:
        return session
    if _current is None:
        return init(strategy)
    return _begin(strategy, _current.seed)


def is_chief() -> bool:
    """Returns whether this process writes files.

    Returns:
        True in a single process, and on exactly one worker of a cluster.

    Example:
        >>> import tfdist
        >>> if tfdist.is_chief():
        ...     print("saved once")
        saved once
    """
    return current().is_chief
