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

from shampoo3d import Shampoo
from shampoo3d.cli.plan.builtin import Parameter
from shampoo3d.cli.plan.forecast import Forecast
from shampoo3d.cli.plan.request import Request
from shampoo3d.cli.train.launch import free_port
from shampoo3d.distributed.collectives import all_gather
from shampoo3d.numerics.roots.choice import AT_ONCE
from shampoo3d.planning.routes import CACHED_ELEMENTS

from .clock import Spent, Work
from .hardware import Curve, Hardware, Link
from .simulation import events_of

SIDES = (16, 32, 64, 128, 256, 512, 1024)
DTYPES = ("float32", "bfloat16")
BYTES = tuple(2**i for i in range(14, 28, 2))
SECONDS = 0.1
"""Of a measurement, of which the median counts."""
POOL = 2**26
"""Bytes of the tensors that are worked on in turn."""
ALONE = Link(0.0, math.inf)
NEVER = 10**6
"""Steps between refreshes, where there shall be none."""


class Meter:
    """Median seconds of work on a device."""

    def __init__(self, device: torch.device, seconds: float = SECONDS, *, cpu: bool = False) -> None:
        """``cpu``: the CPU's seconds count, not those in which others have it."""
        self.device, self.seconds = device, seconds
        self._clock = time.process_time if cpu else time.perf_counter

    def now(self) -> float:
        """Return the time when all work issued so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._clock()

    def median(self, work: Callable[[], object], before: Callable[[], object] | None = None) -> float:
        """Return the median seconds, at least of three, after one that does not count; nor does what comes before."""
        work()
        taken: list[float] = []
        end = self.now() + self.seconds
        while len(taken) < 3 or self.now() < end:
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
        name, products, memory, decompositions, 0.0, _kernel(meter), 0.0, ALONE, ALONE, 1, rates[-1], queue, queue
    )  # fmt: skip
    operation, step = _host(meter, found)
    return replace(found, operation=operation, step=step)


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


def _host(meter: Meter, hardware: Hardware) -> tuple[float, float]:
    """Measure the host's seconds for an operation of a step, and for a step, on two models of next to nothing."""
    few, many = ([(8, 8 + i) for i in range(count)] for count in (1, 24))
    (less, seconds), (more, longer) = (_tiny(meter, hardware, shapes) for shapes in (few, many))
    operations = more.operations - less.operations
    operation = max(0.0, longer - seconds - (more.device - less.device) * (not hardware.queue)) / operations
    return operation, max(0.0, seconds - less.operations * operation - less.device * (not hardware.queue))


def _tiny(meter: Meter, hardware: Hardware, shapes: Sequence[tuple[int, int]]) -> tuple[Spent, float]:
    """Foresee what a step does on small matrices, and measure its seconds."""
    request = Request("", preconditioning_compute_steps=NEVER, device=meter.device.type)
    forecast = Forecast.of(request, [Parameter(f"{i}", shape) for i, shape in enumerate(shapes)])
    params = [torch.nn.Parameter(_random(meter, *shape)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = Shampoo(params, lr=1e-3, hyperparams=request.hp)
    for _ in range(request.hp.fresh_steps):
        optimizer.step()
    model = _random(meter, POOL // 4)  # that a training step passes over between two steps, and caches with it
    seconds = meter.median(optimizer.step, before=lambda: model.mul_(0.5))
    t = request.hp.fresh_steps + 1
    work = (event.spent for event in events_of(forecast, hardware, 0, [t])[t] if isinstance(event, Work))
    total = Spent()
    for spent in work:
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
    torch.distributed.destroy_process_group()
    found = replace(hardware, inside=link, between=link, node=ranks, overlap=overlaps(device, ranks))
    results.put(found.to_json())


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
    found = []
    for work in works:
        taken = []
        for _ in range(20):
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
