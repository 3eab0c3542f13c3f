"""Replicas, root copies and shards on several ranks of the stand-in for an accelerator."""

import importlib
from typing import Any

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


REFUSED = {
    "NaN": "step 4 was refused: the gradient of 'group0.param",
    "not averaged": "step 4 was refused: the largest norm of a gradient is",
    "another rate": "step 4 was refused: ranks 0 and 1 differ in lr",
    "no rate": "step 4 was refused: in group 0 lr must be",
    "no gradient": "step 4 was refused: rank 0 has gradients for",
    "another shape": "step 4 was refused: 'group0.param0' has shape (3, 3) and had",
}


def test_what_a_step_cannot_use_is_refused_by_all_at_the_next_one() -> None:
    calls = [(layout, name, expected("default", 6)) for layout in LAYOUTS for name in REFUSED]
    calls = [call for call in calls if call[0] in ("replicas", "root copies") or call[1] != "not averaged"]
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
