"""The rule finds what it forbids, and nothing else."""

from __future__ import annotations

import pytest

from tests.lint.class_names import repeated

pytestmark = pytest.mark.quick


def test_a_repeated_name_is_found() -> None:
    sources = {"a.py": "class A: pass", "b.py": "\ndef f():\n    class A: pass"}
    assert list(repeated(sources)) == ["A: a.py:1, b.py:3"]


def test_other_names_are_left_alone() -> None:
    assert not list(repeated({"a.py": "class A: pass\nA()", "b.py": "from a import A\nB = A"}))
