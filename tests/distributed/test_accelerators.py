"""Replicas, root copies and shards on several ranks of the stand-in for an accelerator."""

import importlib
import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from .harness import started, wait
from .standin_settings import PRESETS, expected

SHARDED = ("fsdp2", "pieces", "one slice")
LAYOUTS = ("replicas", "root copies", *SHARDED)


def some_or_all(some: Iterable[tuple[str, str]], all_: Iterable[tuple[str, str]]) -> Any:
    """Parametrize a test by cases that the same processes go through; all of them are slow."""
    return pytest.mark.parametrize(
        "cases", [[*some], pytest.param([*all_], marks=pytest.mark.slow)], ids=["some", "all"]
    )


def _case(name: str, calls: list[tuple[Any, ...]]) -> list[Any]:
    case = getattr(importlib.import_module("distributed.accelerators"), name)  # registers the stand-in
    return [case(*args) for args in calls]


def on_ranks(world: int, name: str, calls: list[tuple[Any, ...]]) -> list[list[Any]]:
    """Call a case on all ranks, for each of these arguments; return for each the results of all ranks."""
    with started(_case, world, name, calls) as ranks:
        wait(ranks, 120.0)
        assert not any(rank.error for rank in ranks), "\n".join(rank.error for rank in ranks)
        return [*map(list, zip(*(rank.result for rank in ranks), strict=True))]


SOME = [
    *(("replicas", "classic, asynchronous"), ("root copies", "soap, asynchronous")),
    *(("fsdp2", "default, asynchronous"), ("pieces", "classic")),
]


# Each layout with two presets and each preset with one or two layouts: all pairs take minutes.
MORE = [("replicas", "soap"), ("one slice", "default, asynchronous")]
MORE += [pair for i, pair in enumerate(itertools.product(LAYOUTS, PRESETS)) if (i + i // len(PRESETS)) % 3 == 0]


@some_or_all(SOME, MORE)
def test_steps_are_those_of_one_process_and_the_host_reads_nothing(cases: list[tuple[str, str]]) -> None:
    calls = [(layout, preset, expected(preset, 6)) for layout, preset in cases]
    for (layout, preset, _), results in zip(calls, on_ranks(2, "trajectory", calls), strict=True):
        for reads, _ in results:
            assert reads[1:] == [0] * 6, (layout, preset, reads)


@some_or_all(
    [("root copies", "default"), ("fsdp2", "soap"), ("one slice", "soap, asynchronous")],
    MORE[::2],
)
def test_checkpoints_go_out_and_in(cases: list[tuple[str, str]], tmp_path: Path) -> None:
    calls = [(*case, tmp_path / "-".join(case), expected(case[1], 6)) for case in cases]
    on_ranks(2, "checkpoints", calls)


@pytest.mark.slow
def test_depth_and_blocks_add_no_launches() -> None:
    layouts = ("replicas", "root copies", "one slice", "fsdp2")
    cases = [(layout, layers, 8) for layout in layouts for layers in (2, 4)]
    *results, fine = on_ranks(2, "launches", [*cases, ("fsdp2", 2, 4)])
    for layout, usual, deep in zip(layouts, results[::2], results[1::2], strict=True):
        for ((first, second), _), ((_, deeper), _) in zip(usual, deep, strict=True):
            assert first == second
            assert Counter(deeper) == Counter(first), layout
    for (_, calls), (_, for_many) in zip(results[-2], fine, strict=True):
        assert for_many < 1.25 * calls  # of the host, for four times as many blocks


REFUSED = {
    "NaN": "step 4 was refused: the gradient of 'group0.param",
    "not averaged": "step 4 was refused: the largest norm of a gradient is",
    "another rate": "step 4 was refused: ranks 0 and 1 differ in lr",
    "no rate": "step 4 was refused: in group 0 lr must be",
    "no gradient": "step 4 was refused: rank 0 has gradients for",
    "another shape": "step 4 was refused: 'group0.param0' has shape (3, 3) and had",
}


ELSEWHERE = {("fsdp2", "another shape"), *itertools.product(SHARDED, ["not averaged"])}
"""Faults that do not occur: nobody exchanges ``.data`` of a ``DTensor``, and shards have no replicas to differ from."""


@some_or_all(
    [
        *(("replicas", name) for name in ("not averaged", "another rate")),
        ("fsdp2", "no gradient"),
        ("one slice", "NaN"),
        ("pieces", "another shape"),
    ],
    [
        *(("replicas", name) for name in ("NaN", "no rate", "no gradient", "another shape")),
        *[pair for pair in itertools.product(("root copies", *SHARDED), REFUSED) if pair not in ELSEWHERE][::2],
    ],
)
def test_what_a_step_cannot_use_is_refused_by_all_at_the_next_one(cases: list[tuple[str, str]]) -> None:
    calls = [(layout, name, expected("default", 6)) for layout, name in cases]
    for (layout, name, _), results in zip(calls, on_ranks(2, "fault", calls), strict=True):
        for rank, (errors, skipped, reads) in enumerate(results):
            assert errors[0] == "", (layout, name, errors)
            assert REFUSED[name] in errors[1], (layout, name, errors)
            assert "no parameter and no state was changed" in errors[1]
            news = rank == 1 and name in ("no rate", "no gradient", "another shape")
            assert (skipped, reads) == (0, [int(news), 0]), (layout, name, skipped, reads)


def test_state_that_one_rank_lost_is_refused_after_a_step_that_is_skipped() -> None:
    """Only this rank has news at first; from then on all ranks wait for what the others say."""
    calls = [("replicas", "no state", expected("default", 6))]
    for errors, skipped, reads in on_ranks(2, "fault", calls)[0]:
        assert errors[0] == ""
        assert all("the step of group0.param0 is " in error for error in errors[1:]), errors
        assert (skipped, reads[1]) == (1, 0)


def test_parameters_that_only_one_stage_begins_to_train() -> None:
    """The step in which they come is skipped by all; where all ranks have new ones, it costs a read and no step."""
    alone, together = on_ranks(2, "new_parameters", [(True,), (False,)])
    for skipped, steps, reads in alone:
        assert (skipped, steps, reads[-1]) == (1, [5, 5], 0)
    for skipped, steps, reads in together:
        assert (skipped, steps, reads[-1]) == (0, [6, 6], 0)
