"""Values of replicas that differ are noticed, however ranks tell of their shards."""

from types import SimpleNamespace
from typing import Any

import pytest

from shampoo3d.planning.shards import Shard
from shampoo3d.runtime.records import Stored, Summary, _differ_in_values

SHARD = Shard.whole((2, 2))


def record(*, sharded: bool) -> Any:
    """Two matrices of one kind."""
    sharding = SimpleNamespace(sharded=sharded)
    return SimpleNamespace(kinds=[[0, 1]], common=SimpleNamespace(shardings=[sharding, sharding]))


def as_one(fingerprint: str, total: float = 1.0) -> Summary:
    return Summary([(0,)], {0: Stored(SHARD, fingerprint, total)}, {})


def one_by_one(first: str, second: str) -> Summary:
    return Summary([(0,)], {}, {0: Stored(SHARD, first, 0.5), 1: Stored(SHARD, second, 0.5)})


@pytest.mark.parametrize(
    ("told", "differ"),
    [
        ((as_one("a"), as_one("a")), False),
        ((as_one("a"), as_one("b")), True),
        ((one_by_one("a", "b"), one_by_one("a", "b")), False),
        ((one_by_one("a", "b"), one_by_one("a", "c")), True),
        ((as_one("ab"), one_by_one("a", "b")), True),  # perhaps: only all the sums can tell
    ],
)
def test_replicas(told: tuple[Summary, Summary], differ: bool) -> None:
    assert _differ_in_values(dict(enumerate(told)), record(sharded=False)) == differ


def test_shard_groups_have_equal_sums() -> None:
    other = Summary([(1,)], {0: Stored(SHARD, "b", 1.0 + 1e-12)}, {})
    assert not _differ_in_values({0: as_one("a"), 1: other}, record(sharded=True))
    other = Summary([(1,)], {0: Stored(SHARD, "b", 1.1)}, {})
    assert _differ_in_values({0: as_one("a"), 1: other}, record(sharded=True))
