"""Processes are shared by cases, and no case can tell."""

import os
import sys

import pytest
import torch.distributed as dist
from torch.nn import functional

from .harness import RankFailedError, needs_deepspeed, patches, run
from .models import Shape
from .settings import shampoo
from .training import Topology, with_deepspeed
from .zero import Recipe, Zero, with_zero


def _raises_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("of this rank only")
    dist.barrier()


def test_processes_go_on_until_a_case_fails() -> None:
    first = run(os.getpid, 2)
    assert run(os.getpid, 2) == first
    with pytest.raises(RankFailedError, match="ValueError: of this rank only"):
        run(_raises_on_rank_1, 2)
    assert not set(run(os.getpid, 2)) & set(first)


def _dies_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(3)


def test_a_process_that_dies_fails_its_case_only() -> None:
    with pytest.raises(RankFailedError, match="died with exit code 3"):
        run(_dies_on_rank_1, 2)
    assert len(run(os.getpid, 2)) == 2


def _of_the_process() -> list[object]:
    groups = sys.modules["deepspeed.utils.groups"]
    return [functional.linear.__module__, os.path.sep, groups.mpu is None]


def _changes() -> list[object]:
    with_zero(Shape(), Zero(3), Recipe(shampoo("whole", "float32")))
    with_deepspeed(Shape(), Topology(data=1, model=2), shampoo("whole"))
    patches.setattr(os.path, "sep", "?")
    return _of_the_process()


@needs_deepspeed
def test_what_a_case_leaves_behind_is_undone() -> None:
    before, changed, after = (run(case, 2) for case in (_of_the_process, _changes, _of_the_process))
    assert before == after
    assert all(old != new for old, new in zip(before[0], changed[0], strict=True))
