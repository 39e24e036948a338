"""Describes the Python stack of another thread: the user's frames, then the innermost frame."""

from __future__ import annotations

import linecache
import os
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_TFDIST_FOLDER = str(Path(__file__).parent.parent)
_LIBRARIES = tuple(
    os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")
)
_DEBUGGERS = ("bdb", "pdb", "ipdb", "pydevd", "pydevd_frame", "_pydevd_bundle", "debugpy")
_TRACERS = ("trace_function", "_maybe_define_function", "_create_concrete_function")
_MOST = 8


def main_frame() -> FrameType | None:
    """Returns the innermost frame of the main thread."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def describe(frame: FrameType | None) -> list[str]:
    """Describes the stack of a thread.

    Args:
        frame: The innermost frame.

    Returns:
        The user's frames, innermost first; then the innermost frame if it is not the user's.
    """
    frames = list(_outwards(frame))
    lines = [_line(f) for f in frames if _is_users(f)][:_MOST]
    if frames and not _is_users(frames[0]):
        lines.append(f"(inside {_line(frames[0], with_text=False)})")
    return lines


def other_threads() -> list[str]:
    """Describes the stacks of other threads that run a user's code, such as a generator."""
    skipped = {threading.main_thread().ident, threading.get_ident()}
    lines_of_all = []
    for thread, frame in sys._current_frames().items():
        lines = [_line(f) for f in _outwards(frame) if _is_users(f)][:_MOST]
        if lines and thread not in skipped:
            lines_of_all += [f"in another thread: {lines[0]}", *lines[1:]]
    return lines_of_all


def callback(frame: FrameType | None) -> tuple[str, bool] | None:
    """Names the Keras callback that is running, with its method.

    Args:
        frame: The innermost frame of the thread.

    Returns:
        The name, and whether the callback is tfdist's own; None if no callback is running.
    """
    for caller in _outwards(frame):
        name = caller.f_code.co_name
        if name.startswith("on_"):
            classes = type(caller.f_locals.get("self")).__mro__
            kinds = [c.__name__ for c in classes if c.__module__.startswith("keras.")]
            if "Callback" in kinds and "CallbackList" not in kinds:
                is_own = classes[0].__module__.startswith("tfdist.")
                return f"{classes[0].__name__}.{name}", is_own
    return None


def is_tracing(frame: FrameType | None) -> bool:
    """Returns whether TensorFlow is tracing a Python function.

    Args:
        frame: The innermost frame of the thread.
    """
    return any(
        f.f_code.co_name in _TRACERS and f.f_code.co_filename.endswith("tracing_compilation.py")
        for f in _outwards(frame)
    )


def is_debugged(frame: FrameType | None) -> bool:
    """Returns whether a debugger holds the thread, or traces this process from outside.

    Args:
        frame: The innermost frame of the thread.
    """
    for caller in _outwards(frame):
        module = str(caller.f_globals.get("__name__", "")).partition(".")[0]
        if module in _DEBUGGERS or caller.f_trace is not None:
            return True
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return False
    tracer = [line.split()[1] for line in status.splitlines() if line.startswith("TracerPid")]
    return tracer not in ([], ["0"])


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_users(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    if name.startswith("<"):
        return name.startswith(("<stdin>", "<ipython"))
    path = os.path.realpath(name)
    return not path.startswith((_TFDIST_FOLDER, *_LIBRARIES)) and "site-packages" not in path


def _line(frame: FrameType, with_text: bool = True) -> str:
    name, number = frame.f_code.co_filename, frame.f_lineno
    text = linecache.getline(name, number).strip() if with_text else ""
    for folder in (os.getcwd(), *_LIBRARIES[::-1]):
        if name.startswith(folder + os.sep):
            name = os.path.relpath(name, folder)
            break
    where = f"{name}:{number} in {frame.f_code.co_name}"
    return f"{where}: {text[:100]}" if text else where
