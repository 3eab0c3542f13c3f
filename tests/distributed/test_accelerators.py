"""Replicas, root copies and shards on several ranks of the stand-in for an accelerator."""

import importlib
from typing import Any

import pytest

from .harness import started, wait
from .standin_settings import PRESETS, expected

LAYOUTS = ("replicas", "root copies", "pieces", "one slice")


def _case(name: str, calls: list[tuple[Any, ...]]) -> list[Any]:
    case = getattr(importlib.import_module("distributed.accelerators"), name)  # registers the stand-in
    return [case(*args) for args in calls]


def on_ranks(world: int, name: str, calls: list[tuple[Any, ...]]) -> list[list[Any]]:
    """Call a case on all ranks, for each of these arguments; return for each the results of all ranks."""
    with started(_case, world, name, calls) as ranks:
        wait(ranks, 60.0)
        assert not any(rank.error for rank in ranks), "\n".join(rank.error for rank in ranks)
        return [*map(list, zip(*(rank.result for rank in ranks), strict=True))]


def test_steps_are_those_of_one_process_and_the_host_reads_nothing() -> None:
    calls = [(layout, preset, expected(preset, 6)) for layout in LAYOUTS for preset in PRESETS]
    for (layout, preset, _), results in zip(calls, on_ranks(2, "trajectory", calls), strict=True):
        for reads, _ in results:
            assert reads[1:] == [0] * 6, (layout, preset, reads)
