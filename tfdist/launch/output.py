"""The output of workers: cut into lines, shown with their task, the last lines kept."""

from __future__ import annotations

import codecs
import os
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol, TextIO

import click

from tfdist.launch.background_writer import BackgroundWriter

_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "bright_cyan", "bright_magenta")
_STYLE = re.compile(r"\x1b\[[\d;:]*m")
# A cursor movement could leave the worker's own line.
_OTHER_ESCAPES = re.compile(
    r"\x1b\](?:[^\x07\x1b]*)(?:\x07|\x1b\\)|\x1b\[[0-?]*[ -/]*[@-ln-~]|\x1b[@-Z\\^_=>78]"
)
_MOST_LINES = 400
# A longer line is cut into lines of this length: what is not complete is looked at each time
# that something comes.
_MOST_CHARACTERS = 1 << 14
# The chief of parameter servers writes these hundreds of times when a worker is lost. The run
# recovers from that, and the launcher reports it in one line.
_LOST_WORKER_NOISE = re.compile(
    r"E\d{4} .*Failed to (?:register|remove) function remotely"
    r"|ERROR:tensorflow:(?:Worker|Remote function on worker) /job:"
    r"|Additional GRPC error information from remote target"
    r"|:UNKNOWN:Error received from peer"
    r"|This could happen if the remote target has been disconnected"
)
# TensorFlow writes these while it is imported, before it reads TF_CPP_MIN_LOG_LEVEL: notes,
# warnings, and three errors which only mean that a machine has no GPU or that two libraries
# register the same name.
_START_UP_NOISE = re.compile(
    r"WARNING: All log messages before absl::InitializeLog\(\)"
    r"|[IW]\d{4} \d\d:\d\d:[\d.]+ +\d+ [\w./-]+:\d+\] "
    r"|To enable the following instructions: .* rebuild TensorFlow"
    r"|E\d{4} .*(?:failed call to cuInit.*\(303\)|Unable to register cu\w+ (?:factory|plugin))"
)


def is_start_up_noise(line: str) -> bool:
    """Returns whether TensorFlow writes a line whenever it is imported."""
    return _START_UP_NOISE.match(line) is not None


def _is_noise(line: str) -> bool:
    return is_start_up_noise(line) or _LOST_WORKER_NOISE.match(line) is not None


def settled(line: str) -> str:
    r"""Returns a line as a terminal would show it after its progress bar was redrawn.

    Args:
        line: Text without a newline, perhaps with carriage returns and backspaces.

    Returns:
        The text last written over it, with its colours.

    Example:
        >>> settled("1/2\b\b\b\r2/2")
        '2/2'
    """
    shown = ""
    for part in line.split("\r"):
        if "\b" not in part:
            shown = part or shown
            continue
        written: list[str] = []
        # Backspaces at the end only move the cursor; they erase nothing.
        for character in part.rstrip("\b"):
            if character != "\b":
                written.append(character)
            elif written:
                written.pop()
        shown = "".join(written) or shown
    if "\r" in line:
        shown = shown.rstrip(" ")  # blanks over the end of a longer state
    return _OTHER_ESCAPES.sub("", shown)


def plain(text: str) -> str:
    """Returns text without colours."""
    return _STYLE.sub("", text)


class Log(Protocol):
    """A file for the whole output of a worker."""

    def write(self, data: bytes, /) -> object:
        """Writes output, in the end."""

    def close(self) -> None:
        """Ends the file."""


class LineSplitter:
    """Cuts the bytes of one worker into lines.

    Attributes:
        last: The last lines, without colours.
    """

    def __init__(self, log: Log | None = None, hide_start_up: bool = False) -> None:
        """Starts with nothing written.

        Args:
            log: A file that gets every byte.
            hide_start_up: Whether to leave out TensorFlow's messages about its own start.
        """
        self.last: deque[str] = deque(maxlen=_MOST_LINES)
        self._log = log
        self._hide_start_up = hide_start_up
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def feed(self, data: bytes) -> list[str]:
        """Takes output of the worker.

        Args:
            data: Some bytes, cut anywhere.

        Returns:
            The lines that are now complete, as a terminal would show them. Lines of more than
            16384 characters come in pieces.
        """
        if self._log is not None:
            self._log.write(data)
        *complete, rest = (self._rest + self._decoder.decode(data)).split("\n")
        # A progress bar redraws one line for a whole epoch: keep only the latest state.
        parts = rest.split("\r")
        written = [i for i, part in enumerate(parts) if part.strip("\b")]
        rest = "\r".join(parts[written[-1] if written else -1 :])
        *full, self._rest = _pieces(rest)
        lines = [piece for line in complete for piece in _pieces(settled(line))]
        lines += map(settled, full)
        if self._hide_start_up:
            lines = [line for line in lines if not _is_noise(line)]
        self.last.extend(map(plain, lines))
        return lines

    @property
    def unfinished(self) -> str:
        """The line that is not complete yet, as a terminal would show it."""
        return settled(self._rest)

    def finish(self) -> list[str]:
        """Ends the output, closes the log, and returns the unfinished line if there is one."""
        if self._log is not None:
            self._log.close()
            self._log = None
        rest = self.unfinished
        self._rest = ""
        if not rest:
            return []
        self.last.append(plain(rest))
        return [rest]


def _pieces(line: str) -> list[str]:
    """Cuts a line that is too long."""
    starts = range(0, len(line) or 1, _MOST_CHARACTERS)
    return [line[start : start + _MOST_CHARACTERS] for start in starts]


class Screen:
    """Writes the lines of all workers to one stream, one whole line after the other.

    On a terminal the chief's unfinished line, its progress bar, stays at the bottom.

    Attributes:
        has_explained_hiding: Whether a line has said that the lines of some workers are hidden.
    """

    def __init__(
        self,
        stream: TextIO,
        tasks: Sequence[str],
        environ: Mapping[str, str] = os.environ,
        writer: BackgroundWriter | None = None,
    ) -> None:
        """Prepares one prefix for each worker.

        Args:
            stream: The stream to write to.
            tasks: The workers' names.
            environ: The launcher's variables, of which NO_COLOR and TERM are read.
            writer: Writes to the stream in a thread; None to write to it at once.
        """
        self._stream, self._writer = stream, writer
        self.is_terminal = stream.isatty() and environ.get("TERM") != "dumb"
        self._coloured = self.is_terminal and not environ.get("NO_COLOR")
        self._bar = "│" if _can_encode(stream, "│") else "|"
        self._live = ""
        self.has_explained_hiding = False
        self.name(tasks)

    @property
    def is_full(self) -> bool:
        """Whether to show nothing more for a moment, since the reader is slow."""
        return self._writer is not None and self._writer.is_full

    def check(self) -> None:
        """Checks that somebody reads.

        Raises:
            BrokenPipeError: The reader of the output is gone, as after `tfdist run ... | head`.
        """
        if self._writer is not None and self._writer.is_broken:
            raise BrokenPipeError

    def name(self, tasks: Sequence[str]) -> None:
        """Changes the prefixes.

        Args:
            tasks: The workers' names.
        """
        width, bar = max(map(len, tasks)), self._bar
        self.prefix_width = width + 3
        self._prefixes = [
            click.style(f"{task:<{width}} {bar}", fg=_COLOURS[i % len(_COLOURS)])
            if self._coloured
            else f"{task:<{width}} {bar}"
            for i, task in enumerate(tasks)
        ]

    def show(self, worker: int, lines: Sequence[str], live: str | None = None) -> None:
        """Writes lines of one worker.

        Args:
            worker: The worker's position in `tasks`.
            lines: Whole lines.
            live: The worker's unfinished line, which stays at the bottom; None keeps the
                present one.
        """
        if not self.is_terminal:
            if lines:
                self._write("".join(self._line(worker, line) + "\n" for line in lines))
            return
        previous_live = self._live
        if live is not None:
            self._live = self._line(worker, _cut(live, self._columns())) if live else ""
        if not lines and previous_live == self._live:
            return
        text = "\r\x1b[K" if previous_live else ""
        self._write(text + "".join(self._line(worker, x) + "\n" for x in lines) + self._live)

    def close(self) -> None:
        """Ends the line at the bottom, if there is one."""
        if self._live:
            self._live = ""
            self._write("\n")

    def _columns(self) -> int:
        try:
            return max(
                10, os.get_terminal_size(self._stream.fileno()).columns - self.prefix_width
            )
        except OSError:
            return 80

    def _line(self, worker: int, line: str) -> str:
        if not self._coloured:
            line = plain(line)
        elif "\x1b[" in line:
            line += "\x1b[0m"
        return f"{self._prefixes[worker]} {line}" if line else self._prefixes[worker]

    def _write(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        if self._writer is not None:
            self._writer.write(text.encode(encoding, "replace"))
            return
        self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()


def _cut(text: str, columns: int) -> str:
    """Cuts a line to a width: a line that wraps could not be erased again."""
    room = columns - 1
    pieces: list[str] = []
    for piece in re.split(f"({_STYLE.pattern})", text.replace("\t", " ")):
        if _STYLE.fullmatch(piece):
            pieces.append(piece)
        else:
            pieces.append(piece[:room])
            room -= len(pieces[-1])
    return "".join(pieces)


def _can_encode(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
