"""The launcher's standard output and standard error, which may have a slow reader or none."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

import click

from tfdist.launch.background_writer import STALLED_S, BackgroundWriter

_LAST_S = 2.0


@contextlib.contextmanager
def background(
    stream: TextIO, received: Sequence[int] = ()
) -> Iterator[BackgroundWriter | None]:
    """Writes to a stream in a thread while the context lasts.

    At its end it waits until everything is written, as long as the reader takes something.

    Args:
        stream: The stream, such as standard output.
        received: The signals sent to the launcher; a further signal ends the wait.

    Yields:
        The writer; None if the stream is not a file of the system.
    """
    writer = _writer(stream)
    if writer is None:
        yield None
        return
    try:
        yield writer
    finally:
        before = len(received)
        is_written = writer.wait(lambda: len(received) > before)
    if not is_written:
        say_last(
            "tfdist: the end of the output is left out: its reader takes nothing. "
            "--log-dir DIR keeps the whole output."
        )


def say_last(text: str) -> None:
    """Prints the launcher's last lines on standard error, but does not wait for ever for that.

    Args:
        text: One or more lines.
    """
    stream = sys.stderr
    writer = _writer(stream, _LAST_S)
    if writer is None:
        click.echo(text, err=True)
        return
    text = text if stream.isatty() else click.unstyle(text)
    writer.write(f"{text}\n".encode(stream.encoding or "utf-8", "replace"))
    writer.wait()


def _writer(stream: TextIO, stalled_s: float | None = None) -> BackgroundWriter | None:
    try:
        fd = stream.fileno()
    except (OSError, ValueError, AttributeError):  # of a test or a notebook
        return None
    stream.flush()
    return BackgroundWriter(fd, _dropped, _say_unwritable, stalled_s)


def _dropped(lines: int) -> str:
    return (
        f"tfdist: {lines} lines of output are left out here. Its reader took nothing for "
        f"{STALLED_S:g} s, or the disk was full. --log-dir DIR keeps the whole output."
    )


def _say_unwritable(error: OSError) -> None:
    """Called in the thread of the writer, the only one that this may hold up."""
    text = f"tfdist: warning: output cannot be written ({error.strerror}). Training goes on.\n"
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
