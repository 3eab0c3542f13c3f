"""The rates of this machine, measured as a step uses them: some seconds of products, operations, steps, collectives."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from shampoo3d import Shampoo
from shampoo3d.cli.plan.builtin import Parameter
from shampoo3d.cli.plan.forecast import Forecast
from shampoo3d.cli.plan.request import Request
from shampoo3d.cli.train.launch import free_port
from shampoo3d.distributed.collectives import all_gather
from shampoo3d.numerics.roots.choice import AT_ONCE
from shampoo3d.planning.routes import CACHED_ELEMENTS

from .clock import Spent, Start, Work
from .hardware import Curve, Hardware, Link
from .simulation import events_of

SIDES = (16, 32, 64, 128, 256, 512, 1024)
DTYPES = ("float32", "bfloat16")
BYTES = tuple(2**i for i in range(14, 28, 2))
SECONDS = 0.1
"""The length of a measurement, of which the median counts."""
POOL = 2**26
"""Bytes of the tensors that are worked on in turn."""
ALONE = Link(0.0, math.inf)
STEPS = 20
"""Steps that are measured of models of next to nothing."""
NEVER = 10**6
"""Steps between refreshes, where there shall be none."""


class Meter:
    """Median seconds of work on a device."""

    def __init__(self, device: torch.device, seconds: float = SECONDS, *, cpu: bool = False) -> None:
        """``cpu``: the CPU's seconds count, not those in which others have it."""
        self.device, self.seconds, self.cpu = device, seconds, cpu
        self._clock = time.process_time if cpu else time.perf_counter

    def now(self) -> float:
        """Return the time when all work issued so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._clock()

    def median(
        self, work: Callable[[], object], before: Callable[[], object] | None = None, times: int | None = None
    ) -> float:
        """Return the median seconds, at least of three, after one that does not count; nor does what comes before."""
        work()
        taken: list[float] = []
        end = self.now() + self.seconds
        while len(taken) < (times or 3) or (not times and self.now() < end):
            if before:
                before()
            start = self.now()
            work()
            taken.append(self.now() - start)
        return statistics.median(taken)


def measure(meter: Meter, sides: Sequence[int] = SIDES, sizes: Sequence[int] = BYTES) -> Hardware:
    """Measure what one rank can do on its own."""
    products = {dtype: Curve({d: _products(meter, dtype, d) for d in sides}) for dtype in DTYPES}
    memory = Curve(dict(_moved(meter, size) for size in sizes))
    decompositions = {
        name: Curve({d: _decomposed(meter, work, d) for d in sides})
        for name, work in (("eigh", torch.linalg.eigh), ("qr", torch.linalg.qr))
    }
    queue = meter.device.type == "cuda"
    name = torch.cuda.get_device_name(meter.device) if queue else platform.processor() or platform.machine()
    rates = [*products["float32"].points.values()]
    found = Hardware(
        name, products, memory, decompositions, 0.0, _kernel(meter), 0.0, 0.0, 0.0,
        ALONE, ALONE, 1, rates[-1], queue, queue,
    )  # fmt: skip
    operation, step, tensor = _host(meter, found)
    return replace(found, operation=operation, step=step, tensor=tensor, shard=tensor)


def _random(meter: Meter, *shape: int) -> Tensor:
    return torch.randn(shape, device=meter.device)


def _batch(meter: Meter, d: int) -> int:
    """Return the number of d x d matrices that are worked on together."""
    return max(1, (CACHED_ELEMENTS if meter.device.type == "cpu" else AT_ONCE["other"]) // d**2)


def _pool(meter: Meter, *shape: int, dtype: str = "float32") -> Iterator[Tensor]:
    """Yield tensors in turn, so many that none is still in a cache, as in a step that works through a model."""
    one = _random(meter, *shape).to(getattr(torch, dtype))
    return itertools.cycle([one, *(one.clone() for _ in range(min(256, POOL // one.nbytes)))])


def _products(meter: Meter, dtype: str, d: int) -> float:
    """Measure multiply-adds per second of a batch of d x d products, plain ones and those that are added."""
    n = _batch(meter, d)
    stacks = _pool(meter, n, d, d, dtype=dtype)

    def work() -> None:
        A, B, C = (next(stacks) for _ in range(3))
        torch.bmm(A, B)
        C.baddbmm_(A, B.mT, beta=0.9, alpha=0.01)

    return 2 * n * d**3 / meter.median(work)


def _moved(meter: Meter, size: int) -> tuple[float, float]:
    """Measure bytes per second of operations on single elements, of a kind that steps have, by the mean bytes of one.

    What they take beside that, as much as on nearly nothing, counts as the host's and as that of a kernel.
    """
    rows = max(1, size // 3 // 4 // 64)
    stacks, averages = _pool(meter, rows, 64), _pool(meter, rows, 64, dtype="bfloat16")

    def work(G: Tensor, E: Tensor) -> int:
        average = E.to(G.dtype).lerp_(G, 0.1)
        E.copy_(average)
        G.square().mean(0)
        average.mul_(G).add_(E)
        torch.where(average > 0, average, G).sum(1)
        return G.numel() * (2 + 4 + 12 + 6 + 8 + 4 + 12 + 10 + 5 + 13 + 4)

    least = meter.median(lambda: work(next(stacks)[:1, :1], next(averages)[:1, :1]))
    seconds = meter.median(lambda: work(next(stacks), next(averages)))
    moved = work(next(stacks), next(averages))
    return moved / 11, moved / max(seconds - least, 0.05 * seconds)


def _decomposed(meter: Meter, work: Callable[[Tensor], object], d: int) -> float:
    """Measure seconds of a decomposition of one matrix of a batch, whose eigenvalues fall as those of gradients do."""
    n = max(1, _batch(meter, d) // 4)
    A = _random(meter, n, d, d) / torch.arange(1, d + 1, device=meter.device)
    A = A @ A.mT
    return meter.median(lambda: work(A)) / n


def _kernel(meter: Meter) -> float:
    """Measure the device's seconds for an operation on nearly nothing."""
    many = [_random(meter, 4) for _ in range(256)]
    others = [x.clone() for x in many]
    if meter.device.type != "cuda":
        return meter.median(lambda: torch._foreach_copy_(many, others)) / len(many)
    # Launched behind a product, so that the device does them one after the other, whenever the host has launched them.
    A = _random(meter, 8192, 8192)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.mm(A, A)
    before.record()
    for x in many:
        x.add_(1.0)
    after.record()
    torch.cuda.synchronize(meter.device)
    return float(before.elapsed_time(after)) / 1e3 / len(many)


MODELS = ([(8, 8)], [(8, 8 + i) for i in range(24)], [(8, 8)] * 64)
"""Matrices of models of next to nothing: one, some that are not in one stack, and many that are."""


def _host(meter: Meter, hardware: Hardware) -> tuple[float, float, float]:
    """Measure the host's seconds for an operation of a step, for a step, and for a tensor."""
    rows, left = [], []
    for shapes in MODELS:
        spent, seconds = _tiny(meter, hardware, shapes)
        rows.append([spent.operations, 1, len(shapes)])
        left.append(seconds - spent.device * (not hardware.queue))
    found = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), torch.tensor(left, dtype=torch.float64))
    operation, step, tensor = found.clamp(min=0.0).tolist()
    return operation, step, tensor


def _tiny(meter: Meter, hardware: Hardware, shapes: Sequence[tuple[int, int]], ranks: int = 0) -> tuple[Spent, float]:
    """Foresee what a step does on small matrices, which so many ranks share as ``DTensor``, and measure its seconds."""
    asked: dict[str, Any] = {"data": ranks, "fsdp": True} if ranks else {}
    request = Request("", preconditioning_compute_steps=NEVER, device=meter.device.type, **asked)
    forecast = Forecast.of(request, [Parameter(f"{i}", shape) for i, shape in enumerate(shapes)])
    values = [_random(meter, *shape) for shape in shapes]
    if ranks:
        mesh = init_device_mesh(meter.device.type, (ranks,))
        values = [distribute_tensor(value, mesh, [Shard(0)]) for value in values]
    params = [torch.nn.Parameter(value) for value in values]
    for param in params:
        param.grad = param.detach().clone()
    optimizer = Shampoo(params, lr=1e-3, hyperparams=request.hp)
    for _ in range(request.hp.fresh_steps):
        optimizer.step()
    model = _random(meter, POOL // 4)  # that a training step passes over between two steps, and caches with it
    seconds = meter.median(optimizer.step, before=lambda: model.mul_(0.5), times=STEPS)
    t = request.hp.fresh_steps + 1
    total = Spent()
    for event in events_of(forecast, hardware, 0, [t])[t]:
        spent = (
            Spent(event.seconds) if isinstance(event, Start) else event.spent if isinstance(event, Work) else Spent()
        )
        total = total.plus(spent)
    return total, seconds


# ---- several ranks ---------------------------------------------------------------------------------------------------

LARGE = 2**22
"""Bytes that a rank gets of each other, for the bandwidth; a few bytes are for the latency."""


def calibrate(device: str = "cpu", ranks: int = 1, seconds: float = SECONDS, *, cpu: bool = False) -> Hardware:
    """Measure this machine, with as many busy processes as ``ranks``, each on its GPU or with one thread of the CPUs.

    ``cpu`` counts the CPU's seconds, for a machine that others use, too.

    Returns:
        The medians over the ranks, with links between them.
    """
    if ranks == 1:
        if device == "cpu":
            torch.set_num_threads(1)
        return measure(Meter(torch.device(device), seconds, cpu=cpu))
    context = torch.multiprocessing.get_context("spawn")
    results, start = context.SimpleQueue(), context.Barrier(ranks)
    arguments = (ranks, free_port(), device, seconds, cpu, results, start)
    started = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
    for process in started:
        process.start()
    found = [results.get() for _ in started]
    for process in started:
        process.join()
    return joined([Hardware.from_json(text) for text in found])


def _rank(rank: int, ranks: int, port: int, device: str, seconds: float, cpu: bool, results: Any, start: Any) -> None:
    """Measure as one of several processes."""
    torch.set_num_threads(1)
    here = torch.device(device, rank) if device == "cuda" else torch.device(device)
    meter = Meter(here, seconds, cpu=cpu)
    start.wait()
    hardware = measure(meter)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=ranks)
    link = measure_link(meter, ranks)
    found = replace(hardware, inside=link, between=link, node=ranks, overlap=overlaps(device, ranks))
    step, shard = _sharded(meter, replace(found, step=0.0, shard=0.0), ranks)
    found = replace(found, step=step, shard=shard)
    torch.distributed.destroy_process_group()
    results.put(found.to_json())


def _sharded(meter: Meter, hardware: Hardware, ranks: int) -> tuple[float, float]:
    """Measure the host's seconds, beside operations and collectives, for a step that ranks share and a ``DTensor``."""
    few, many = ([(8 * ranks, 8)] * count for count in (1, 32))
    left = []
    for shapes in (few, many):
        spent, seconds = _tiny(meter, hardware, shapes, ranks)
        left.append(seconds - spent.host - spent.device * (not hardware.queue))
    shard = max(0.0, left[1] - left[0]) / (len(many) - len(few))
    return max(0.0, left[0] - shard), shard


def overlaps(device: str, ranks: int) -> bool:
    """Return whether what travels does so beside the computation: on CPUs, only if there are cores for both."""
    return device == "cuda" or 2 * ranks <= (os.cpu_count() or 1)


def measure_link(meter: Meter, ranks: int) -> Link:
    """Measure the collectives of a step between all ranks. Collective."""
    hops = math.ceil(math.log2(ranks))
    short, long = (_collectives(meter, ranks, size) for size in (64, LARGE))
    rates = [(ranks - 1) * LARGE / max(1e-9, b - a) for a, b in zip(short, long, strict=True)]
    return Link(statistics.mean(short) / hops, statistics.harmonic_mean(rates))


def _collectives(meter: Meter, ranks: int, size: int) -> list[float]:
    """Measure an all-to-all and an all-gather in which each rank gets ``size`` bytes of each other one."""
    send, receive = (torch.zeros(ranks * size, dtype=torch.uint8, device=meter.device) for _ in range(2))
    works = (partial(torch.distributed.all_to_all_single, receive, send), partial(all_gather, receive, send[:size]))
    model = _random(meter, POOL // 4)  # on which ranks work between two collectives
    found = []
    for work in works:
        taken = []
        for _ in range(20):
            model.mul_(0.5)
            if not meter.cpu:  # to wait for each other takes time, but not the CPU's
                torch.distributed.barrier()
            begin = meter.now()
            work()
            taken.append(meter.now() - begin)
        found.append(statistics.median(taken))
    return found


def joined(found: Sequence[Hardware]) -> Hardware:
    """Return the medians over ranks of all numbers."""
    return Hardware.from_json(json.dumps(_median([json.loads(one.to_json()) for one in found])))


def _median(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {key: _median([value[key] for value in values]) for key in first}
    return statistics.median(values) if isinstance(first, float) else first
