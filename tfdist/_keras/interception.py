"""Standing between a step and the methods of Keras's classes, whoever holds the objects.

A model may keep its optimizers and metrics in attributes, dicts or closures, and subclass
them. So methods are replaced in the classes, and in all classes derived from them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Method = Callable[..., Any]
Replacement = tuple[Any, str, Any]


def in_family(base: type, name: str, wrap: Callable[[Method], Method]) -> list[Replacement]:
    """Replaces a method wherever a class or one derived from it defines it.

    Args:
        base: The class.
        name: Of the method.
        wrap: Makes what takes the place of a definition.

    Returns:
        Owners, names and new values, for `replaced`.
    """
    classes: dict[type, None] = {base: None}
    _add_derived(base, classes)
    return [(cls, name, wrap(vars(cls)[name])) for cls in classes if name in vars(cls)]


def _add_derived(cls: type, found: dict[type, None]) -> None:
    derived: type
    for derived in cls.__subclasses__():
        if derived not in found:
            found[derived] = None
            _add_derived(derived, found)
