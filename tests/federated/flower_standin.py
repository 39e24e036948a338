"""What `tfdist.flower` uses of Flower, for environments without it, and a grid in one process.

Flower forces other versions of protobuf and cryptography, so `make test` runs without it, and
`make test-flower` runs the same tests with it.
"""

from __future__ import annotations

import importlib.util
import io
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

IS_THERE = importlib.util.find_spec("flwr") is not None
if IS_THERE:  # it sets variables of the environment when it is imported
    importlib.import_module("flwr.app")


class Array:
    def __init__(self, value: Any) -> None:
        file = io.BytesIO()
        np.save(file, value, allow_pickle=False)
        self._data = file.getvalue()

    def numpy(self) -> Any:
        return np.load(io.BytesIO(self._data), allow_pickle=False)


@dataclass
class Error:
    code: int
    reason: str | None = None


@dataclass
class Context:
    run_id: int
    node_id: int
    node_config: dict[str, Any]
    state: dict[str, Any]
    run_config: dict[str, Any]


class Message:
    def __init__(
        self, content: Any, dst_node_id: int = 0, message_type: str = "", *,
        ttl: float | None = None, group_id: str = "", reply_to: Any = None,
    ) -> None:  # fmt: skip
        self.content = content
        is_reply = reply_to is not None
        self.metadata = SimpleNamespace(
            message_type=reply_to.metadata.message_type if is_reply else message_type,
            src_node_id=reply_to.metadata.dst_node_id if is_reply else 0,
            dst_node_id=0 if is_reply else dst_node_id,
        )

    @property
    def error(self) -> Any:
        return self.content

    def has_error(self) -> bool:
        return isinstance(self.content, Error)


@dataclass
class App:
    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def __getattr__(self, kind: str) -> Any:
        return lambda: lambda function: self.functions.setdefault(kind, function)

    def __call__(self, first: Any, context: Any) -> Any:
        metadata = getattr(first, "metadata", None)
        return self.functions[metadata.message_type if metadata else "main"](first, context)


def install(monkeypatch: Any) -> Any:
    """Gives `flwr.app`, of Flower if it is there."""
    if IS_THERE:
        identity = importlib.import_module("flwr.supercore.task_identity").TaskIdentity
        for name in ("_run_id", "_node_id", "_task_id"):  # which Flower's processes set
            monkeypatch.setattr(identity, name, 1)
        return importlib.import_module("flwr.app")
    app = types.ModuleType("flwr.app")
    vars(app).update(
        Array=Array, ArrayRecord=dict, ConfigRecord=dict, RecordDict=dict, Message=Message,
        Context=Context, Error=Error,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "flwr", types.ModuleType("flwr"))
    monkeypatch.setitem(sys.modules, "flwr.app", app)
    for name, made in (("clientapp", "ClientApp"), ("serverapp", "ServerApp")):
        module = types.ModuleType(f"flwr.{name}")
        setattr(module, made, App)
        monkeypatch.setitem(sys.modules, f"flwr.{name}", module)
    return app


class Grid:
    """Nodes in this process. Answers come in the reverse order.

    Args:
        app: `flwr.app`.
        client: The `ClientApp` of all nodes.
        partitions: The `partition-id` of each node, by the node's id.
        fails: Of a partition and the number of its message: "before" training, "after" it, or
            None if the node does not fail.
    """

    def __init__(
        self,
        app: Any,
        client: Any,
        partitions: Mapping[int, int],
        fails: Callable[[int, int], str | None] = lambda partition, number: None,
    ) -> None:
        self._app, self._client, self._fails = app, client, fails
        self.contexts = {
            node: app.Context(1, node, {"partition-id": partition}, app.RecordDict(), {})
            for node, partition in partitions.items()
        }
        self.asked: list[int] = []

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float) -> list[Any]:
        return [self._answer(message) for message in reversed(list(messages))]

    def _answer(self, message: Any) -> Any:
        context = self.contexts[message.metadata.dst_node_id]
        partition = context.node_config["partition-id"]
        trains = message.metadata.message_type == "train"
        if trains:
            self.asked.append(partition)
        fails = self._fails(partition, self.asked.count(partition)) if trains else None
        if fails == "after":  # it has trained, but its answer is lost
            self._client(message, context)
        if fails:
            return self._app.Message(self._app.Error(1, "lost"), reply_to=message)
        return self._client(message, context)
