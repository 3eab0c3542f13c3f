"""Hidden parts of a step: the exchange behind its computation, and roots in the background behind what follows it.

python benchmarks/overlap.py [--cycles 3] [--repeats 2] [--output benchmarks/results/overlap.json]

Two processes over gloo, one thread each, on two cores, which should have no other work: elapsed seconds are counted.

Exchange: of each collective that travels beside the computation the seconds from its start to its end, and those in
which the step waits for it; and the step again with each collective awaited where it is started.

Roots, on a pipeline of two stages: a training step with all roots in each step, all in the background
("asynchronous"), and none after the first steps. The difference between the first and the last is what roots take, that
between the second and the last what the background does not hide. A stage is idle in the elapsed seconds without those
in which its thread computes.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from ranks import Case, on_ranks
from record import setting, write

from shampoo3d.cli.simulate.simulation import cycle
from shampoo3d.distributed.collectives import Communicator, Waiting

Seconds = dict[str, float]
"""Parts of a training step; "travelling" and "waiting" are of the exchange."""

SIZES, BLOCKS = {"width": 256, "layers": 4}, {"block_size": 128}
EXCHANGES = (
    Case("data 2, FSDP2", SIZES, {"data": 2, "fsdp": True, **BLOCKS}),
    Case("data 2, ZeRO 1", SIZES, {"data": 2, "zero": 1, **BLOCKS}, deepspeed=True),
    Case("data 2, replicas", SIZES, {"data": 2, **BLOCKS}, deepspeed=True),
)
ROOTS: Mapping[str, dict[str, Any]] = {
    "in the step": {"preconditioning_compute_steps": 1},
    "in the background": {"preconditioning_compute_steps": 1, "asynchronous": True},
    "none": {"preconditioning_compute_steps": 10**6},
}
MICRO_BATCHES = (2, 4, 8)


def pipeline(micro_batches: int, roots: str) -> Case:
    """Two stages, 8 sequences of a step in so many micro-batches."""
    model = SIZES | {"batch": 8, "micro_batches": micro_batches}
    return Case(
        f"pipe 2, {micro_batches} micro-batches, roots {roots}", model, {"pipe": 2, **BLOCKS, **ROOTS[roots]}, True
    )


# ---- measured --------------------------------------------------------------------------------------------------------


@dataclass
class Travels:
    """Seconds of the collectives that were started since they were last taken."""

    at_once: bool
    travelling: list[float] = field(default_factory=list)
    waiting: float = 0.0
    pending: list[Any] = field(default_factory=list)

    def started(self, start: Callable[..., Waiting | None], *arguments: Any) -> Waiting | None:
        """Start a collective, and see it end."""
        began = time.perf_counter()
        work: Any = start(*arguments)
        if work is None:
            return None
        self.pending.append(work.get_future().then(lambda _: self.travelling.append(time.perf_counter() - began)))
        if self.at_once:
            self.wait(work)
        return _Timed(work, self)

    def wait(self, work: Any) -> None:
        began = time.perf_counter()
        work.wait()
        self.waiting += time.perf_counter() - began

    def taken(self) -> Seconds:
        for future in self.pending:
            future.wait()
        found = {"travelling": sum(self.travelling), "waiting": self.waiting}
        self.travelling, self.waiting, self.pending = [], 0.0, []
        return found


@dataclass
class _Timed:
    """A collective that counts the seconds in which it is waited for."""

    work: Any
    travels: Travels

    def wait(self) -> object:
        self.travels.wait(self.work)
        return None


def mean_step(optimizer: Any, step: Callable[[], Any], at_once: bool, cycles: int) -> Seconds:
    """Return the mean step of a refresh cycle, each of its steps the median of those of so many cycles."""
    travels, start = Travels(at_once), Communicator._start
    with mock.patch.object(Communicator, "_start", lambda *arguments: travels.started(start, *arguments)):
        return _mean_step(optimizer, step, travels, cycles)


def _mean_step(optimizer: Any, step: Callable[[], Any], travels: Travels, cycles: int) -> Seconds:
    stepping: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: stepping.append(-time.perf_counter()))
    optimizer.register_step_post_hook(lambda *_: stepping.append(time.perf_counter()))
    turns = cycle(replace(optimizer.hyperparams, preconditioning_compute_steps=10))
    found: defaultdict[int, list[Seconds]] = defaultdict(list)
    for number in range(1 - turns.start, cycles * len(turns)):
        dist.barrier()
        stepping.clear()
        travels.taken()
        began, computed = time.perf_counter(), time.thread_time()
        step()
        elapsed, computed = time.perf_counter() - began, time.thread_time() - computed
        if number >= 0:
            of = {"training step": elapsed, "step": sum(stepping), "idle": elapsed - computed, **travels.taken()}
            found[number % len(turns)].append(of)
    names = found[0][0]
    return {
        name: statistics.mean(statistics.median(of[name] for of in steps) for steps in found.values()) for name in names
    }


def measured(case: Case, cycles: int, at_once: bool = False) -> Seconds:
    """Return the seconds of the slower rank, and the mean idle ones of both."""
    found = on_ranks(case, mean_step, at_once, cycles)
    return {name: (statistics.mean if name == "idle" else max)(of[name] for of in found) for name in found[0]}


# ---- tables ----------------------------------------------------------------------------------------------------------


def exchanges(cycles: int, repeats: int) -> Iterator[dict[str, Any]]:
    for case in EXCHANGES:
        runs: dict[bool, list[Seconds]] = {False: [], True: []}
        for _ in range(repeats):
            for at_once, of in runs.items():
                of.append(measured(case, cycles, at_once))
        beside, awaited = (least(of) for of in runs.values())
        yield {
            "layout": case.name, "step": beside["step"], "step, awaited at once": awaited["step"],
            "travelling": beside["travelling"], "waiting": beside["waiting"],
            "hidden": 1 - beside["waiting"] / beside["travelling"] if beside["travelling"] else None,
        }  # fmt: skip


def roots(cycles: int, repeats: int) -> Iterator[dict[str, Any]]:
    for number in MICRO_BATCHES:
        runs: dict[str, list[Seconds]] = {name: [] for name in ROOTS}
        for _ in range(repeats):
            for name, of in runs.items():
                of.append(measured(pipeline(number, name), cycles))
        inside, beside, without = (least(of)["training step"] for of in runs.values())
        idle = least(runs["none"])["idle"]
        yield {
            "micro-batches": number, "in the step": inside, "in the background": beside, "none": without,
            "roots": inside - without, "exposed": beside - without, "hidden": (inside - beside) / (inside - without),
            "idle": idle, "idle, of a step": idle / without, "bubble, by arithmetic": 1 / (number + 1),
            "roots, of idle": (inside - without) / idle,
        }  # fmt: skip


def least(of: list[Seconds]) -> Seconds:
    """Return the repetition with the shortest training step: others use the machine, too."""
    return min(of, key=lambda seconds: seconds["training step"])


PARTS: Mapping[str, Callable[[int, int], Iterator[dict[str, Any]]]] = {"exchange": exchanges, "roots": roots}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "overlap.json")
    options = parser.parse_args()
    result: dict[str, Any] = {"setting": setting(what="overlap", model=SIZES, backend="gloo", cycles=options.cycles)}
    for name in options.only:
        result[name] = []
        for row in PARTS[name](options.cycles, options.repeats):
            result[name].append(row)
            print(
                {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
            write(options.output, result)


if __name__ == "__main__":
    main()
