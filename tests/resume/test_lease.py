"""The lease of a checkpoint directory, with real processes as its owners."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.jobs import ROOT
from tfdist.cluster import process_ids
from tfdist.errors import CheckpointError
from tfdist.resume.checkpoint import lease
from tfdist.resume.checkpoint.lease import Lease, Owner

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEWED_EVERY_S", 0.05)
    monkeypatch.setattr(lease, "EXPIRES_AFTER_S", 0.6)
    monkeypatch.setattr(lease, "UNREADABLE_S", 0.2)
    monkeypatch.setattr(lease, "ENDS_WITHIN_S", 0.3)
    monkeypatch.setattr(lease, "_POLL_S", 0.02)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    sleeps = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield sleeps
    sleeps.kill()
    sleeps.wait()


def owned(directory: Path, owner: Owner) -> None:
    (directory / ".lease").write_text(json.dumps(asdict(owner)))


def of(process: subprocess.Popen[bytes]) -> Owner:
    started = process_ids.started(process.pid)
    return replace(Owner.here(), pid=process.pid, started=started)


def test_a_process_that_lives_keeps_it_and_one_that_ended_does_not(tmp_path, process) -> None:
    owned(tmp_path, of(process))
    with pytest.raises(CheckpointError, match=rf"to which process {process.pid} on .* writes"):
        Lease(tmp_path).take()
    process.kill()  # not yet waited for: a zombie writes nothing
    mine = Lease(tmp_path)
    mine.take()
    mine.check()
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_another_process_of_the_same_number_does_not_count(tmp_path, process) -> None:
    owned(tmp_path, replace(of(process), started="1"))
    Lease(tmp_path).take()


def test_an_owner_elsewhere_has_it_until_it_is_silent(tmp_path, capsys) -> None:
    elsewhere = replace(Owner.here(), host="far", kernel="another")
    owned(tmp_path, elsewhere)
    begun = time.monotonic()
    late = Lease(tmp_path)
    late.take()
    assert time.monotonic() - begun > 0.6
    assert "process" in (told := capsys.readouterr().err)
    assert "on far has used" in told
    late.release()

    first = Lease(tmp_path)
    first.take()
    with first.renewed():
        owner = Owner(**json.loads((tmp_path / ".lease").read_text()))
        owned(tmp_path, replace(owner, kernel="another"))
        with pytest.raises(CheckpointError, match="One training at a time"):
            Lease(tmp_path).take()
        first.check()
    assert list(tmp_path.iterdir()) == []


def test_who_has_lost_it_may_not_write_nor_remove_it(tmp_path) -> None:
    first, second = Lease(tmp_path), Lease(tmp_path)
    with pytest.raises(CheckpointError, match="directory that can be written"):
        Lease(tmp_path / "none").take()
    first.take()
    (tmp_path / ".lease").unlink()  # by a user who tidies up: it is taken again
    first.check()
    second.take()  # in one process, a second `fit` after one that failed
    with first.renewed():
        with pytest.raises(CheckpointError, match="has taken"):
            first.check()
        time.sleep(0.2)
    second.check()


def test_two_trainings_of_one_process_do_not_share_it(tmp_path) -> None:
    first, second = Lease(tmp_path), Lease(tmp_path)
    first.take()
    with first.renewed():
        with pytest.raises(CheckpointError, match="another `fit` of this process writes"):
            second.take()
        first.check()
    second.take()
    with second.renewed():
        (tmp_path / ".lease").unlink()
        tmp_path.rmdir()
        tmp_path.touch()  # what then fails to be removed must not hide what training raises


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"token": 1}'])
def test_a_file_that_makes_no_sense_expires_soon(content, tmp_path, capsys) -> None:
    (tmp_path / ".lease").write_bytes(content)
    begun = time.monotonic()
    late = Lease(tmp_path)
    late.take()
    assert time.monotonic() - begun < 0.5
    assert "/.lease' is empty or damaged" in capsys.readouterr().err
    (tmp_path / ".lease").write_bytes(content)
    late.check()  # it is damaged under a training, which writes it again
    (tmp_path / ".lease").write_bytes(content)
    with late.renewed(), pytest.raises(CheckpointError, match="One training at a time"):
        Lease(tmp_path).take()


def test_a_stopped_owner_is_said_to_be_stopped(tmp_path, process) -> None:
    owned(tmp_path, of(process))
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    with pytest.raises(CheckpointError, match="stopped, by SIGSTOP say"):
        Lease(tmp_path).take()


RACE = """
import importlib.util, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("lease", sys.argv[1])
lease = importlib.util.module_from_spec(spec)
sys.modules["lease"] = lease
spec.loader.exec_module(lease)
lease.ENDS_WITHIN_S, lease._POLL_S = 0.5, 0.001
while time.time() < float(sys.argv[3]):
    pass
mine = lease.Lease(Path(sys.argv[2]))
try:
    mine.take()
    time.sleep(1.5)
    mine.check()
    print("mine")
except lease.CheckpointError:
    print("not mine")
"""


def test_one_of_several_that_want_it_at_once_gets_it(tmp_path, process) -> None:
    owner = of(process)
    process.kill()
    process.wait()
    owned(tmp_path, owner)
    module = ROOT / "tfdist" / "resume" / "checkpoint" / "lease.py"
    command = [sys.executable, "-c", RACE, str(module), str(tmp_path), str(time.time() + 1.5)]
    racing = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(5)
    ]
    said = [racer.communicate(timeout=60)[0].strip() for racer in racing]
    assert sorted(said) == ["mine", *["not mine"] * 4]
