"""The look for what a test leaves behind sees each kind of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from tests import leftovers
from tests.leftovers import Surroundings

pytestmark = pytest.mark.quick


def test_each_kind_is_seen_and_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "_PATIENCE_S", 0.0)
    before = Surroundings.now()
    over = threading.Event()
    thread = threading.Thread(target=over.wait, args=(30,), name="forgotten")
    # Its child is an orphan at once.
    orphan = "import subprocess as s; print(s.Popen(['sleep', '60'], stdout=s.DEVNULL).pid)"
    with socket.socket() as listening:
        thread.start()
        pid = int(subprocess.check_output([sys.executable, "-c", orphan], timeout=20))
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FORGOTTEN", "1")
            found = before.left()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    over.set()
    thread.join()
    assert found == [
        "variable FORGOTTEN",
        "thread forgotten",
        f"process {pid}: sleep 60",
        f"port {port}",
    ]
    assert before.left() == []
