"""Each planted fault has its place: one that cannot be planted proves nothing."""

from __future__ import annotations

import pytest

from tests.mutants import MUTANTS, ROOT

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("name", MUTANTS)
def test_it_can_be_planted(name: str) -> None:
    mutant = MUTANTS[name]
    assert (ROOT / "tfdist" / mutant.file).read_text().count(mutant.right) == 1
    assert (ROOT / mutant.tests.split()[0]).exists()
