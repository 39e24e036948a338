"""Calls of `fit`, `evaluate` and `predict`, watched by this process's one watcher."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tfdist.cluster import launched_config
from tfdist.cluster.evaluator import leave_training
from tfdist.errors import PeerError
from tfdist.watchdog.progress import here
from tfdist.watchdog.settings import Settings
from tfdist.watchdog.watcher import Watcher

_BROKEN_OFF = ("UnavailableError", "DeadlineExceededError", "AbortedError", "CancelledError")


_watcher: Watcher | None = None


_settings: Settings | None = None


def configure(hang_limit: float | None = None, on_hang: str | None = None) -> None:
    """Sets what the environment does not, or otherwise.

    Args:
        hang_limit: Seconds; 0 switches the watcher off.
        on_hang: "end" or "report".
    """
    global _settings
    _settings = (_settings or Settings.from_environment()).changed(hang_limit, on_hang)
    if _watcher is not None:
        _watcher.settings = _settings


@contextlib.contextmanager
def calling(name: str, strategy: Any) -> Iterator[None]:
    """Watches a call of `fit`, `evaluate` or `predict`.

    Args:
        name: Of the function.
        strategy: The `Strategy` that it uses.

    Raises:
        HungError: A worker did not answer any more.
        SystemExit: An evaluator has come to `fit`.
    """
    global _watcher
    if name == "fit":
        leave_training()
    configure()
    assert _settings is not None
    place = strategy.place
    several = place.num_workers > 1
    launched_config.restore(alone=not several)
    if _watcher is None and _settings.limit:
        _watcher = Watcher(_settings)
    if _watcher is not None:
        store = strategy.key_value_store() if several else None
        _watcher.move(place.worker_index, place.num_workers, store, strategy.silent)
    with here.calling(name, alone=not several):
        try:
            yield
        except Exception as error:
            hung = None
            if _watcher is not None and several and _is_loss(error):
                hung = _watcher.explain(error)
            if hung is None:
                raise
            raise hung from None


def meet() -> None:
    """Gets to know the other workers, once all of them have called the same function."""
    if _watcher is not None:
        _watcher.meet()


def _is_loss(error: Exception) -> bool:
    """Tells whether a collective was broken off."""
    if isinstance(error, PeerError):
        return True
    return type(error).__name__ in _BROKEN_OFF and type(error).__module__.startswith(
        "tensorflow"
    )
