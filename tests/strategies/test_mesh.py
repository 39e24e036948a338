"""Where replicas stand on the axes of a mesh, and what that means for a batch."""

from __future__ import annotations

import pytest

from tfdist import data
from tfdist.errors import ArgumentError
from tfdist.strategies.base import Place
from tfdist.strategies.mesh import Mesh

pytestmark = pytest.mark.quick

MESH = Mesh((("data", 2), ("pipe", 1), ("model", 3)))


def test_the_last_axis_is_counted_first() -> None:
    assert MESH.size == 6
    assert [MESH.coordinate("data", r) for r in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [MESH.coordinate("model", r) for r in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [MESH.coordinate("pipe", r) for r in range(6)] == [0] * 6


def test_groups_differ_along_one_axis_only() -> None:
    assert MESH.groups("data") == ((0, 3), (1, 4), (2, 5))
    assert MESH.groups("model") == ((0, 1, 2), (3, 4, 5))
    assert MESH.groups("pipe") == tuple((r,) for r in range(6))


@pytest.mark.parametrize(
    "axes", [(("rows", 2),), (("data", 2), ("data", 2)), (("data", 2), ("model", 0))]
)
def test_a_mesh_that_is_none_is_refused(axes: tuple[tuple[str, int], ...]) -> None:
    with pytest.raises(ArgumentError, match="A mesh must have distinct axes out of data"):
        Mesh(axes)


def test_a_mesh_has_a_place_for_each_replica() -> None:
    with pytest.raises(ArgumentError, match=r"4 replicas and the mesh data 2 x pipe 1 x model"):
        Place(4, mesh=MESH)


def test_a_batch_is_split_along_the_data_axis_only() -> None:
    place = Place(6, mesh=MESH)
    assert place.num_shares == 2
    assert [data.bounds(5, r, place) for r in range(6)] == [(0, 2)] * 3 + [(2, 5)] * 3
    assert place.describe(5) == "6 replicas (data 2 x pipe 1 x model 3), batch 5 = 2 + 3"
    assert Place(2).describe(5) == "2 replicas, batch 5 = 2 + 3"
