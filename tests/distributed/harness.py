"""Run a function on N real processes that talk over gloo on loopback, and bring every rank's result back to the test.

A fork server imports torch and DeepSpeed once; every rank of every case is forked from it in milliseconds, although
pytest's own process may already have threads.
"""

import faulthandler
import functools
import importlib.util
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT = timedelta(seconds=60)
SECONDS_AFTER_FAILURE = 5.0
SECONDS_TO_LEAVE = 2.0
PRELOADED = [
    *("numpy", "pytest", "torch.distributed", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"),
    *("torch._dynamo", "deepspeed.pipe", "deepspeed.runtime.pipe.engine", "deepspeed.runtime.zero.muon.muon_optimizer"),
    *("deepspeed.runtime.zero.stage3", "deepspeed.runtime.superoffload.superoffload_stage3"),
]

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")


class RankFailedError(RuntimeError):
    """One or more ranks raised, died or hung; the message holds each one's traceback."""


def run(case: Callable[..., Any], world: int, *args: Any, seconds: float = 120.0) -> list[Any]:
    """Call `case(*args)` on `world` ranks of one gloo process group; return the results in rank order.

    `case`, its arguments and its results are pickled. A rank's exception fails the test with the rank's traceback.
    Ranks that take longer than `seconds` are killed, and the error shows where each of them stood.
    """
    with started(case, world, *args, seconds=seconds) as ranks:
        wait(ranks, seconds)
    if failures := [rank.failure for rank in ranks if rank.error]:
        raise RankFailedError("\n".join(failures))
    return [rank.result for rank in ranks]


@contextmanager
def started(
    case: Callable[..., Any],
    world: int,
    *args: Any,
    seconds: float = 120.0,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
) -> Iterator[list["Rank"]]:
    """As `run`, for tests in which ranks are lost: the processes, which are ended on the way out."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        given = (Path(folder), seconds, timeout, case, args)
        ranks = [Rank(rank, world, store.port, *given) for rank in range(world)]
        try:
            yield ranks
        finally:
            for rank in ranks:
                rank.end()


class Rank:
    """One process, as the test sees it.

    Attributes:
        result: what its case returned; ``error``: why there is none, and ``failure`` the same with what it printed.
    """

    def __init__(
        self, rank: int, world: int, port: int, folder: Path, seconds: float, timeout: timedelta, case: Any, args: Any
    ) -> None:
        self.rank, self.result, self.error, self.failure = rank, None, "", ""
        self.log = folder / f"rank{rank}.log"
        self.connection, theirs = connection.Pipe()
        work = pickle.dumps((case, args))
        self.process: BaseProcess = _server().Process(
            target=_rank_main, args=(rank, world, port, str(self.log), seconds, timeout, work, theirs), daemon=True
        )
        self.process.start()
        theirs.close()

    def receive(self) -> None:
        try:
            self.result, self.error = pickle.loads(self.connection.recv_bytes())
        except EOFError:
            self.process.join()
            self.error = f"died with exit code {self.process.exitcode}"

    def end(self) -> None:
        self.connection.close()
        self.process.join(0 if self.error else SECONDS_TO_LEAVE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        log = self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""
        self.failure = f"rank {self.rank}: {self.error}\n{log}"


def wait(ranks: list[Rank], seconds: float, patience: float = SECONDS_AFTER_FAILURE) -> None:
    """Collect results until all are here, time is up, or the peers of a failed rank had their time to fail, too."""
    waiting = {rank.connection: rank for rank in ranks}
    start = time.monotonic()
    deadline = start + seconds + 1.0
    while waiting:
        ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            for rank in waiting.values():
                rank.error = f"no result after {time.monotonic() - start:.0f} s"
            return
        for pipe in ready:
            rank = waiting.pop(pipe)
            rank.receive()
            if rank.error:
                deadline = min(deadline, time.monotonic() + patience)


@functools.cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    environment = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "TORCH_EXTENSIONS_DIR": tempfile.gettempdir(),
    }
    with mock.patch.dict(os.environ, environment):
        forkserver.ensure_running()
    return context


def _rank_main(
    rank: int,
    world: int,
    port: int,
    log: str,
    seconds: float,
    timeout: timedelta,
    work: bytes,
    results: connection.Connection,
) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.dump_traceback_later(seconds, file=descriptor)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    try:
        case, args = pickle.loads(work)
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
        results.send_bytes(pickle.dumps((case(*args), "")))
        results.poll(None)  # until all ranks are done: leaving earlier would cut the connections of the others
    except BaseException:
        results.send_bytes(pickle.dumps((None, traceback.format_exc())))
    os._exit(0)  # the threads of process groups that are left over after an error may never end
