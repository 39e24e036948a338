"""Rounds over Flower's messages, against `fit` with the same clients."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import keras
import numpy as np
import pytest

import tfdist
import tfdist.flower
from tests.federated import flower_standin
from tests.federated.reference import in_float64, model_of, rows_of
from tfdist.errors import ArgumentError, MissingPackageError, PeerError
from tfdist.federated.flower import messages
from tfdist.federated.flower.nodes import Nodes

SIZES = (40, 7, 33, 0)
PARTS = rows_of(*SIZES)
X, Y = (np.concatenate(arrays) for arrays in zip(*PARTS, strict=True))
IDS = np.repeat(range(len(SIZES)), SIZES)
PARTITIONS = {31: 2, 12: 0, 44: 3, 25: 1}  # by the id of the node
SETTINGS: dict[str, Any] = {"batch_size": 16, "seed": 5}


def momentum() -> Any:
    return keras.optimizers.SGD(0.1, momentum=0.9)


def decaying() -> Any:
    rate = keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)
    return keras.optimizers.Adam(rate)


@pytest.fixture
def flwr(monkeypatch):
    """`flwr.app`, and models in float64."""
    with in_float64():
        yield flower_standin.install(monkeypatch)


def run(flwr: Any, model_fn: Any, averaging: Any, rounds: int = 2, **options: Any) -> Any:
    """Trains over messages; gives the model, the history and the grid."""
    of_client = {name: options.pop(name) for name in ("privacy", "ledger") if name in options}
    fails = options.pop("fails", lambda partition, number: None)
    client = tfdist.flower.client_app(
        model_fn, lambda context: PARTS[context.node_config["partition-id"]], **of_client
    )
    grid = flower_standin.Grid(flwr, client, PARTITIONS, fails)
    results: list[Any] = []
    settings = {**SETTINGS, "num_clients": len(PARTITIONS), "verbose": 0, **options}
    server = tfdist.flower.server_app(
        model_fn, federated=averaging, rounds=rounds,
        on_end=lambda *result: results.extend(result), **settings,
    )  # fmt: skip
    server(grid, flwr.Context(1, 0, {}, flwr.RecordDict(), {}))
    return (*results, grid)


def reference(model_fn: Any, averaging: Any, rounds: int = 2, keep: Any = None) -> Any:
    """Trains by `fit` with the same clients."""
    model = model_fn()
    rows = slice(None) if keep is None else np.isin(IDS, keep)
    names = (*messages.TAKEN, "server_optimizer")
    settings = {name: getattr(averaging, name) for name in names}
    averaging = tfdist.FedAvg(clients=IDS[rows], **settings)
    history = tfdist.fit(
        model, X[rows], Y[rows], epochs=rounds, federated=averaging, verbose=0, **SETTINGS
    )
    return model, history


def assert_equal(ours: Any, theirs: Any, limit: float = 1e-13) -> None:
    """Compares weights, statistics of layers, and the states of random numbers."""
    variables = [[*m.trainable_variables, *m.non_trainable_variables] for m in (ours, theirs)]
    for a, b in zip(*variables, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=0, atol=limit)


@pytest.mark.parametrize(
    ("model_fn", "settings", "history_of"),
    [
        pytest.param(
            functools.partial(model_of, momentum, norm=True, dropout=0.4),
            {
                "local_steps": 3,
                "proximal": 0.3,
                "clients_per_round": 2,
                "server_optimizer": keras.optimizers.Adam(0.1),
            },
            ("loss", "accuracy"),
            id="statistics of layers, dropout, Adam on the server, drawn for each round",
        ),
        pytest.param(
            functools.partial(model_of, decaying),
            {"weighting": "uniform", "keep_optimizer": True},
            ("loss",),
            id="kept optimizers and a schedule",
            marks=pytest.mark.full,
        ),
    ],
)
def test_rounds_over_messages_are_those_of_fit(flwr, model_fn, settings, history_of):
    def make() -> Any:  # a new optimizer for each model
        arguments = {**model_fn.keywords}
        return model_of(model_fn.args[0](), **arguments)

    averaging = tfdist.FedAvg(**settings)
    ours, history, grid = run(flwr, make, averaging)
    theirs, expected = reference(make, averaging)
    assert_equal(ours, theirs)
    for name in history_of:
        np.testing.assert_allclose(history.history[name], expected.history[name], rtol=1e-12)
    assert len(grid.asked) == 2 * (settings.get("clients_per_round") or 3)
    assert int(ours.optimizer.iterations) == int(theirs.optimizer.iterations)


def make_plain() -> Any:
    return model_of(momentum())


def make_decaying() -> Any:
    return model_of(decaying())


def make_dropping() -> Any:
    return model_of(momentum(), dropout=0.4)


@pytest.mark.full
def test_a_lost_answer_is_asked_for_again_and_a_round_is_the_same(flwr, capsys):
    """Also if the client had trained, and keeps its optimizer."""
    averaging = tfdist.FedAvg(local_steps=2, keep_optimizer=True)
    ours, _, grid = run(
        flwr, make_plain, averaging, verbose=2,
        fails=lambda *message: "after" if message == (1, 2) else None,
    )  # fmt: skip
    theirs, _ = reference(make_plain, averaging)
    assert_equal(ours, theirs)
    assert grid.asked.count(1) == 3
    printed = capsys.readouterr().out
    assert "round 2: clients have not answered, the round is repeated for them" in printed
    assert "client 1: lost" in printed


@pytest.mark.full
def test_a_round_is_made_without_a_lost_client(flwr):
    averaging = tfdist.FedAvg(local_steps=2)
    ours, history, _ = run(
        flwr, make_dropping, averaging, 1, lost="skip",
        fails=lambda partition, number: "before" if partition == 2 else None,
    )  # fmt: skip
    theirs, expected = reference(make_dropping, averaging, 1, keep=[0, 1])
    assert_equal(ours, theirs)
    np.testing.assert_allclose(history.history["loss"], expected.history["loss"], rtol=1e-12)


@pytest.mark.full
def test_a_client_that_always_fails_ends_the_run(flwr):
    with pytest.raises(
        PeerError, match=r"nothing from client \d in 3 attempts \(client \d: lost"
    ):
        run(flwr, make_plain, tfdist.FedAvg(local_steps=1, clients_per_round=1), 1,
            fails=lambda partition, number: True)  # fmt: skip


@pytest.mark.full
def test_another_run_goes_on_with_the_round_and_the_servers_optimizer(flwr, tmp_path):
    averaging = tfdist.FedAvg(
        local_steps=2, clients_per_round=2, server_optimizer=keras.optimizers.Adam(0.1)
    )
    run(flwr, make_plain, averaging, 1, checkpoint=tmp_path)
    ours, _, grid = run(flwr, make_plain, averaging, 3, checkpoint=tmp_path)
    theirs, _ = reference(make_plain, averaging, 3)
    assert_equal(ours, theirs, 0.0)
    assert len(grid.asked) == 4


@pytest.mark.full
def test_a_private_client_counts_all_rounds_and_runs_and_sends_no_metrics(
    flwr, tmp_path, capsys
):
    pytest.importorskip("dp_accounting")
    privacy = tfdist.DPSGD(l2_norm_clip=1.0, noise_multiplier=2.0, delta=1e-3)
    options: dict[str, Any] = {
        "privacy": privacy,
        "ledger": lambda context: tmp_path / f"{context.node_config['partition-id']}.json",
        "batch_size": 4,
    }
    averaging = tfdist.FedAvg(local_steps=3)
    for _ in range(2):  # two runs
        ours, history, _ = run(flwr, make_decaying, averaging, 1, verbose=2, **options)
    printed = capsys.readouterr().out
    told = [float(e) for e in re.findall(r"epsilon of the clients' examples: (\S+)", printed)]
    assert np.isnan(history.history["loss"]).all()
    assert all(np.isfinite(weight).all() for weight in ours.get_weights())
    for partition in range(3):
        file = tmp_path / f"{partition}.json"
        ledger = tfdist.privacy.Ledger.from_dict(json.loads(file.read_text()))
        expected = tfdist.privacy.epsilon(
            sampling_probability=4 / SIZES[partition], noise_multiplier=2.0, steps=6, delta=1e-3
        )
        assert ledger.steps == 6
        assert ledger.epsilon(1e-3) == pytest.approx(expected, rel=1e-6)
        assert told[-1] >= expected * 0.999
    assert len(told) == 2
    assert told[1] > told[0]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"federated": tfdist.FedAvg(clients=[0, 1])}, "each node is a client"),
        ({"lost": "ignore"}, "lost='ignore'"),
        ({"rounds": -1}, "rounds=-1"),
        ({"timeout": 0}, "timeout=0"),
        ({"federated": "FedAvg"}, "FedAvg"),
        ({"federated": tfdist.DiLoCo(), "checkpoint": "c"}, "keep_optimizer=True"),
    ],
)
def test_servers_that_mean_nothing_are_refused(monkeypatch, options, match):
    flower_standin.install(monkeypatch)
    arguments = {"federated": tfdist.FedAvg(), "rounds": 1, **options}
    with pytest.raises(ArgumentError, match=match):
        tfdist.flower.server_app(make_plain, **arguments)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"privacy": tfdist.DPSGD(l2_norm_clip=1.0, target_epsilon=1.0, delta=1e-3)},
            "noise_multiplier",
        ),
        (
            {"privacy": tfdist.DPSGD(l2_norm_clip=1.0, noise_multiplier=1.0, delta=1e-3)},
            "ledger=None",
        ),
        ({"ledger": "file"}, "privacy=None"),
    ],
)
def test_clients_that_mean_nothing_are_refused(monkeypatch, options, match):
    flower_standin.install(monkeypatch)
    with pytest.raises(ArgumentError, match=match):
        tfdist.flower.client_app(make_plain, lambda context: None, **options)


@pytest.mark.quick
@pytest.mark.skipif(flower_standin.IS_THERE, reason="Flower is installed")
def test_a_missing_flower_is_named():
    with pytest.raises(MissingPackageError, match=r'pip install "tfdist\[flower\]"'):
        tfdist.flower.client_app(make_plain, lambda context: None)


def test_a_client_refuses_what_it_does_not_know(flwr):
    """Messages of another version, another model, and other rows than at first."""
    parts = [PARTS[1]]
    app = tfdist.flower.client_app(make_plain, lambda context: parts[0])
    context = flwr.Context(1, 7, {}, flwr.RecordDict(), {})

    def asked(kind: str, **content: Any) -> Any:
        return app(flwr.Message(flwr.RecordDict(content), 7, kind, group_id=""), context)

    described = messages.of_plain(asked("query").content["description"])
    assert described["rows"] == 7
    assert described["partition"] is None
    task = messages.RoundTask(0, 0, (7,), 4, 1, True, {"local_steps": 1}, 0, False).to_record()
    with pytest.raises(ArgumentError, match="same model"):
        asked("train", task=task, arrays=messages.arrays([np.zeros(3)]))
    with pytest.raises(ArgumentError, match="same version"):
        asked("train", task=flwr.ConfigRecord({}), arrays=messages.arrays([]))
    kept = messages.RoundTask(1, 0, (7,), 4, 1, True, {"keep_optimizer": True}, 0, True)
    with pytest.raises(ArgumentError, match="its node was started again"):
        asked("train", task=kept.to_record(), arrays=messages.arrays([]))
    parts[0] = PARTS[2]
    with pytest.raises(ArgumentError, match="33 rows, after 7"):
        asked("train", task=task, arrays=messages.arrays([]))


class Answers:
    """Nodes that say who they are, and answer every other time."""

    def __init__(self, flwr: Any, partitions: dict[int, int | None]) -> None:
        self.flwr, self.partitions, self.asked = flwr, partitions, []

    def get_node_ids(self) -> list[int]:
        return list(self.partitions)

    def send_and_receive(self, sent: Any, *, timeout: float) -> Any:
        for message in sent:
            node = message.metadata.dst_node_id
            self.asked += [node] if message.metadata.message_type == "train" else []
            if self.asked.count(node) == 1:  # it answers at the second time
                yield self.flwr.Message(self.flwr.Error(7, "tired"), reply_to=message)
                continue
            described = {"partition": self.partitions[node], "rows": 3, "data": {}}
            content = self.flwr.RecordDict({"description": messages.plain(described)})
            yield self.flwr.Message(content, reply_to=message)


@pytest.mark.quick
@pytest.mark.parametrize("lost", ["repeat", "skip"])
def test_nodes_are_numbered_asked_again_and_recognised(monkeypatch, lost):
    flwr = flower_standin.install(monkeypatch)
    grid, said = Answers(flwr, {5: 1, 9: 0}), []
    nodes = Nodes(grid, 2, 0.0, lost, said.append)
    assert [client.node for client in nodes.meet()] == [9, 5]
    grid.asked = [9, 9] if lost == "skip" else []
    contents = {number: flwr.RecordDict() for number in (0, 1)}
    answers = nodes.train(3, contents)
    assert sorted(answers) == ([0] if lost == "skip" else [0, 1])
    what = (
        "is made without them: client 1" if lost == "skip" else "is repeated for them: client 0"
    )
    assert f"round 4: clients have not answered, the round {what}: tired" in said[0]
    grid.partitions = {9: 0, 6: 1}  # node 5 comes back under another id
    grid.asked = [9, 9, 6, 6]
    assert sorted(nodes.train(4, contents)) == [0, 1]
    assert grid.asked[-2:] == [9, 6]


@pytest.mark.quick
def test_nodes_that_cannot_be_numbered_are_refused(monkeypatch):
    flwr = flower_standin.install(monkeypatch)
    assert [
        c.node for c in Nodes(Answers(flwr, {5: 0, 3: None}), 2, 0.0, "skip", print).meet()
    ] == [3, 5]
    with pytest.raises(ArgumentError, match=r"partition-id=.*'1', '1'"):
        Nodes(Answers(flwr, {5: 1, 3: 1}), 2, 0.0, "skip", print).meet()
    with pytest.raises(PeerError, match=r"2 clients\. Received: 1 connected"):
        Nodes(Answers(flwr, {5: 1}), 2, 0.0, "skip", print).meet()
