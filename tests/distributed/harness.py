"""Run a function on N real processes that talk over gloo on loopback, and bring every rank's result back to the test.

A fork server imports torch, DeepSpeed and the package once; every rank is forked from it in milliseconds, although
pytest's own process may already have threads. Within `shared` the processes go on to the next case of as many ranks:
what DeepSpeed and the case itself leave behind in them is undone in between. After a case that fails they are ended.
"""

import faulthandler
import functools
import gc
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
RANKS_KEPT = 12
"""Beside those that work: the threads of gloo wake up a hundred times a second, also where they wait."""
CASES_PER_START = 30
"""A little of each stays, and is passed on."""
PRELOADED = [
    *("numpy", "pytest", "torch.distributed", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"),
    *("torch._dynamo", "deepspeed.pipe", "deepspeed.runtime.pipe.engine", "deepspeed.runtime.zero.muon.muon_optimizer"),
    *("deepspeed.runtime.zero.stage3", "deepspeed.runtime.superoffload.superoffload_stage3"),
    *("lightning", "transformers.trainer", "transformers.models.gpt2.modeling_gpt2"),  # where they are installed
    *("distributed.zero", "distributed.fsdp", "distributed.settings"),
]

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")


class RankFailedError(RuntimeError):
    """One or more ranks raised, died or hung; the message holds each one's traceback."""


patches = pytest.MonkeyPatch()
"""For what a case changes in its own process: undone after it."""
counts = {"starts": 0, "cases": 0}
"""Sets of processes that were started in this session, and cases that ran on them."""
_kept: dict[int, "Ranks"] | None = None


def run(case: Callable[..., Any], world: int, *args: Any, seconds: float = 120.0) -> list[Any]:
    """Call `case(*args)` on `world` ranks of one gloo process group; return the results in rank order.

    `case`, its arguments and its results are pickled. A rank's exception fails the test with the rank's traceback.
    Ranks that take longer than `seconds` are killed, and the error shows where each of them stood.
    """
    ranks = _kept.pop(world, None) if _kept is not None else None
    if ranks is None:
        _make_room(world)
        ranks = Ranks(world)
    succeeded = False
    try:
        ranks.give(case, args, seconds)
        wait(ranks.members, seconds)
        succeeded = not any(rank.error for rank in ranks.members)
    finally:
        if succeeded and _kept is not None and ranks.cases < CASES_PER_START:
            _kept[world] = ranks
        else:
            ranks.end()
    if not succeeded:
        failures = [rank.failure for rank in ranks.members if rank.error]
        raise RankFailedError("\n".join([f"case {ranks.cases} of these processes", *failures]))
    return [rank.result for rank in ranks.members]


def _make_room(world: int) -> None:
    """End the processes that are kept for fewer or more ranks, where they would be too many beside these."""
    while _kept and sum(_kept) + world > RANKS_KEPT:
        _kept.pop(max(_kept)).end()


@contextmanager
def shared() -> Iterator[None]:
    """Within it, the cases of `run` with as many ranks use the same processes."""
    global _kept
    _kept = {}
    try:
        yield
    finally:
        kept, _kept = _kept, None
        for ranks in kept.values():
            ranks.end()


@contextmanager
def started(
    case: Callable[..., Any],
    world: int,
    *args: Any,
    seconds: float = 120.0,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
) -> Iterator[list["Rank"]]:
    """Run like `run`, for tests in which ranks are lost: processes of its own, which are ended on the way out."""
    ranks = Ranks(world, timeout)
    try:
        ranks.give(case, args, seconds)
        yield ranks.members
    finally:
        ranks.end()


class Ranks:
    """Processes of one process group, that do one case after another."""

    def __init__(self, world: int, timeout: timedelta = COLLECTIVE_TIMEOUT) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.folder = tempfile.TemporaryDirectory()
        self.members = [Rank(rank, world, self.store.port, Path(self.folder.name), timeout) for rank in range(world)]
        self.cases = 0
        counts["starts"] += 1

    def give(self, case: Callable[..., Any], args: tuple[Any, ...], seconds: float) -> None:
        work = pickle.dumps((seconds, case, args))
        for rank in self.members:
            with suppress(BrokenPipeError):  # a rank that is dead says so when its result is awaited
                rank.connection.send_bytes(work)
        self.cases += 1
        counts["cases"] += 1

    def end(self) -> None:
        for rank in self.members:
            rank.connection.close()
        for rank in self.members:
            rank.end()
        self.folder.cleanup()


class Rank:
    """One process, as the test sees it.

    Attributes:
        result: what its case returned; ``error``: why there is none, and ``failure`` the same with what it printed.
    """

    def __init__(self, rank: int, world: int, port: int, folder: Path, timeout: timedelta) -> None:
        self.rank, self.result, self.error, self.failure = rank, None, "", ""
        self.log = folder / f"rank{rank}.log"
        self.connection, theirs = connection.Pipe()
        self.process: BaseProcess = _server().Process(
            target=_rank_main, args=(rank, world, port, str(self.log), timeout, theirs), daemon=True
        )
        self.process.start()
        theirs.close()

    def receive(self) -> None:
        try:
            self.result, self.error = pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join()
            self.error = f"died with exit code {self.process.exitcode}"

    def end(self) -> None:
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


def _rank_main(rank: int, world: int, port: int, log: str, timeout: timedelta, cases: connection.Connection) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    gc.freeze()  # what is imported already need not be looked through after each case
    join = functools.partial(_join, rank, world, port, timeout)
    with suppress(EOFError):  # no more cases: all ranks are done; leaving earlier would cut the others' connections
        while True:
            work = cases.recv_bytes()
            os.ftruncate(descriptor, 0)
            try:
                with _undone():
                    cases.send_bytes(_done(work, join, descriptor))
            except BaseException:
                cases.send_bytes(pickle.dumps((None, traceback.format_exc())))
                break
    os._exit(0)  # the threads of process groups that are left over after an error may never end


def _join(rank: int, world: int, port: int, timeout: timedelta) -> None:
    if dist.is_initialized():
        # Fails if the case before has left ranks out of step. PyTorch names a new group by the number of groups that a
        # process has: ranks that had different ones before would wait for each other under different names, and names
        # are not used twice.
        names, counts = dist.distributed_c10d._world.pg_names, [0] * world
        dist.all_gather_object(counts, len(names))
        for group in [group for group in names if isinstance(group, dist.ProcessGroup) and group != dist.group.WORLD]:
            if not group.group_desc.startswith("mesh_"):  # PyTorch's tables of what to do with sharded tensors know it
                dist.destroy_process_group(group)
        names.update({object(): f"none-{len(names) + i}" for i in range(max(counts) - len(names))})  # type: ignore[misc]
        return
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)


def _done(work: bytes, join: Callable[[], None], log: int) -> bytes:
    """The pickled result of a pickled case."""
    seconds, case, args = pickle.loads(work)
    faulthandler.dump_traceback_later(seconds, file=log)
    join()
    result = pickle.dumps((case(*args), ""))
    faulthandler.cancel_dump_traceback_later()
    return result


@contextmanager
def _undone() -> Iterator[None]:
    """Every case finds the process as a new one: DeepSpeed knows no groups, and ZeRO 3 has replaced no function."""
    torch.manual_seed(0)
    patches.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
    yield
    patches.undo()
    if groups := sys.modules.get("deepspeed.utils.groups"):
        importlib.reload(groups)
        sys.modules["deepspeed.comm.comm"].cdb = None  # type: ignore[attr-defined]  # it is running no more
    if pipe := sys.modules.get("deepspeed.runtime.pipe.engine"):
        for engine in [of for of in gc.get_objects() if isinstance(of, pipe.PipelineEngine)]:
            vars(engine).clear()  # the graph of its last loss has hooks that hold it, which no collector sees
    gc.collect()
