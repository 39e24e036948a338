"""Watches the calls of `fit`, `evaluate` and `predict`, with one watcher a process."""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Iterator
from typing import Any

from tfdist.cluster import heartbeat, launched_config
from tfdist.cluster.evaluator import leave_training
from tfdist.errors import PeerError
from tfdist.watchdog.local import LocalStatus
from tfdist.watchdog.peers import STATUS_PREFIX
from tfdist.watchdog.progress import here
from tfdist.watchdog.settings import WatchdogSettings
from tfdist.watchdog.watcher import Watcher

_ERRORS_OF_LOSS = (
    "UnavailableError",
    "DeadlineExceededError",
    "AbortedError",
    "CancelledError",
)


_watcher: Watcher | None = None


_settings: WatchdogSettings | None = None


def configure(hang_limit: float | None = None, on_hang: str | None = None) -> None:
    """Changes the settings; without a call, the environment variables count.

    Args:
        hang_limit: Seconds; 0 switches the watcher off. None keeps the setting.
        on_hang: "end" or "report". None keeps the setting.
    """
    global _settings
    _settings = (_settings or WatchdogSettings.from_environment()).with_values(
        hang_limit, on_hang
    )
    if _watcher is not None:
        _watcher.settings = _settings
    # The launcher watches too: it sees processes that are stopped.
    ends = _settings.on_hang == "end"
    heartbeat.here.record_hang_limit(_settings.limit if ends else 0.0)


@contextlib.contextmanager
def calling(name: str, strategy: Any) -> Iterator[None]:
    """Watches a call of `fit`, `evaluate` or `predict`.

    Args:
        name: The function's name.
        strategy: The `Strategy` that it uses.

    Raises:
        HungError: A worker no longer answers.
        SystemExit: The process is an evaluator, and the function is `fit`.
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


def tell_end(strategy: Any) -> None:
    """Lets a process that ends before its first call tell the others, which may wait for it.

    Args:
        strategy: The `Strategy` that connects this process with the others.
    """
    worker = strategy.place.worker_index

    def post() -> None:
        if _watcher is None:  # otherwise the watcher does it
            with contextlib.suppress(Exception):  # the others may be gone
                store = strategy.key_value_store()
                store.post(f"{STATUS_PREFIX}/{worker}", LocalStatus().ended(worker).text())

    if strategy.place.num_workers > 1:
        atexit.register(post)


def meet() -> None:
    """Reads the status of the store's keeper; call it once all workers are in the same call."""
    if _watcher is not None:
        _watcher.meet()


def _is_loss(error: Exception) -> bool:
    """Returns whether a collective failed because another worker is lost."""
    if isinstance(error, PeerError):
        return True
    return type(error).__name__ in _ERRORS_OF_LOSS and type(error).__module__.startswith(
        "tensorflow"
    )
