"""The grid of ranks, against the definition: the last axis varies fastest."""

import itertools

import pytest

from shampoo3d.distributed.topology import Claims, ParallelGroups, Topology

GRID = Topology(("pipe", "data", "model"), (2, 3, 2))


def test_coordinates_count_through_the_grid() -> None:
    assert GRID.world_size == 12
    assert [GRID.coordinates(r) for r in range(12)] == list(itertools.product(range(2), range(3), range(2)))


def test_peers_share_all_coordinates_but_one() -> None:
    assert GRID.peers(0, "data") == (0, 2, 4)
    assert GRID.peers(9, "data") == (7, 9, 11)
    assert GRID.peers(9, "model") == (8, 9)
    assert GRID.peers(9, "pipe") == (3, 9)


def test_deepspeeds_topology_is_read_and_agrees() -> None:
    theirs = pytest.importorskip("deepspeed.runtime.pipe.topology").PipeModelDataParallelTopology(2, 2, 3)
    ours = Topology.of(theirs)
    for axis in ours.axes:
        lists = {rank: tuple(ranks) for ranks in theirs.get_axis_comm_lists(axis) for rank in ranks}
        assert all(ours.peers(rank, axis) == lists[rank] for rank in range(12))


def test_anything_else_is_refused_by_type() -> None:
    with pytest.raises(TypeError, match=r"topology must be a DeviceMesh, a process group, or a DeepSpeed .* got int"):
        Topology.of(4)


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        (Claims(world_rank=1), "world_rank was given as 1, but one process says 0"),
        (Claims(world_size=4), "world_size was given as 4, but one process says 1"),
        (Claims(topology=GRID), "topology's number of ranks was given as 12, but one process says 1"),
    ],
)
def test_claims_that_contradict_what_is_found_name_both(claims: Claims, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        claims.check(ParallelGroups.alone())
