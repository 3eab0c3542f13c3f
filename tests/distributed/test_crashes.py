"""kill -9 of one rank or of all, at random moments of training and of saving: nothing is lost."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .faults import LAYOUTS
from .harness import Rank, needs_deepspeed, run, started, wait
from .settings import shampoo

STEPS, WORLD = 24, 2
SAVED = range(2, STEPS + 1, 2)
TIMEOUT = timedelta(seconds=10)
SECONDS = 60.0
MAKE = shampoo("default")
Weights = dict[str, Tensor]


def _trained(layout: str, folder: Path, newest: Path | None, begun: Path) -> list[Weights]:
    """From the newest checkpoint to the last step, with a checkpoint after every other; the weights then."""
    session = LAYOUTS[layout].session(MAKE)
    (begun / os.environ["RANK"]).touch()
    first = session.optimizer.load_checkpoint(newest).step if newest else 0
    found, saving = [], begun / f"saving-{os.environ['RANK']}"
    for step in range(first, STEPS, 2):
        found.append(session.train(step, step + 2).weights())
        saving.touch()
        session.optimizer.save_checkpoint(folder / f"step-{step + 2}")
        saving.unlink()
    return found


def _loaded(layout: str, folder: Path) -> list[Weights]:
    """The weights of all checkpoints."""
    session, found = LAYOUTS[layout].session(MAKE), []
    for step in SAVED:
        assert session.optimizer.load_checkpoint(folder / f"step-{step}").step == step
        found.append(session.weights())
    return found


def _complete(folder: Path) -> dict[int, Path]:
    names = [path.name.split("-")[1] for path in folder.iterdir()]
    return {int(name): folder / f"step-{name}" for name in names if name.isdigit()}


def _done(folder: Path) -> bool:
    return STEPS in _complete(folder)


@contextmanager
def _launched(layout: str, folder: Path) -> Iterator[tuple[list[Rank], Path]]:
    """Processes that have begun, and go on from the newest checkpoint; where there is a file while they save."""
    complete = _complete(folder)
    newest = complete[max(complete)] if complete else None
    begun = folder.with_name(f"{folder.name}-begun-{time.monotonic_ns()}")
    begun.mkdir()
    with started(_trained, WORLD, layout, folder, newest, begun, seconds=SECONDS, timeout=TIMEOUT) as ranks:
        _until(lambda: len(list(begun.iterdir())) == WORLD)
        yield ranks, begun


def _until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _crash(ranks: list[Rank], begun: Path, done: Callable[[], bool], chance: random.Random, seconds: float) -> str:
    """Kill one rank or all, in one case of two after a save has begun; what they were at, or empty if they were done.

    Args:
        seconds: what two steps and a save take.
    """

    def saving() -> bool:
        return any(begun.glob("saving-*"))

    if chance.random() < 0.5:
        _until(lambda: saving() or done())
    else:
        time.sleep(chance.uniform(0.0, 2.0 * seconds))
        _until(lambda: not saving())
    time.sleep(chance.uniform(0.0, 0.6 * seconds))
    victims = chance.choice([ranks, ranks[:1], ranks[1:]])
    doing = "saving" if saving() else "training"
    for rank in victims:
        os.kill(rank.process.pid, signal.SIGKILL)
    start = time.monotonic()
    wait(ranks, SECONDS, patience=SECONDS)
    assert time.monotonic() - start < TIMEOUT.total_seconds() + 5.0
    for rank in ranks:
        if rank not in victims and rank.error:
            # Also in an engine's collective, whose error is the engine's.
            assert "RankLostError" in rank.error or "/shampoo3d/" not in rank.error, rank.error
    return doing if any("exit code -9" in rank.error for rank in victims) else ""


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(("layout", "kills"), [("ddp", 4), ("zero1", 4), ("zero3", 5)])
def test_a_run_that_is_killed_again_and_again(layout: str, kills: int, tmp_path: Path) -> None:
    (tmp_path / "at-once").mkdir()
    with _launched(layout, tmp_path / "at-once") as (ranks, _):
        start = time.monotonic()
        wait(ranks, SECONDS)
        seconds = (time.monotonic() - start) / len(SAVED)
        expected = [rank.result for rank in ranks]
    chance, killed, number = random.Random(layout), Counter[str](), 0

    def enough() -> bool:
        return killed.total() >= kills and len(killed) == 2  # at training and at saving

    while not enough() and number < 4 * kills:
        number += 1
        folder = tmp_path / f"run-{number}"
        folder.mkdir()
        done = partial(_done, folder)
        while not done():
            with _launched(layout, folder) as (ranks, begun):
                if not enough():
                    killed.update(filter(None, [_crash(ranks, begun, done, chance, seconds)]))
                else:
                    wait(ranks, SECONDS)
                    assert not any(rank.error for rank in ranks), [rank.error for rank in ranks]
        assert sorted(path.name for path in folder.iterdir()) == sorted(f"step-{step}" for step in SAVED)
        for found, wanted in zip(run(_loaded, WORLD, layout, folder), expected, strict=True):
            for step, one, other in zip(SAVED, found, wanted, strict=True):
                for name, weight in other.items():
                    assert torch.equal(one[name], weight), f"{name} after step {step} of run {number}"
    print(f"{layout}: killed {dict(killed)}, in {number} runs")
    assert killed.total() >= kills
    assert len(killed) == 2, "all at the same work"
