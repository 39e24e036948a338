"""The program that `tfdist run` starts: `python -m tfdist.scripts.worker_main SCRIPT`.

It makes the process end with the launcher, and connects it before TensorFlow does anything
else. Then it runs the user's script as Python itself would.
"""

from __future__ import annotations

import atexit
import gc
import os
import runpy
import signal
import sys
import threading
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import NoReturn

from tfdist.cluster import heartbeat, launched_config
from tfdist.cluster.rendezvous import start_timeout, wait_until_up
from tfdist.cluster.warning_signals import survive_warnings
from tfdist.errors import (
    HUNG,
    START_ME_AGAIN,
    HungError,
    ServerLostError,
    StrategyError,
    TfdistError,
)

_EXIT_HANDLERS_S = 3.0
_for_good = ExitStack()  # contexts that last as long as the process


def follow_launcher() -> None:
    """Ends this process and its children when the launcher ends, for whatever reason.

    The system closes the launcher's end of a pipe even after kill -9. If no launcher has
    started this process, the function does nothing.
    """
    text = os.environ.pop("TFDIST_LAUNCHER_FD", None)
    if text is None:
        return
    fd = int(text)
    os.set_inheritable(fd, False)

    def wait() -> None:
        with suppress(OSError):
            while os.read(fd, 1):
                pass
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="tfdist-follow-launcher", daemon=True).start()


def become_worker() -> None:
    """Connects this process to the cluster that the launcher's variables describe.

    Raises:
        TfdistError: The cluster is malformed, or the strategy cannot run here.
    """
    _import_tensorflow()
    import tfdist
    from tfdist import watchdog
    from tfdist.scripts import device_settings
    from tfdist.scripts.guard import guard
    from tfdist.scripts.own_strategies import claim

    _wait_for_rendezvous()
    strategy = tfdist.init(strategy=os.environ.get("TFDIST_STRATEGY", "auto")).strategy
    place = strategy.place
    watchdog.tell_end(strategy)
    launched_config.remember(place.num_workers > 1, place.is_chief)
    device_settings.explain(place.is_chief)
    if place.num_workers > 1 or strategy.has_servers:
        claim(strategy)
        guard(strategy)
    if os.environ.get("TFDIST_DROP_IN") == "1":
        tfdist.drop_in()
        _defer_weights()
    # In a connected process, TensorFlow 2.21's preemption notifier catches SIGTERM, and the
    # worker goes on. Then the launcher would wait for its whole grace period after a failure.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _defer_weights() -> None:
    """Lets models be built in parts for `--zero 3`, until this process ends."""
    from tfdist.sharding.deferred import deferred_weights
    from tfdist.strategies.session import current

    session = current()
    if session.strategy.place.num_workers > 1 and getattr(session.zero, "stage", 1) == 3:
        _for_good.enter_context(deferred_weights())


def _wait_for_rendezvous() -> None:
    """Waits for the rendezvous server of Horovod's ranks. Horovod itself waits only 2 s."""
    host = os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR")
    port = os.environ.get("HOROVOD_GLOO_RENDEZVOUS_PORT")
    if not host or not port:
        return
    address = host.partition("/")[0]  # the secret of the run may follow it, after the port
    address = address if ":" in address else f"{address}:{port}"
    wait_until_up({"the launcher of rank 0": address}, start_timeout())
    from tfdist.strategies.horovod.store import refuses

    if refuses(f"{host}:{port}"):
        raise StrategyError(
            "All ranks must know the secret of the server at which they meet. Received: the "
            f"launcher of rank 0 at {address} refuses this rank's. Set TFDIST_TOKEN to the "
            "same secret for all launchers."
        )


def _import_tensorflow() -> None:
    """Imports TensorFlow, and excludes its objects from garbage collection.

    They live as long as the process. Otherwise each collection would visit them all, many
    times while a step is traced.
    """
    gc.disable()
    import tensorflow  # noqa: F401

    gc.freeze()
    gc.enable()


def run_script(arguments: list[str]) -> None:
    """Runs a script, or with `-m` a module, as `python` would.

    Args:
        arguments: The script, or `-m` and the module, followed by its arguments.
    """
    is_module = arguments[0] == "-m"
    target, *rest = arguments[1:] if is_module else arguments
    sys.argv = [target, *rest]
    if not sys.flags.safe_path:
        # Replaces the working directory, which `python -m` has put there.
        sys.path[0] = os.getcwd() if is_module else os.path.dirname(os.path.realpath(target))
    if is_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(target, run_name="__main__")


def main() -> None:
    """Runs the worker whose script and arguments are in `sys.argv`."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m tfdist.scripts.worker_main [-m] script.py [args]")
    follow_launcher()
    survive_warnings()
    heartbeat.share_with_launcher()
    arguments = sys.argv[1:]
    try:
        try:
            become_worker()
        except TfdistError as error:
            print(f"Error: {error}", file=sys.stderr)
            _leave(1)
        run_script(arguments)
    except SystemExit as error:
        if error.code is None or error.code == 0:
            raise
        if not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        _leave(error.code if isinstance(error.code, int) else 1)
    except BaseException as error:
        traceback = _script_frames(error.__traceback__)
        if _is_interrupt(error):
            # Every worker gets the Ctrl-C, so each prints a single line.
            place = ""
            if traceback is not None:
                file = traceback.tb_frame.f_code.co_filename
                place = f" at {file}, line {traceback.tb_lineno}"
            print(f"interrupted{place}", file=sys.stderr)
            _leave(130)
        sys.excepthook(type(error), error.with_traceback(traceback), traceback)
        statuses = ((ServerLostError, START_ME_AGAIN), (HungError, HUNG))
        _leave(next((status for kind, status in statuses if isinstance(error, kind)), 1))


def _leave(status: int) -> NoReturn:
    """Exits at once. TensorFlow's shutdown would wait for peers, which wait for this worker."""
    handlers = threading.Thread(target=atexit._run_exitfuncs, daemon=True)
    handlers.start()
    handlers.join(_EXIT_HANDLERS_S)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status & 0xFF)


def _script_frames(traceback: TracebackType | None) -> TracebackType | None:
    """Drops the frames above the user's script, if the error came from the script."""
    frame = traceback
    while frame is not None and frame.tb_frame.f_code is not run_script.__code__:
        frame = frame.tb_next
    if frame is None:
        return traceback
    frame = frame.tb_next
    while frame is not None and "runpy" in frame.tb_frame.f_code.co_filename:
        frame = frame.tb_next
    return frame


def _is_interrupt(error: BaseException) -> bool:
    # A Ctrl-C during a call of TensorFlow becomes a RuntimeError with this text.
    return isinstance(error, KeyboardInterrupt) or "KeyboardInterrupt" in str(error)


if __name__ == "__main__":
    main()
