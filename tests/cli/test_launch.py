"""Tests that a run which ends names the rank that failed first, whichever is heard first."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shampoo3d.cli.train import launch
from shampoo3d.cli.train.settings import RunError, Settings

LOST = "connection closed by peer"


def told(endings: list[int], errors: dict[int, str], heard: int) -> str:
    """Let each rank end with its exit code, or by the signal of a negative one; return what the run says."""
    processes = launch._Processes(Settings(output=Path("run")))
    for ending in endings:
        code = f"import os, sys; os.kill(os.getpid(), {-ending})" if ending < 0 else f"raise SystemExit({ending})"
        process = subprocess.Popen([sys.executable, "-c", code], text=True)
        process.wait()
        processes.processes.append(process)
    for rank, message in errors.items():
        processes.messages.put((rank, {"event": "error", "message": message}))
    processes.messages.put((heard, None))
    with pytest.raises(RunError) as failure:
        processes.watch(lambda record: None)
    return str(failure.value)


def test_a_killed_rank_comes_before_those_that_lost_it() -> None:
    message = told([1, -signal.SIGKILL, 1, 0], {0: LOST, 2: LOST}, heard=0)
    assert "rank 1 of 4 was killed by SIGKILL" in message
    assert "--resume" in message


def test_the_first_error_comes_before_those_that_follow() -> None:
    assert "rank 2 of 4 stopped: wrong" in told([1, 0, 1, 0], {2: "wrong", 0: LOST}, heard=0)


def test_an_error_comes_before_an_abort() -> None:
    assert "rank 1 of 4 stopped: wrong" in told([-signal.SIGABRT, 1, 0, 0], {1: "wrong"}, heard=0)


@pytest.mark.parametrize(("ending", "words"), [(-signal.SIGABRT, "killed by SIGABRT"), (3, "exit code 3")])
def test_a_rank_without_words(ending: int, words: str) -> None:
    message = told([0, 0, ending, 0], {}, heard=2)
    assert "rank 2 of 4" in message
    assert words in message
