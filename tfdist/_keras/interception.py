"""Replaces methods in Keras's classes and all their subclasses.

A model may store its optimizers and metrics in attributes, dicts or closures, and subclass
them. So their methods are replaced in the classes, not in the objects.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

Method = Callable[..., Any]
Replacement = tuple[Any, str, Any]


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replaces an attribute of a class or module while the context lasts.

    Args:
        owner: The class or module whose own `__dict__` has the attribute.
        name: The attribute's name.
        value: The new value.
    """
    original = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def in_family(base: type, name: str, wrap: Callable[[Method], Method]) -> list[Replacement]:
    """Lists replacements of a method, in each class of a family that defines it.

    Args:
        base: The base class.
        name: The method's name.
        wrap: Makes the replacement of a method.

    Returns:
        Classes, names and new values, for `replaced`.
    """
    classes: dict[type, None] = {base: None}
    _add_derived(base, classes)
    # Only classes that define the method themselves. All others inherit the replacement.
    return [(cls, name, wrap(vars(cls)[name])) for cls in classes if name in vars(cls)]


def _add_derived(cls: type, classes: dict[type, None]) -> None:
    derived: type
    for derived in cls.__subclasses__():
        # A class that inherits along two lines is listed once.
        if derived not in classes:
            classes[derived] = None
            _add_derived(derived, classes)
