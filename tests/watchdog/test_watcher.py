"""The watcher's parts: limits, stacks, memory, and causes from what workers say."""

from __future__ import annotations

import atexit
import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.jobs import ROOT
from tfdist.errors import HUNG, ArgumentError
from tfdist.launch.cause import Failure
from tfdist.launch.worker import Worker
from tfdist.strategies.base import Place
from tfdist.strategies.connected import Connected
from tfdist.training.stragglers import StragglerCallback
from tfdist.watchdog import calls, diagnosis, memory, progress, stacks
from tfdist.watchdog.diagnosis import LostWorker
from tfdist.watchdog.local import LocalStatus
from tfdist.watchdog.messages import ENDED, HangRequest, StatusMessage
from tfdist.watchdog.peers import PeerStatuses
from tfdist.watchdog.progress import BETWEEN, OUTSIDE, START, STEP, Progress
from tfdist.watchdog.settings import WatchdogSettings
from tfdist.watchdog.watcher import Watcher

pytestmark = pytest.mark.quick


def note(worker: int, **values: Any) -> StatusMessage:
    usual: dict[str, Any] = {
        "at": STEP, "call": "fit", "number": 2, "step": 7, "idle": 70.0, "limit": 60.0
    }  # fmt: skip
    return StatusMessage(worker, f"worker {worker}", **{**usual, **values})


def first_cause(*notes: StatusMessage, lost: dict[int, LostWorker] | None = None) -> Any:
    return diagnosis.causes(dict(enumerate(notes)), lost or {})[0]


@pytest.mark.parametrize(
    ("other", "words", "certain"),
    [
        ({"at": OUTSIDE, "limit": 0.0}, "worker 1 has left `fit`", True),
        ({"at": OUTSIDE, "number": 1}, "it has made 1 call, and they 2", True),
        ({"at": ENDED}, "The script of worker 1 has ended, after 2 calls", True),
        ({"at": START, "number": 3, "call": "evaluate"}, "different functions", True),
        ({"at": BETWEEN, "is_exchanging": True, "phase": "X.on_epoch_end"}, "callback", True),
        (
            {"at": BETWEEN, "is_exchanging": True, "ends_epoch": True},
            "The data of worker 1 has ended before step 7, in which worker 0 waits.",
            True,
        ),
        ({"waits_for_data": True}, "worker 1 waits for its data", False),
        ({"left_mib": 30, "all_mib": 4000, "used_mib": 3000}, "out of memory", False),
        ({"at": BETWEEN, "phase": "in X.on_epoch_end", "idle": 999.0}, "X.on_epoch_end", False),
        ({"step": 6}, "worker 1 is behind, in step 6", False),
        ({}, "No known cause", False),
    ],
)
def test_causes(other: dict[str, Any], words: str, certain: bool) -> None:
    cause = first_cause(note(0), note(1, **other))
    assert words in cause.text
    assert cause.certain == certain


@pytest.mark.parametrize(
    ("state", "words", "certain"),
    [
        ("T", "is stopped (SIGSTOP", True),
        (None, "has ended", True),
        ("R", "interpreter lock", False),
        ("?", "cannot be reached", False),
    ],
)
def test_workers_that_do_not_answer(state: str | None, words: str, certain: bool) -> None:
    lost = {1: LostWorker(20.0, state)}
    cause = first_cause(note(0), note(1, pid=4), lost=lost)
    assert words in cause.text
    assert cause.certain == certain
    assert "does not answer, for 20 s" in diagnosis.report({0: note(0), 1: note(1)}, lost)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"at": BETWEEN, "limit": 600.0}, True),  # a callback within its own limit
        ({"idle": 1.0}, True),  # it has just come
        ({"is_debugged": True}, True),
        ({}, False),
        ({"at": OUTSIDE, "idle": 1.0}, False),
    ],
)
def test_what_is_no_hang(other: dict[str, Any], expected: bool) -> None:
    assert diagnosis.goes_on({0: note(0), 1: note(1, **other)}, {}) is expected


def test_nobody_is_certain_while_the_others_end_their_call() -> None:
    """The chief saves at the end of training, and another has returned already."""
    saving = note(0, at=BETWEEN, idle=100.0, limit=600.0)
    found = diagnosis.causes({0: saving, 1: note(1, at=OUTSIDE)}, {})
    assert not any(cause.certain for cause in found)


def test_notes_come_back_also_from_another_version() -> None:
    given = note(3, stack=("a", "b"))
    assert StatusMessage.read(given.text()) == given
    assert StatusMessage.read(given.text().replace('"idle"', '"new"')) == replace(
        given, idle=0.0
    )


def test_limits_are_learned() -> None:
    settings = WatchdogSettings.from_environment({})
    assert settings == WatchdogSettings(60.0, "end")
    assert settings.limit_of(STEP, None) == settings.limit_of(STEP, 2.0) == 60
    assert settings.limit_of(STEP, 10.0) == 200
    assert settings.limit_of(BETWEEN, 10.0) == 600
    assert settings.end_of(STEP, None) == 600
    changed = settings.with_values(0, "report")
    assert changed == WatchdogSettings(0.0, "report")
    for wrong in ({"TFDIST_HANG_LIMIT": "-1"}, {"TFDIST_ON_HANG": "stop"}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            WatchdogSettings.from_environment(wrong)
    with pytest.raises(ArgumentError, match="hang_limit"):
        settings.with_values(float("nan"), None)


def test_a_step_without_a_call_leaves_nothing_behind() -> None:
    here = Progress()
    seen: list[str] = []
    step = here.recording(lambda data: seen.append(here.at), "training")
    step(SimpleNamespace(steps_taken=0, begins=True))
    assert (seen, here.at) == (["first step"], OUTSIDE)


@pytest.mark.parametrize(("fails", "times"), [(False, 1), (True, 0)])
def test_a_run_that_ends_right_after_its_report_went_on(
    fails: bool, times: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = progress.here.at
    watching = Watcher(WatchdogSettings(limit=0.1, on_hang="report"))

    def step(data: Any) -> None:
        time.sleep(2.0)  # longer than the limit of a first step
        if fails:
            raise ValueError("mine")

    monkeypatch.setattr(progress.here, "call", None)
    with contextlib.suppress(ValueError), progress.here.calling("fit", alone=True):
        progress.here.recording(step, "training")(SimpleNamespace(steps_taken=0, begins=False))
    watching.close()
    printed = capfd.readouterr().err
    assert printed.count("tfdist: the run hangs: ") == 1, printed
    assert printed.count("tfdist: the run goes on.") == times
    assert progress.here.at == at


def test_progress_of_nested_calls() -> None:
    here = Progress()
    with here.calling("fit", alone=False) as outer:
        for made in range(5):
            epoch = SimpleNamespace(steps_taken=made, begins=made == 0)
            here.recording(lambda data: None, "training")(epoch)
        assert (outer.step, here.at) == (5, BETWEEN)
        with here.calling("evaluate", alone=False):
            assert here.at == START
        assert (here.call, here.at) == (outer, BETWEEN)
        assert here.median is not None
    assert (here.at, here.calls) == (OUTSIDE, 2)


class Pair(Connected):
    """Two processes, of which the other says the same."""

    name = "pair"
    place = Place(2, 0, 1, 2, 0)

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    @classmethod
    def unavailable(cls, cluster: Any) -> None:
        return None

    def broadcast_bytes(self, content: bytes) -> bytes:
        return content

    def gather_bytes(self, content: bytes) -> list[bytes]:
        self.seen.append(LocalStatus().now(0, WatchdogSettings()).phase)
        return [content, content]


def test_what_goes_on_between_steps_is_marked() -> None:
    pair = Pair()
    with progress.here.calling("fit", alone=False):
        assert pair.gather_objects(3) == [3, 3]
        with progress.here.while_doing(progress.SAVING):
            phase = LocalStatus().now(0, WatchdogSettings()).phase
        after = LocalStatus().now(0, WatchdogSettings()).phase
    start = "`fit`, before its first step: "
    assert pair.seen == [f"{start}exchanging settings with the others"]
    assert phase == f"{start}saving a checkpoint"
    assert "exchanging" not in after
    assert "saving" not in after


def test_stacks_show_a_users_frames_first() -> None:
    ready, go = threading.Event(), threading.Event()

    class Mine(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            ready.set()
            go.wait(20)

    thread = threading.Thread(target=Mine().on_epoch_end, args=(0,))
    thread.start()
    ready.wait(20)
    time.sleep(0.1)
    frame = sys._current_frames()[thread.ident or 0]
    lines = stacks.describe(frame)
    named, debugged = stacks.callback(frame), stacks.is_debugged(frame)
    others = stacks.other_threads()
    go.set()
    thread.join()
    here = Path(__file__).relative_to(ROOT)
    assert lines[0].endswith("in on_epoch_end: go.wait(20)"), lines
    assert here.name in lines[0]
    assert lines[-1].startswith("(inside threading.py:")
    assert named == ("Mine.on_epoch_end", False)
    assert not debugged
    assert any("in another thread" in line and "on_epoch_end" in line for line in others)


def test_a_callback_of_tfdist_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = []

    class Timers:
        def read(self) -> None:
            statuses.append(LocalStatus().now(0, WatchdogSettings()))
            raise KeyError

    monkeypatch.setattr(progress.here, "at", BETWEEN)
    monkeypatch.setattr(progress.here, "call", progress.LoopCall("fit", 1, False, 7))
    callback = StragglerCallback(None, Timers(), shows=False, log_dir=None)
    with pytest.raises(KeyError), progress.here.while_doing(progress.EXCHANGING):
        callback.on_epoch_end(0)
    (status,) = statuses
    assert (status.phase, status.ends_epoch) == ("`fit`, at the end of its epoch", True)


def test_a_script_that_ends_before_its_first_call_tells_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    posted: dict[str, str] = {}
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    monkeypatch.setattr(calls, "_watcher", None)
    monkeypatch.setattr(progress.here, "calls", 0)
    store = SimpleNamespace(post=posted.__setitem__)
    place = SimpleNamespace(worker_index=1, num_workers=2)
    calls.tell_end(SimpleNamespace(place=place, key_value_store=lambda: store))
    at_exit[0]()
    status = StatusMessage.read(posted["watch/1"])
    waiting = StatusMessage(0, "worker 0", at=START, call="fit", number=1, is_exchanging=True)
    (cause,) = diagnosis.causes({0: waiting, 1: status}, {})
    assert "worker 1 has ended, after 0 calls, while worker 0 is in `fit`" in cause.text
    assert cause.certain


def test_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc, group = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    group.mkdir()
    monkeypatch.setattr(memory, "PROC", proc)
    monkeypatch.setattr(memory, "CGROUP", group)
    assert memory.left_mib() is memory.used_mib() is None
    (proc / "self" / "status").write_text("VmRSS:   2048 kB\n")
    (proc / "meminfo").write_text("MemTotal: 8192000 kB\nMemAvailable: 4096000 kB\n")
    assert memory.used_mib() == 2
    assert memory.left_mib() == (4000, 8000)
    (group / "memory.max").write_text("max\n")
    assert memory.left_mib() == (4000, 8000)
    (group / "memory.max").write_text(str(100 * 2**20))
    (group / "memory.current").write_text(str(90 * 2**20))
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {30 * 2**20}\n")
    assert memory.left_mib() == (40, 100)


def test_the_launcher_repeats_the_report() -> None:
    report = diagnosis.report({0: note(0), 1: note(1, step=3)}, {}, ["worker 2"], "It ends.")
    lines = ("before", *report.splitlines())
    failure = Failure(Worker(0, ("x",), {}), HUNG, lines)
    assert failure.excerpt() == lines[1:]
    assert "worker 2  has sent no status" in report
    assert progress.here.at == OUTSIDE


# --- messages that a stranger may have posted ---------------------------------------------

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
values = plain | st.lists(plain, max_size=3) | st.dictionaries(st.text(max_size=5), plain)
contents = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("worker", "task", "beat", "idle", "stack", "call"), values)
)


@given(text=st.text(max_size=40) | (values | contents).map(json.dumps))
@settings(max_examples=100, deadline=None, database=None)
def test_any_text_is_a_message_or_a_value_error(text: str) -> None:
    for kind in (StatusMessage, HangRequest):
        try:
            message = kind.read(text)
        except ValueError:
            continue
        assert kind.read(message.text()) == message


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "1",
        "{}",
        '{"worker": "1", "task": "x"}',
        '{"worker": 0, "task": "worker 0"}',  # another worker's
        note(1).text().replace('"idle": 70.0', '"idle": NaN'),
        note(1).text().replace('"stack": []', '"stack": 7'),
    ],
    ids=[*"abcdefg"],
)
def test_what_is_no_message_says_nothing_about_its_worker(text: str) -> None:
    class Store:
        keeper = None

        def read_all(self, prefix: str) -> dict[int, str]:
            return {1: posted}

    peers, posted = PeerStatuses(), note(1, beat=1).text()
    statuses, _ = peers.read_all(Store(), note(0), 1.0)  # type: ignore[arg-type]
    posted = text
    assert peers.read_all(Store(), note(0), 1.0)[0] == statuses  # type: ignore[arg-type]
    posted = note(1, beat=2).text()
    assert peers.read_all(Store(), note(0), 1.0)[0][1].beat == 2  # type: ignore[arg-type]


def test_a_status_has_no_bytes_that_are_no_characters() -> None:
    status = note(1, stack=("file \udcff.py",))
    assert StatusMessage.read(status.text()).stack == ("file ?.py",)
