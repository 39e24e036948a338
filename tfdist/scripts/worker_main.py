"""What `tfdist run` starts in each worker: `python -m tfdist.scripts.worker_main SCRIPT`.

It ties the worker's life to the launcher's, makes the process a worker before TensorFlow
does anything, and then runs the user's script as Python itself would.
"""

from __future__ import annotations

import atexit
import gc
import os
import runpy
import signal
import sys
import threading
from contextlib import suppress
from types import TracebackType
from typing import NoReturn

from tfdist.cluster import heartbeat, launched_config
from tfdist.cluster.rendezvous import start_timeout, wait_until_up
from tfdist.errors import HUNG, START_ME_AGAIN, HungError, ServerLostError, TfdistError

_EXIT_HANDLERS_S = 3.0


def follow_launcher() -> None:
    """Makes this process and its children end when the launcher dies, however it dies.

    The launcher's end of a pipe is closed by the system even after kill -9. Does nothing in
    a process that no launcher started.
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
    """Takes this process's place in the cluster, as the launcher's variables say.

    Raises:
        TfdistError: The cluster is malformed, or the strategy cannot run here.
    """
    _import_tensorflow()
    import tfdist
    from tfdist.scripts import device_settings
    from tfdist.scripts.guard import guard
    from tfdist.scripts.own_strategies import claim

    _wait_for_meeting_place()
    strategy = tfdist.init(strategy=os.environ.get("TFDIST_STRATEGY", "auto")).strategy
    place = strategy.place
    launched_config.remember(place.num_workers > 1, place.is_chief)
    device_settings.explain(place.is_chief)
    if place.num_workers > 1 or strategy.has_servers:
        claim(strategy)
        guard(strategy)
    if os.environ.get("TFDIST_DROP_IN") == "1":
        tfdist.drop_in()
    # Once connected, TensorFlow's preemption notice catches SIGTERM and the worker lives on:
    # every run with a failure would take the launcher's whole grace. Seen with 2.21.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _wait_for_meeting_place() -> None:
    """Waits for the server at which Horovod's ranks meet: Horovod itself tries for 2 s."""
    host = os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR")
    port = os.environ.get("HOROVOD_GLOO_RENDEZVOUS_PORT")
    if host and port:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        wait_until_up({"the launcher of rank 0": address}, start_timeout())


def _import_tensorflow() -> None:
    """Imports TensorFlow, whose objects live as long as the process: none is ever garbage.

    Garbage collections would go through them all, again and again while a step is traced.
    """
    gc.disable()
    import tensorflow  # noqa: F401

    gc.freeze()
    gc.enable()


def run_script(arguments: list[str]) -> None:
    """Runs a script, or after `-m` a module, as `python` would.

    Args:
        arguments: The script, or `-m` and the module, and then its own arguments.
    """
    is_module = arguments[0] == "-m"
    target, *rest = arguments[1:] if is_module else arguments
    sys.argv = [target, *rest]
    if not sys.flags.safe_path:
        # In place of the working directory, which `python -m` put there.
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
        own = _own_frames(error.__traceback__)
        if _is_interrupt(error):
            # Every worker gets the Ctrl-C: a line each says enough, and where it was.
            place = (
                f" at {own.tb_frame.f_code.co_filename}, line {own.tb_lineno}" if own else ""
            )
            print(f"interrupted{place}", file=sys.stderr)
            _leave(130)
        sys.excepthook(type(error), error.with_traceback(own), own)
        statuses = ((ServerLostError, START_ME_AGAIN), (HungError, HUNG))
        _leave(next((status for kind, status in statuses if isinstance(error, kind)), 1))


def _leave(status: int) -> NoReturn:
    """Exits at once: TensorFlow's own shutdown would wait for peers that wait for us."""
    handlers = threading.Thread(target=atexit._run_exitfuncs, daemon=True)
    handlers.start()
    handlers.join(_EXIT_HANDLERS_S)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status & 0xFF)


def _own_frames(traceback: TracebackType | None) -> TracebackType | None:
    """Drops the frames that led to the user's script, if it came to that."""
    own = traceback
    while own is not None and own.tb_frame.f_code is not run_script.__code__:
        own = own.tb_next
    if own is None:
        return traceback
    own = own.tb_next
    while own is not None and "runpy" in own.tb_frame.f_code.co_filename:
        own = own.tb_next
    return own


def _is_interrupt(error: BaseException) -> bool:
    # A Ctrl-C in the middle of a TensorFlow call comes out as a RuntimeError that tells of it.
    return isinstance(error, KeyboardInterrupt) or "KeyboardInterrupt" in str(error)


if __name__ == "__main__":
    main()
