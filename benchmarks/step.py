"""Seconds of an optimizer's step on the matrices of GPT-style models, ours against others, side by side.

python benchmarks/step.py [--path CLONE --peer "Meta=meta_shampoo:same"] [--output benchmarks/results/step.json]

Parameters and gradients are random numbers of the right shapes; there is no model. On a CPU one thread works, and CPU
seconds are counted; on a GPU all is synchronised and seconds pass. The first refresh cycle, in which all roots are
computed at once, is not counted; then the optimizers take turns, step by step, for whole cycles, so that each finds the
caches as a training run would leave them: full of something else. Nothing else is timed with them.
"""

import argparse
import itertools
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from block_loop import check_same
from peers import Contender, contenders, optional_contenders, peer, shampoo
from record import setting, write
from step_report import COLUMNS, PRODUCTS, show, show_targets, targets
from torch import Tensor, nn

from shampoo3d import Computation
from shampoo3d.planning.blocks import Grid, cut_at_most

LAYERS = {256: 4, 512: 2, 768: 1, 1024: 1}
VOCABULARY = CONTEXT = 128
PLAIN = Computation()
NEVER = 10_000  # steps between refreshes, where none is to be seen


@dataclass(frozen=True)
class Case:
    """Block and refresh interval for the matrices of a model."""

    width: int
    block: int
    refresh: int

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        W = self.width
        norm = [(W,), (W,)]
        layer = [*norm, (3 * W, W), (3 * W,), (W, W), (W,), *norm, (4 * W, W), (4 * W,), (W, 4 * W), (W,)]
        return [(VOCABULARY, W), (CONTEXT, W), *LAYERS.get(W, 1) * layer, *norm]

    @property
    def stacks(self) -> Counter[tuple[int, ...]]:
        """Count the blocks of each shape."""
        cuts = ([cut_at_most(d, self.block) for d in shape] for shape in self.shapes if len(shape) == 2)
        return Counter(block.shape for axes in cuts for block in Grid(axes))

    @property
    def product_flops(self) -> int:
        """Count the operations of a plain step: G G^T, G^T G, P G and (P G) Q, as full products."""
        return sum(4 * m * n * (m + n) * count for (m, n), count in self.stacks.items())


# ---- clocks ----------------------------------------------------------------------------------------------------------


class Clock:
    """CPU seconds of this process, or passed seconds of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, work: Callable[[], object]) -> float:
        now = time.process_time if self.device.type == "cpu" else self._now
        start = now()
        work()
        return now() - start

    def with_threads(self, work: Callable[[], object]) -> tuple[float, float]:
        """Seconds that the caller is held up, and of the whole process until all is quiet."""
        if self.device.type != "cpu":
            return (seconds := self(work)), seconds
        start, mine = time.process_time(), time.thread_time()
        work()
        mine = time.thread_time() - mine
        while True:
            before = time.process_time()
            time.sleep(2e-3)
            if time.process_time() - before < 5e-4:
                return mine, time.process_time() - start

    def median(self, work: Callable[[], object], repeats: int) -> float:
        work()
        return statistics.median(self(work) for _ in range(repeats))

    def _now(self) -> float:
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


# ---- steps -----------------------------------------------------------------------------------------------------------


def gradient(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random, on the generator's device, its singular values falling about as 1/i."""
    device = generator.device
    if len(shape) == 1:
        return torch.randn(shape, generator=generator, device=device)
    rank = min(shape)
    sizes = (shape[0], rank), (rank, shape[1])
    left, right = (torch.randn(size, generator=generator, device=device) for size in sizes)
    G: Tensor = (left / torch.arange(1, rank + 1, device=device)) @ right / math.prod(shape) ** 0.5
    return G


def with_gradients(shapes: Sequence[Sequence[int]], device: torch.device) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(device)) for shape in shapes]
    for param in params:
        param.grad = gradient(param.shape, generator).to(device)
    return params


@dataclass
class Row:
    """Seconds per step.

    Args:
        block, refresh: None where they make no difference.
        heaviest: the turn of a cycle that takes most, over the mean of all; of each turn the quickest cycle counts.
        process: mean of all threads together, where another one goes on computing after the step.
        seconds: of each step.
    """

    width: int
    layers: int
    parameters: int
    block: int | None
    refresh: int | None
    optimizer: str
    median: float
    mean: float
    worst: float
    heaviest: float
    process: float
    seconds: list[float]


@dataclass
class Run:
    """A contender at work."""

    contender: Contender
    optimizer: Any
    seconds: list[float] = field(default_factory=list)
    process: list[float] = field(default_factory=list)

    def step(self, clock: Clock) -> None:
        if self.contender.threads:
            held_up, whole = clock.with_threads(self.optimizer.step)
        else:
            held_up = whole = clock(self.optimizer.step)
        self.seconds.append(held_up)
        self.process.append(whole)


def measure(case: Case, these: Sequence[Contender], cycles: int, exponent: int, device: torch.device) -> list[Row]:
    """Let the contenders take turns."""
    clock = Clock(device)
    runs = []
    for contender in these:
        optimizer = contender.make(with_gradients(case.shapes, device), case.block, case.refresh, exponent)
        for _ in range(case.refresh):
            optimizer.step()
        runs.append(Run(contender, optimizer))
    for _ in range(cycles * case.refresh):
        for run in runs:
            run.step(clock)
    return [_row(case, run.contender, run.seconds, run.process) for run in runs]


def _row(case: Case, contender: Contender, seconds: list[float], process: list[float]) -> Row:
    # What a turn of the cycle costs at least in each cycle is its own work, the rest is the machine's unrest.
    turns = [min(seconds[turn :: case.refresh]) for turn in range(case.refresh)]
    return Row(
        width=case.width,
        layers=LAYERS.get(case.width, 1),
        parameters=sum(math.prod(shape) for shape in case.shapes),
        block=case.block if contender.blocks else None,
        refresh=case.refresh if contender.refreshes else None,
        optimizer=contender.name,
        median=statistics.median(seconds),
        mean=statistics.mean(seconds),
        worst=max(seconds),
        heaviest=max(turns) / statistics.mean(turns),
        process=statistics.mean(process),
        seconds=[round(second, 6) for second in seconds],
    )


# ---- the bound of matrix products ------------------------------------------------------------------------------------


def products(
    case: Case, repeats: int, exponent: int, device: torch.device, computation: Computation = PLAIN
) -> dict[str, Any]:
    """Time the products of a plain step with ``torch.bmm`` alone, in our stacks and in the whole of our step."""
    clock = Clock(device)
    optimizer = shampoo(with_gradients(case.shapes, device), case.block, NEVER, exponent, computation)
    optimizer.step()
    bare = [work for shape, count in case.stacks.items() for work in _bare_products(shape, count, device)]
    stacks = list(_stack_products(optimizer))
    found: dict[str, list[float]] = {"bmm": [], "stacks": [], "step": []}
    for turn in range(repeats + 1):
        for name, works in (("bmm", bare), ("stacks", stacks), ("step", [optimizer.step])):
            seconds = sum(clock(work) for work in works)
            found[name] += [seconds] * (turn > 0)
    bmm, in_stacks, step = (statistics.median(seconds) for seconds in found.values())
    return {
        "width": case.width,
        "block": case.block,
        "gflop": case.product_flops / 1e9,
        "gflop_symmetric_products_half": 0.75 * case.product_flops / 1e9,
        "bmm_gflops_per_second": case.product_flops / bmm / 1e9,
        "bmm_seconds": bmm,
        "stack_seconds": in_stacks,
        "plain_step_seconds": step,
        "stack_fraction": bmm / in_stacks,
        "plain_step_fraction": bmm / step,
        "stack_fraction_symmetric_products_half": 0.75 * bmm / in_stacks,
        "plain_step_fraction_symmetric_products_half": 0.75 * bmm / step,
    }


def _bare_products(shape: tuple[int, ...], count: int, device: torch.device) -> Iterator[Callable[[], object]]:
    m, n = shape
    G, P, Q, L, R, S = (torch.randn(count, *s, device=device) for s in ((m, n), (m, m), (n, n), (m, m), (n, n), (m, n)))
    yield lambda: torch.bmm(G, G.mT, out=L)
    yield lambda: torch.bmm(G.mT, G, out=R)
    yield lambda: torch.bmm(P, G, out=S)
    yield lambda: torch.bmm(G, Q, out=S)


def _stack_products(optimizer: Any) -> Iterator[Callable[[], object]]:
    """Statistics and application of all blocks, as the package does them."""
    for batch in (batch for team in optimizer._teams for batch in team.batches if len(batch.stack.shape) == 2):
        stack = batch.stack
        G = torch.randn(stack.n, *stack.shape, dtype=stack.dtype, device=stack.device)
        S = torch.empty_like(G)

        def work(stack: Any = stack, G: Tensor = G, S: Tensor = S) -> None:
            stack.accumulate(G, slice(None), 2)
            stack.precondition(G, slice(None), 2, out=S)

        yield work


# ---- all of it -------------------------------------------------------------------------------------------------------


def cases(widths: Sequence[int], blocks: Sequence[int], refreshes: Sequence[int], *, whole: bool) -> Iterator[Case]:
    """The whole product, or only those in which at most one thing is not the first of its kind."""
    for width, block, refresh in itertools.product(widths, blocks, refreshes):
        others = (width != widths[0]) + (block != blocks[0]) + (refresh != refreshes[0])
        if block <= 4 * width and (whole or others <= 1):
            yield Case(width, block, refresh)


def measure_all(options: argparse.Namespace, these: Sequence[Contender]) -> dict[str, Any]:
    rows: list[Row] = []
    bounds: dict[tuple[int, int], dict[str, Any]] = {}
    device = torch.device(options.device)
    for case in cases(options.widths, options.blocks, options.refresh, whole=options.whole):
        place = case.width, case.block
        if place not in bounds:
            bounds[place] = products(case, 3 if options.quick else 7, options.exponent, device)
            show([bounds[place]], PRODUCTS)
        main = (case.block, case.refresh) == (options.blocks[0], options.refresh[0])
        now = [
            contender
            for contender in these
            if (main or contender.everywhere) and contender.suits(case.width, case.block)
        ]
        # At least five steps; and of a long cycle, one tells enough.
        cycles = 1 if options.quick or case.refresh > 20 else options.cycles
        found = measure(case, now, max(cycles, -(-5 // case.refresh)), options.exponent, device)
        show([asdict(row) for row in found], COLUMNS)
        rows += found
    return {"rows": [asdict(row) for row in rows], "products": list(bounds.values())}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 768, 1024])
    parser.add_argument("--blocks", type=int, nargs="+", default=[256, 64, 128, 512, 1024])
    parser.add_argument("--refresh", type=int, nargs="+", default=[10, 1, 50])
    parser.add_argument("--exponent", type=int, default=4, help="p in L^(-1/p)")
    parser.add_argument("--cycles", type=int, default=2, help="refresh cycles to measure; one of more than 20 steps")
    parser.add_argument(
        "--whole", action="store_true", help="all combinations, not only those with one thing unlike the first"
    )
    parser.add_argument("--quick", action="store_true", help="width 256, blocks 64 and 256, refresh 10, one cycle")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peer", action="append", default=[], help="NAME=MODULE:CALLABLE, see meta_shampoo.py")
    parser.add_argument("--path", action="append", default=[], help="a folder to import peers from")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "step.json")
    options = parser.parse_args()
    if options.quick:
        options.widths, options.blocks, options.refresh = [256], [256, 64], [10]
    return options


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    check_same()
    sys.path[:0] = options.path
    optional = list(optional_contenders())
    if not optional:
        print("pytorch_optimizer is not installed: it is left out")
    these = [*contenders(), *map(peer, options.peer), *optional]
    started = time.perf_counter()
    result = measure_all(options, these)
    what = {
        "device": torch.cuda.get_device_name() if torch.device(options.device).type == "cuda" else "CPU, one thread",
        "seconds": "passed" if torch.device(options.device).type == "cuda" else "CPU",
        "exponent": options.exponent,
        "optimizers": {contender.name: contender.settings for contender in these},
        "missing": [] if optional else ["pytorch_optimizer"],
        "run_seconds": round(time.perf_counter() - started),
    }
    result = {"setting": setting(**what), "targets": targets(result), **result}
    write(options.output, result)
    show_targets(result["targets"])
    print(f"{options.output} written after {what['run_seconds']} s")


if __name__ == "__main__":
    main()
