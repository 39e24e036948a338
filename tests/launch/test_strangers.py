"""Who may speak to the launchers: strangers learn nothing and disturb nobody."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.jobs import QUIET, free_port
from tfdist.cluster import strict_json
from tfdist.errors import LaunchError
from tfdist.launch import CoordinatorClient, Host, Restarts
from tfdist.launch.coordinator import Coordinator
from tfdist.launch.messages import (
    BEFORE_ADMISSION,
    PROTOCOL,
    TO_COORDINATOR,
    TO_LAUNCHER,
    decode,
    encode,
)
from tfdist.launch.protocol import Connection, Handshake
from tfdist.launch.restarts import RestartCause
from tfdist.launch.token import shared_token

pytestmark = pytest.mark.waits

TOKEN = "a secret that strangers do not know"
HOSTS = (Host("a"), Host("b"))
SETTINGS = {"--port": 17380, "--hosts": "a:1,b:1"}
CAUSE = RestartCause("worker 1 ended.", "after step 1", 1.0, 9, signature=("worker 1", -9))


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def coordinator(port: int, capfd: Any) -> Iterator[Coordinator]:
    coordinator = Coordinator(port, TOKEN, HOSTS, SETTINGS, Restarts(1), limit=30)
    yield coordinator
    assert coordinator._thread.is_alive()
    coordinator.close()
    assert "Traceback" not in capfd.readouterr().err


def client(port: int, rank: int, token: str = TOKEN, limit: float = 30) -> CoordinatorClient:
    return CoordinatorClient(("127.0.0.1", port), token, rank, SETTINGS, Restarts(1), limit)


@pytest.fixture
def both(coordinator: Coordinator, port: int) -> Iterator[list[CoordinatorClient]]:
    """Two launchers that run together."""
    clients = [client(port, rank) for rank in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda one: one.meet((), print), clients)) == [None, None]
    yield clients
    for one in clients:
        one.leave(130)
        one.close()


def called(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def heard(stranger: socket.socket) -> bytes:
    """Gives all that comes until the other side hangs up, or for a second."""
    content = b""
    stranger.settimeout(1)
    with contextlib.suppress(OSError):
        while data := stranger.recv(1 << 16):
            content += data
    return content


HELLO = {"kind": "hello", "protocol": PROTOCOL, "nonce": "0" * 32, "proof": "0" * 64}


NONSENSE = [
    b"[" * 100_000 + b"\n",
    b"[" * 900 + b"\n",
    b'{"kind":' + b'{"a":' * 50_000 + b"\n",
    b"x" * (3 << 20),
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xff\xfe\n",
    b'{"kind": ["hello"]}\n',
    b'{"kind": "failed", "cause": {}}\n{"kind": "bye", "status": 1}\n',
    # What the launchers of earlier releases said, with settings that are a list.
    b'{"kind": "hello", "rank": 1, "identity": "x", "proof": "0", "settings": ["a"]}\n',
    json.dumps(HELLO).encode() + b"\n" + encode("ready", {}) + b"\n",
    json.dumps({**HELLO, "protocol": 1}).encode() + b"\n",
    json.dumps({**HELLO, "nonce": [1]}).encode() + b"\n",
    encode("join", {"rank": 1, "identity": "0" * 16, "settings": {}, "restarts": []}),
]


def test_strangers_learn_nothing_and_disturb_nobody(
    both: list[CoordinatorClient], coordinator: Coordinator, port: int
) -> None:
    strangers = [called(port) for _ in NONSENSE]
    for stranger, said in zip(strangers, NONSENSE, strict=True):
        with contextlib.suppress(OSError):  # it was hung up on
            stranger.sendall(said)
    for stranger in strangers:
        with stranger:
            answers = [json.loads(line) for line in heard(stranger).splitlines()]
        assert all(answer.keys() <= {"kind", "protocol", "nonce"} for answer in answers)
        assert {answer["kind"] for answer in answers} <= {"welcome", "denied"}
    assert [one.decision for one in both] == [None, None]
    assert coordinator._restarts.history == []


def test_callers_that_never_read_and_crowds_keep_nobody_waiting(
    both: list[CoordinatorClient], coordinator: Coordinator, port: int
) -> None:
    strangers = [called(port) for _ in range(150)]
    for stranger in strangers[:50]:
        with contextlib.suppress(OSError):
            stranger.sendall(b'{"kind":"hello"}\n' * 4000)
    began = time.monotonic()
    third = client(port, 1)
    with pytest.raises(LaunchError, match="--node-rank 1 twice"):
        third.meet((), print)  # another launcher is served at once
    third.close()
    assert time.monotonic() - began < 5
    assert len(coordinator._callers.all) <= 2 + 64 + 1
    assert [one.decision for one in both] == [None, None]
    for stranger in strangers:
        stranger.close()


WITHOUT_DESCRIPTORS = """
import resource, sys
from tfdist.launch import Host, Restarts
from tfdist.launch import callers
from tfdist.launch.coordinator import Coordinator

callers._MOST_STRANGERS = 1000  # so that descriptors run out first
port = int(sys.argv[1])
coordinator = Coordinator(port, "t", [Host("a"), Host("b")], {}, Restarts(1), 60)
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
print("up", flush=True)
sys.stdin.readline()
print("alive", coordinator._thread.is_alive(), flush=True)
"""


def test_exhausted_descriptors_are_survived(port: int) -> None:
    hub = subprocess.Popen(
        [sys.executable, "-c", WITHOUT_DESCRIPTORS, str(port)],
        env=QUIET,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert hub.stdin is not None
    assert hub.stdout is not None
    try:
        assert hub.stdout.readline() == "up\n"
        strangers = [called(port) for _ in range(60)]
        # The first are served. The last are not left waiting, but sent away.
        assert b"welcome" in strangers[0].recv(1000)
        with contextlib.suppress(ConnectionResetError):
            assert strangers[-1].recv(1000) == b""
        for stranger in strangers:
            stranger.close()
        with called(port) as later:
            deadline = time.monotonic() + 10
            while b"welcome" not in heard(later) and time.monotonic() < deadline:
                later.close()
                later = called(port)
        output, _ = hub.communicate("\n", timeout=10)
    finally:
        hub.kill()
        hub.wait()
    assert output == "alive True\n"


def false_coordinator(port: int, lines: list[bytes]) -> threading.Thread:
    """Answers one caller as somebody would who does not know the token."""
    listener = socket.create_server(("127.0.0.1", port))

    def serve() -> None:
        with listener:
            connection, _ = listener.accept()
            with connection:
                for line in lines:
                    connection.sendall(line + b"\n")
                    time.sleep(0.1)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


WELCOME = encode("welcome", {"protocol": PROTOCOL, "nonce": "1" * 32})
START = encode("start", {"active": [0, 1]})


@pytest.mark.parametrize(
    "lines",
    [
        [WELCOME, encode("admitted", {"proof": "0" * 64}), START],
        [WELCOME, START],
        [encode("over", {"cause": None, "repeated": False})],
    ],
)
def test_a_false_coordinator_is_not_believed(lines: list[bytes], port: int) -> None:
    thread = false_coordinator(port, lines)
    deceived = client(port, 1, limit=0.5)
    with pytest.raises(LaunchError, match=r"token of all launchers|must answer within"):
        deceived.meet((), print)
    deceived.close()
    thread.join(5)


def test_a_coordinator_that_does_not_come_back_ends_the_run(
    coordinator: Coordinator, both: list[CoordinatorClient], port: int, monkeypatch: Any
) -> None:
    second = both[1]
    second._disconnect()
    assert second.decision is not None
    monkeypatch.setattr(second, "_address", ("127.0.0.1", free_port()))
    second._limit = 0.5
    ended = second.meet((), print)
    assert ended is not None
    assert ended.cause is not None
    assert (ended.again, ended.cause.status) == (False, 75)


def test_another_token_is_refused(both: list[CoordinatorClient], port: int) -> None:
    other = client(port, 1, token="another")
    with pytest.raises(LaunchError, match="token of all launchers must be the same"):
        other.meet((), print)
    other.close()


def admitted(port: int) -> Connection:
    """Connects as somebody who knows the token."""
    connection = Connection(called(port))
    while not connection.is_admitted:
        assert connection.is_open
        connection.wait(1)
        for message in connection.received():
            if message["kind"] == "welcome":
                handshake = Handshake(TOKEN.encode(), message["nonce"], "2" * 32)
                proof = handshake.launcher_proof
                connection.send("hello", protocol=PROTOCOL, nonce="2" * 32, proof=proof)
            elif message["kind"] == "admitted":
                assert message["proof"] == handshake.coordinator_proof
                keys = handshake.launcher_key, handshake.coordinator_key
                connection.secure(*keys, TO_LAUNCHER)
    return connection


def is_cut_off(connection: Connection) -> bool:
    deadline = time.monotonic() + 3
    while connection.is_open and time.monotonic() < deadline:
        connection.wait(0.1)
        list(connection.received())
    return not connection.is_open


@pytest.mark.parametrize("change", ["nothing", "content", "again", "plain"])
def test_messages_cannot_be_changed_or_repeated(
    change: str, coordinator: Coordinator, port: int
) -> None:
    connection = admitted(port)
    with connection.socket as tcp_socket:
        sent: list[bytes] = []
        connection.socket = type("", (), {"send": lambda self, x: sent.append(x) or len(x)})()
        connection.send("bye", status=1)
        connection.socket = tcp_socket
        (line,) = sent
        changed = {
            "content": line.replace(b"1", b"2"),
            "again": line + line,
            "plain": encode("bye", {"status": 1}) + b"\n",
        }
        tcp_socket.sendall(changed.get(change, line))
        if change == "nothing":
            time.sleep(0.3)
            list(connection.received())
            assert connection.is_open
        else:
            assert is_cut_off(connection)


# --- fuzzing ------------------------------------------------------------------------------

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
KINDS = sorted(BEFORE_ADMISSION | TO_COORDINATOR | TO_LAUNCHER)
NAMES = sorted(
    {
        *("protocol", "nonce", "proof", "rank", "identity", "settings", "restarts"),
        *("cause", "status", "why", "active", "repeated"),
    }
)
causes = st.fixed_dictionaries(dict.fromkeys(CAUSE.to_json(), values)) | st.just(
    json.loads(json.dumps(CAUSE.to_json()))
)
said = st.fixed_dictionaries(
    {"kind": st.sampled_from(KINDS) | values},
    optional={name: values | causes | st.lists(causes, max_size=2) for name in NAMES},
)


@pytest.mark.quick
@given(line=st.binary(max_size=300) | said.map(lambda m: json.dumps(m).encode()))
@settings(max_examples=100, deadline=None, database=None)
def test_any_line_is_read_or_refused(line: bytes) -> None:
    message = decode(line, KINDS)
    if message is not None and message.get("cause") is not None:
        cause = RestartCause.from_json(message["cause"])
        assert decode(encode("failed", {"cause": cause.to_json()}), {"failed"}) is not None
        time.localtime(cause.ended)


@pytest.mark.quick
@given(value=values)
@settings(max_examples=100, deadline=None, database=None)
def test_strict_json_reads_what_python_writes(value: Any) -> None:
    text = json.dumps(value).encode()
    try:
        assert strict_json.loads(text, 1 << 20, most_depth=20) == json.loads(text)
    except ValueError:
        odd = ("NaN", "Infinity", "\\ud")
        assert any(word in text.decode() for word in odd), text


@pytest.mark.quick
@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b'"' + b"[" * 9 + b'"' + b"[" * 9, b"1" * 5000, b"1e999", b'"\\ud800"'],
    ids=["deep", "deep after a text", "long number", "large number", "half a character"],
)
def test_strict_json_refuses(text: bytes) -> None:
    with pytest.raises(ValueError, match=r".*"):
        strict_json.loads(text, 1 << 20)


def message_of(rng: random.Random) -> dict[str, Any]:
    """Makes a message as a launcher with a mistake might."""
    odd = [None, True, 0, -1, 2**70, 1e308, "", "x", [], {}, [[1]], {"a": {}}, "1" * 50]
    cause = CAUSE.to_json()
    for name in cause:
        if rng.random() < 0.05:
            cause[name] = rng.choice(odd)
    message = {
        "rank": rng.choice([0, 1, 1, 7, *odd[:5]]),
        "identity": rng.choice(["0" * 16, "1" * 16]),
        "settings": rng.choice([SETTINGS, {}, {"a": 1}]),
        "restarts": rng.choice([[], [cause], [cause] * 3]),
        "cause": cause,
        "status": rng.choice([75, 130, 0]),
    }
    for name in message:
        if rng.random() < 0.05:
            message[name] = rng.choice(odd)
    return message


def fuzz(port: int, seconds: float, seed: int) -> int:
    """Talks nonsense to a coordinator, some of it as one who knows the token."""
    rng, count, deadline = random.Random(seed), 0, time.monotonic() + seconds
    while time.monotonic() < deadline:
        count += 1
        with contextlib.suppress(OSError, AssertionError):
            if rng.random() < 0.3:
                with called(port) as stranger:
                    stranger.sendall(rng.randbytes(rng.randrange(1, 5000)))
                continue
            connection = admitted(port)
            with connection.socket:
                for _ in range(rng.randrange(1, 6)):
                    kind = rng.choice(sorted(TO_COORDINATOR))
                    connection.send(kind, **message_of(rng))
                time.sleep(rng.choice([0, 0.15]))
    return count


@pytest.mark.parametrize("seconds", [1, pytest.param(60, marks=pytest.mark.full)])
def test_the_coordinator_survives_nonsense(
    seconds: float, coordinator: Coordinator, port: int
) -> None:
    assert fuzz(port, seconds, seed=3) > 10


# --- the token ----------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> dict[str, str]:
    return {"TFDIST_TOKEN_FILE": str(tmp_path / "folder" / "token")}


@pytest.mark.quick
def test_the_first_host_makes_the_token_and_says_how_to_copy_it(place: dict[str, str]) -> None:
    lines: list[str] = []
    made = shared_token(["a", "b"], 0, 1, lines.append, place)
    path = Path(place["TFDIST_TOKEN_FILE"])
    assert len(made) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["token"]
    (line,) = lines
    assert f"scp -p {path} b:{path}" in line
    assert made not in line
    assert shared_token(["a", "b"], 0, 1, lines.append, place) == made
    assert shared_token(["a", "b"], 1, 1, lines.append, place) == made
    assert len(lines) == 1
    assert shared_token(["a", "b"], 1, 1, print, {**place, "TFDIST_TOKEN": "x"}) == "x"


@pytest.mark.quick
def test_another_host_waits_for_the_token(place: dict[str, str]) -> None:
    lines: list[str] = []
    path = place["TFDIST_TOKEN_FILE"]
    with pytest.raises(LaunchError, match=f"scp -p a:{path}"):
        shared_token(["a", "b"], 1, 0.1, lines.append, place)
    assert f"scp -p a:{path} {path}" in lines[0]
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(shared_token, ["a", "b"], 1, 20, lines.append, place)
        assert shared_token(["a", "b"], 0, 1, lines.append, place) == waiting.result(20)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("mode", "content", "message"),
    [
        (0o644, b"secret\n", "chmod 600"),
        (0o640, b"secret\n", "chmod 600"),
        (0o600, b"", "one line of text"),
        (0o600, b"\xff", "one line of text"),
        (0o600, b"x" * 5000, "one line of text"),
    ],
)
def test_a_file_that_others_may_read_is_refused(
    mode: int, content: bytes, message: str, place: dict[str, str]
) -> None:
    path = Path(place["TFDIST_TOKEN_FILE"])
    path.parent.mkdir()
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(LaunchError, match=message):
        shared_token(["a", "b"], 0, 1, print, place)
