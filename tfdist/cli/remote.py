"""The program that `tfdist run --ssh` starts on another host: its `tfdist run`.

It reads one line with its task, and then only the end of its standard input: that is the end of
ssh, of the network or of the first launcher, and ends this one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from tfdist.cli.commands import main as command
from tfdist.launch import READY, SAVING_S

_STDIN = 0
_KILL_S = 30.0


def follow_input() -> None:
    """Ends this process when its standard input ends, in a thread."""

    def wait() -> None:
        while os.read(_STDIN, 1):  # not sys.stdin, whose lock Python needs when it ends
            pass
        os.kill(os.getpid(), signal.SIGTERM)  # its workers may save
        time.sleep(SAVING_S + _KILL_S)
        os.kill(os.getpid(), signal.SIGKILL)  # they end with it

    threading.Thread(target=wait, name="tfdist-follow-input", daemon=True).start()


def main() -> None:
    """Reads the task, and runs it."""
    with open(_STDIN, "rb", buffering=0, closefd=False) as stdin:
        line = stdin.readline()
    if not line.endswith(b"\n"):
        sys.exit("usage: tfdist run --hosts ... --ssh starts this program")
    task: dict[str, Any] = json.loads(line)
    os.environ.update(task["environment"])
    try:
        os.chdir(task["folder"])
    except OSError as error:
        sys.exit(
            "Error: all hosts must have the folder in which you start. Received: "
            f"{task['folder']!r} ({error.strerror}) on {socket.gethostname()}. Copy it there."
        )
    follow_input()
    print(READY, flush=True)
    command(args=["run", *task["arguments"]], prog_name="tfdist")


if __name__ == "__main__":
    main()
