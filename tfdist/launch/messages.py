"""What the launchers of a run say to each other: the kinds of messages, and their fields."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from tfdist.cluster import strict_json
from tfdist.launch.restarts import RestartCause

PROTOCOL = 2
"""The number of this protocol; a launcher with another one is refused."""

BEFORE_ADMISSION = frozenset({"welcome", "hello", "admitted", "denied"})
"""The kinds of messages with which two launchers prove that they know the token."""

TO_COORDINATOR = frozenset({"join", "ready", "done", "failed", "bye", "alive"})
TO_LAUNCHER = frozenset({"refused", "start", "again", "over", "alive"})

MOST_BYTES_BEFORE = 1 << 10
MOST_BYTES = 1 << 22
_MOST_TEXT = 1 << 12
_MOST_ENTRIES = 1 << 16
_HEX = re.compile(r"[0-9a-f]{16,128}")

Message = dict[str, Any]
_Check = Callable[[Any], bool]


def encode(kind: str, fields: Mapping[str, Any]) -> bytes:
    """Returns a message as one line, without its end. Long texts are cut.

    Args:
        kind: The kind of message.
        fields: Its fields, in types that JSON has.
    """
    return json.dumps({"kind": kind, **_shortened(dict(fields))}).encode()


def decode(line: bytes, kinds: Collection[str], most_bytes: int = MOST_BYTES) -> Message | None:
    """Reads a message, and checks each of its fields.

    Args:
        line: The line, without its end.
        kinds: The kinds of messages that may come now.
        most_bytes: The largest length.

    Returns:
        The kind and the fields that messages of this kind have; None if a launcher of this run
        cannot have sent it.
    """
    try:
        message = strict_json.loads(line, most_bytes)
    except ValueError:
        return None
    if not isinstance(message, dict):
        return None
    kind = message.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        return None
    checks = _KINDS[kind]
    if not all(name in message and check(message[name]) for name, check in checks.items()):
        return None
    return {"kind": kind, **{name: message[name] for name in checks}}


def _shortened(value: Any) -> Any:
    if isinstance(value, str):
        # Nothing that a launcher says may break its own connection.
        return value[:_MOST_TEXT].encode("utf-8", "replace").decode()
    if isinstance(value, list | tuple):
        return [_shortened(item) for item in value]
    if isinstance(value, dict):
        return {name: _shortened(item) for name, item in value.items()}
    return value


# --- checks of fields ---------------------------------------------------------------------


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_TEXT


def _is_hex(value: Any) -> bool:
    return isinstance(value, str) and _HEX.fullmatch(value) is not None


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 53


def _is_status(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 255


def _is_time(value: Any) -> bool:
    # Of the years that `time.localtime` knows everywhere.
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value < 1 << 32


def _is_plain(value: Any) -> bool:
    is_time = type(value) is float and math.isfinite(value)
    return value is None or _is_flag(value) or _is_number(value) or _is_text(value) or is_time


def _is_list_of(check: _Check, most: int = _MOST_ENTRIES) -> _Check:
    return lambda value: (
        isinstance(value, list) and len(value) <= most and all(map(check, value))
    )


def _is_settings(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= 64 and all(map(_is_plain, value.values()))


_BY_TYPE: Mapping[str, _Check] = {
    "str": _is_text,
    "int": _is_number,
    "float": _is_time,
    "bool": _is_flag,
    "int | None": lambda value: value is None or _is_number(value),
    "tuple[Any, ...]": _is_list_of(_is_plain, 16),
}
_CAUSE_FIELDS: Mapping[str, _Check] = {
    **{field.name: _BY_TYPE[str(field.type)] for field in dataclasses.fields(RestartCause)},
    "status": _is_status,
}


def _is_cause(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == _CAUSE_FIELDS.keys()
        and all(check(value[name]) for name, check in _CAUSE_FIELDS.items())
    )


def _is_decision(value: Any) -> bool:
    return value is None or _is_cause(value)


_DECISION: Mapping[str, _Check] = {"cause": _is_decision, "repeated": _is_flag}
_KINDS: Mapping[str, Mapping[str, _Check]] = {
    # The proof that both know the token.
    "welcome": {"protocol": _is_number, "nonce": _is_hex},
    "hello": {"protocol": _is_number, "nonce": _is_hex, "proof": _is_hex},
    "admitted": {"proof": _is_hex},
    "denied": {"protocol": _is_number},
    # From a launcher to the coordinator.
    "join": {
        "rank": _is_number,
        "identity": _is_hex,
        "settings": _is_settings,
        "restarts": _is_list_of(_is_cause, 1000),
    },
    "ready": {},
    "done": {},
    "failed": {"cause": _is_cause},
    "bye": {"status": _is_status},
    "alive": {},
    # From the coordinator to a launcher.
    "refused": {"why": _is_text},
    "start": {"active": _is_list_of(_is_number)},
    "again": _DECISION,
    "over": _DECISION,
}
