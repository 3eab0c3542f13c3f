"""Every kind of fault in every layout, for real: what each rank says, in time, and that nothing is lost.

The table of docs/faults.md.
"""

import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from common import beside, slow_but
from shampoo3d.distributed.topology import Claims
from shampoo3d.engines.native import Torch

from . import faults
from .faults import LAYOUTS, LOST, Outcome, attempted, failing_storage, odd, with_faults
from .harness import needs_deepspeed, run, started, wait
from .settings import shampoo

pytestmark = needs_deepspeed
SECONDS = 30.0
SHORT = timedelta(seconds=4)
MAKE = shampoo("default")
REPLICATED = ("ddp", "pipeline")
"""The layouts in which ranks have the same gradients."""
IN_EVERY_LAYOUT = slow_but(["ddp", "zero3", "pipeline"], LAYOUTS)


def _refused(outcomes: list[Outcome], kind: str, *words: str) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome.kind == kind, f"rank {rank}: {outcome}"
        assert all(word in outcome.words for word in words), f"rank {rank}: {outcome.words}"
        assert outcome.unchanged, f"rank {rank}"


# --- what a step is given


def _given(layout: str, names: list[str]) -> tuple[dict[tuple[str, str], Outcome], int, bool]:
    """Return the ends of attempts with faults, how many were skipped, and whether the run went on as without them."""
    session = LAYOUTS[layout].session(MAKE).train(0, 2)
    found = with_faults(session.optimizer, names)
    session.train(2, 3)
    expected = LAYOUTS[layout].session(MAKE).train(0, 3).weights()
    same = all(torch.equal(weight, expected[name]) for name, weight in session.weights().items())
    return found, session.optimizer.skipped_steps, same


@pytest.mark.parametrize("layout", IN_EVERY_LAYOUT)
def test_what_a_step_cannot_use_is_skipped_or_refused_by_all(layout: str) -> None:
    names = [name for name in faults.GIVEN if name != "not averaged" or layout in REPLICATED]
    results = run(_given, LAYOUTS[layout].world, layout, names, seconds=SECONDS)
    found = {key: [outcomes[key] for outcomes, _, _ in results] for key in results[0][0]}
    rank = LAYOUTS[layout].world - 1
    for name in ("NaN", "Inf"):
        _refused(found[name, "skip"], "", "")
        _refused(
            found[name, "raise"], "StepRefusedError", "weight' has a norm of", "must be finite", f"(on rank {rank})"
        )
    for policy in ("skip", "raise"):
        _refused(found["another rate", policy], "StepRefusedError", "differ in lr")
        if "not averaged" in names:
            _refused(
                found["not averaged", policy], "StepRefusedError", "replicas must have the same, averaged gradients"
            )
    assert [(skipped, same) for _, skipped, same in results] == [(2, True)] * len(results)


# --- ranks that differ


WORDS = {
    "another_setting": "but block_size is 6 on rank",
    "another_order": "but parameter 0 is ",
    "another_model": "up.weight",
}
# DeepSpeed at ZeRO 3 gathers parameters one by one when it starts, and ends there; shards of tensor parallelism are
# known by their names, in whatever order.
ELSEWHERE = {"zero3": ["another_order", "another_model"], "tensor-parallel": ["another_order"]}


def _different(layout: str, kinds: list[str]) -> list[Outcome]:
    optimizers = (LAYOUTS[layout].session(getattr(faults, kind)).optimizer for kind in kinds)
    return [attempted(optimizer, optimizer.bind) for optimizer in optimizers]


@pytest.mark.parametrize("layout", IN_EVERY_LAYOUT)
def test_ranks_that_differ_are_told_before_the_first_step(layout: str) -> None:
    kinds = [kind for kind in WORDS if kind not in ELSEWHERE.get(layout, [])]
    results = run(_different, LAYOUTS[layout].world, layout, kinds, seconds=SECONDS)
    for kind, *outcomes in zip(kinds, *results, strict=True):
        _refused(outcomes, "StepRefusedError", WORDS[kind])


# --- storage that fails on one rank


def _stored(layout: str, folder: Path) -> tuple[dict[str, Outcome], list[str], int]:
    """Return the ends of loading and saving, the folders there are, and the step that the good one is of."""
    optimizer, found = LAYOUTS[layout].session(MAKE).train(0, 2).optimizer, {}
    optimizer.save_checkpoint(folder / "good")
    for name in ("manifest.json", ".metadata", ".distcp"):
        with failing_storage(name, "r") if odd() else nullcontext():
            found[f"load {name}"] = attempted(optimizer, lambda: optimizer.load_checkpoint(folder / "good"))
    for mode in "wr":
        with failing_storage(".distcp", mode) if odd() else nullcontext():
            found[f"save {mode}"] = attempted(optimizer, lambda: optimizer.save_checkpoint(folder / "new"))
    names = sorted(path.name for path in folder.iterdir())
    optimizer.save_checkpoint(folder / "new")
    return found, names, optimizer.load_checkpoint(folder / "new").step


@pytest.mark.parametrize("layout", slow_but(["zero3"], LAYOUTS))
def test_storage_that_fails_on_one_rank(layout: str, tmp_path: Path) -> None:
    results = run(_stored, LAYOUTS[layout].world, layout, tmp_path, seconds=SECONDS)
    for what in results[0][0]:
        outcomes = [found[what] for found, _, _ in results]
        _refused(outcomes, "CheckpointError", "Input/output error", f"on rank {LAYOUTS[layout].world - 1}")
    assert [(names, step) for _, names, step in results] == [(["good", "new.partial"], 2)] * len(results)


# --- ranks that are lost


def _losing(layout: str, kind: str, folder: Path) -> tuple[Outcome, list[Outcome]]:
    """Return the end of the step in which a rank is lost, and of the steps after it."""
    # Groups that DeepSpeed makes have PyTorch's own timeout.
    with mock.patch.object(dist.distributed_c10d, "default_pg_timeout", SHORT):
        session = LAYOUTS[layout].session(MAKE).train(0, 2)
        session.optimizer.save_checkpoint(folder / "step-2")
        if odd():
            LOST[kind](session, SHORT)
        lost = attempted(session.optimizer, lambda: session.train(2, 3))
        later = (session.optimizer.step, lambda: session.optimizer.save_checkpoint(folder / "step-3"))
        return lost, [attempted(session.optimizer, attempt) for attempt in later]


def _resumed(layout: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights after four steps: from the checkpoint, and at once."""
    session = LAYOUTS[layout].session(MAKE)
    session.optimizer.load_checkpoint(folder / "step-2")
    return session.train(2, 4).weights(), LAYOUTS[layout].session(MAKE).train(0, 4).weights()


FAST = [("ddp", "dies within"), ("zero3", "dies before"), ("zero3", "raises")]
MORE = [*zip(LAYOUTS, 2 * [*LOST], strict=False), *((layout, "dies within") for layout in LAYOUTS)]


@pytest.mark.parametrize(("layout", "kind"), beside(FAST, MORE))
def test_a_rank_that_is_lost(layout: str, kind: str, tmp_path: Path) -> None:
    world = LAYOUTS[layout].world
    with started(_losing, world, layout, kind, tmp_path, seconds=SECONDS, timeout=SHORT) as ranks:
        start = time.monotonic()
        wait(ranks, SECONDS, patience=SECONDS)
        assert time.monotonic() - start < SECONDS
    *others, last = ranks
    _check_lost(others, "in step 3" if kind == "dies within" else "before step 3")
    if kind == "hangs":
        _check_lost([last], "before step 3")
    elif kind == "raises":
        assert "SystemExit: no such file" in last.error
    else:
        assert last.error == "died with exit code -9"
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]
    if kind == "dies within":
        for resumed, at_once in run(_resumed, world, layout, tmp_path, seconds=SECONDS):
            for name, weight in at_once.items():
                assert torch.equal(resumed[name], weight), name


def _check_lost(ranks: list[Any], when: str) -> None:
    for rank in ranks:
        assert not rank.error, rank.failure
        lost, later = rank.result
        assert lost.kind == "RankLostError", lost
        assert f"{when}: not all of the ranks 0, 1" in lost.words
        assert ("the agreement" if when.startswith("before") else "the exchange of ") in lost.words
        assert lost.seconds < SHORT.total_seconds() + 5.0
        assert lost.unchanged or when.startswith("in")
        unfinished = "UnfinishedStepError" if when.startswith("in") else "RankLostError"
        assert [outcome.kind for outcome in later] == [unfinished] * len(later)


def _hanging_save(layout: str, folder: Path) -> Outcome:
    optimizer = LAYOUTS[layout].session(MAKE).train(0, 2).optimizer
    optimizer.save_checkpoint(folder / "step-2")
    if odd():
        time.sleep(SHORT.total_seconds() + 2.0)
    return attempted(optimizer, lambda: optimizer.save_checkpoint(folder / "step-3"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "zero1"])
def test_a_rank_that_hangs_while_others_save(layout: str, tmp_path: Path) -> None:
    with started(_hanging_save, 2, layout, tmp_path, seconds=SECONDS, timeout=SHORT) as ranks:
        wait(ranks, SECONDS)
    for rank in ranks:
        assert rank.result.kind == "RankLostError", rank.result
        assert f"about the checkpoint {tmp_path / 'step-3'}: not all of the ranks 0, 1 took part" in rank.result.words
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


def _timeouts() -> list[timedelta]:
    parallel = Torch().locate(Claims(), [])
    groups = [parallel.group((0, 1, 2)), parallel.group((0, 1) if parallel.rank < 2 else (2,))]
    handles: list[Any] = [group.handle for group in groups if group.handle is not None]
    return [handle._get_backend(torch.device("cpu")).options._timeout for handle in handles]


def test_groups_have_the_timeout_of_all_ranks() -> None:
    with started(_timeouts, 3, seconds=SECONDS, timeout=SHORT) as ranks:
        wait(ranks, SECONDS)
    assert [rank.result for rank in ranks] == [[SHORT, SHORT], [SHORT, SHORT], [SHORT]]
