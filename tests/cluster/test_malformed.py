"""Malformed configurations: each gives an error of tfdist's that says what to do, or works."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tfdist.cluster import Cluster
from tfdist.cluster.environment import limit_of
from tfdist.errors import CheckpointError, ClusterError, LaunchError
from tfdist.launch import parse_elastic, parse_hosts, plan_workers
from tfdist.resume.checkpoint import files
from tfdist.resume.checkpoint.shards import Piece, write_shard
from tfdist.resume.checkpoint.slices import Slice

pytestmark = pytest.mark.quick
# Each example takes milliseconds; a second is what a user would notice.
settings.register_profile("tfdist", deadline=1000, derandomize=True, database=None)
settings.load_profile("tfdist")

text = st.text(max_size=20)
near_numbers = st.sampled_from(["", "0", "-1", "1.5", "٣", "²", "9" * 30, "9" * 5000, " 2 "])
numbers = near_numbers | st.integers(-3, 70000).map(str) | text
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
addresses = st.builds(
    "{}{}{}".format,
    st.sampled_from(["a", "b", "", "10.0.0.1", "[::1]", "::1", "http://a", "a b", "a:b"]),
    st.sampled_from([":", "", "::"]),
    numbers,
)
tf_configs = st.fixed_dictionaries(
    {},
    optional={
        "cluster": json_values
        | st.dictionaries(
            st.sampled_from(["worker", "chief", "ps", "evaluator", "master", ""]),
            st.lists(addresses | json_values, max_size=3) | json_values,
        ),
        "task": json_values
        | st.fixed_dictionaries(
            {},
            optional={
                "type": st.sampled_from(["worker", "chief", "ps"]) | json_values,
                "index": st.integers(-1, 3) | numbers | json_values,
            },
        ),
        "rpc_layer": json_values,
    },
)


def says_what_to_do(message: str) -> None:
    assert "must" in message
    assert "Received: " in message
    assert len(message) < 1200


def cluster_or_error(environ: dict[str, str]) -> None:
    try:
        cluster = Cluster.from_environment(environ)
    except ClusterError as error:
        says_what_to_do(str(error))
    else:
        assert (
            0
            <= cluster.index
            < max(1, cluster.num_workers, *map(len, cluster.jobs.values()), 1)
        )


@given(tf_configs.map(json.dumps) | json_values.map(json.dumps) | text)
@example("[" * 100_000)
@example('{"task": {"index": ' + "9" * 5000 + "}}")
def test_tf_config(config: str) -> None:
    cluster_or_error({"TF_CONFIG": config})


node_lists = st.sampled_from(
    ["node[1-2]", "a,b", "node[01-99999999999]", "n[1-2][3-4]", "n[2-1]", "[", "n[1,,2]", ""]
)
counts = st.sampled_from(["2", "1(x2)", "1(x99999999999)", "2(x", "99999999999", "", "1,1"])


@given(
    st.fixed_dictionaries(
        {"SLURM_STEP_ID": numbers, "SLURM_PROCID": numbers},
        optional={
            "SLURM_STEP_NUM_TASKS": numbers,
            "SLURM_STEP_NODELIST": node_lists | text,
            "SLURM_STEP_TASKS_PER_NODE": counts | text,
            "SLURM_DISTRIBUTION": text,
            "SLURM_JOB_ID": numbers,
            "TFDIST_PORT": numbers,
        },
    )
)
@example(
    {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "n[1-99999999999]",
        "SLURM_STEP_TASKS_PER_NODE": "1(x99999999999)",
        "SLURM_JOB_ID": "1",
    }
)
def test_slurm(environ: dict[str, str]) -> None:
    cluster_or_error(environ)


@given(st.sampled_from(["HOROVOD_", "OMPI_COMM_WORLD_", "PMI_"]), numbers, numbers)
def test_ranks(prefix: str, rank: str, size: str) -> None:
    environ = {f"{prefix}RANK": rank, f"{prefix}SIZE": size, "MPI_LOCALRANKID": "0"}
    cluster_or_error(environ)


host_lists = st.lists(
    st.builds(
        "{}{}{}".format,
        st.sampled_from(["a", "b", "127.0.0.1", "[::1]", "::1", ""]),
        st.sampled_from(["", ":"]),
        numbers,
    ),
    max_size=3,
).map(",".join)


@given(
    host_lists | text,
    st.none() | st.integers(-1, 3),
    st.none() | st.integers(-1, 5),
    st.integers(-1, 70000),
    st.integers(-1, 3),
)
@example("a:99999999999,b", 0, None, 17380, 0)
def test_hosts(
    hosts: str, node_rank: int | None, workers: int | None, port: int, servers: int
) -> None:
    try:
        plan_workers(
            ["true"],
            hosts=parse_hosts(hosts),
            node_rank=node_rank,
            workers=workers,
            port=port,
            servers=servers,
            environ={},
        )
    except (ClusterError, LaunchError) as error:
        says_what_to_do(str(error))


@given(st.builds("{}{}{}".format, numbers, st.sampled_from([":", "", "::"]), numbers))
def test_elastic(text: str) -> None:
    try:
        least, most = parse_elastic(text)
    except LaunchError as error:
        says_what_to_do(str(error))
    else:
        assert 1 <= least <= most


@given(numbers | st.sampled_from(["nan", "inf", "1e3"]))
def test_limits_of_waits(value: str) -> None:
    try:
        seconds = limit_of("TFDIST_START_TIMEOUT", 300, {"TFDIST_START_TIMEOUT": value})
    except ClusterError as error:
        says_what_to_do(str(error))
    else:
        assert 0 <= seconds < float("inf")


# --- checkpoints that something has changed -----------------------------------------------


@pytest.fixture(scope="module")
def written() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        for epoch in (1, 2):
            halves = [Slice((100,), (begin,), (50,)) for begin in (0, 50)]
            value = tf.fill([50], float(epoch))
            first, second = ([Piece("variables/0", value, half)] for half in halves)
            other = files.unfinished_folder(Path(folder), epoch, 0, "token")
            other.mkdir()
            of_others = [write_shard(other, 1, second)]
            state = {"format": 1, "epoch": epoch}
            files.write(
                Path(folder), epoch, 0, first, state, 3, token="token",
                of_others=lambda shards=of_others: shards,
            )  # fmt: skip
        yield Path(folder)


damages = st.tuples(
    st.integers(0, 1),  # of which checkpoint
    st.integers(0, 4),  # which file
    st.sampled_from(["delete", "cut", "flip", "append", "folder", "empty", "text"]),
    st.integers(0, 10_000),
    st.binary(min_size=1, max_size=20),
)


def damage(file: Path, how: str, place: int, data: bytes) -> None:
    content = file.read_bytes()
    file.unlink()
    if how == "delete":
        return
    if how == "folder":
        file.mkdir()
        return
    at = place % max(1, len(content))
    flipped = bytes([content[at] ^ 1]) if content else b"x"
    changed = {
        "cut": content[:at],
        "flip": content[:at] + flipped + content[at + 1 :],
        "append": content + data,
        "empty": b"",
        "text": data,
    }
    file.write_bytes(changed[how])


@given(st.lists(damages, min_size=1, max_size=3))
@settings(max_examples=60)
def test_damaged_checkpoints(written: Path, what: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoints"
        shutil.copytree(written, directory)
        harmed = set()
        for checkpoint, number, how, place, data in what:
            one = sorted(directory.iterdir())[checkpoint]
            listed = [file for file in sorted(one.iterdir()) if file.is_file()]
            if number < len(listed):
                damage(listed[number], how, place, data)
                harmed.add(checkpoint)
        whole = [epoch for epoch in (2, 1) if epoch - 1 not in harmed]
        found = None
        with contextlib.suppress(CheckpointError):
            found = files.latest(directory)
        if not whole:
            # Damage may undo itself; whatever is read is then what was written.
            assert found is None or found.state["epoch"] in (1, 2)
            return
        assert found is not None
        assert found.state["epoch"] >= whole[0]
        epoch = found.state["epoch"]
        assert (found.tensors.whole("variables/0") == epoch).all()
