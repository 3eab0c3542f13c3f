"""Seconds of a step as `shampoo3d simulate` foresees them, next to those of real processes over gloo on this machine.

python benchmarks/simulate.py [--output benchmarks/results/simulate.json] [--only NAME]

Before and after the layouts of as many ranks the machine is calibrated, with as many busy processes. CPU seconds are
counted, and of each step of a refresh cycle the least of several cycles, since others may use the machine; then the
mean over the cycle, on the rank that has most. Medians, and elapsed seconds, are told beside them.
"""

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from record import setting, write
from torch import nn

from shampoo3d import Shampoo
from shampoo3d.cli.plan.forecast import Forecast
from shampoo3d.cli.plan.models import of_module
from shampoo3d.cli.plan.request import Request
from shampoo3d.cli.simulate.calibrate import calibrate, joined
from shampoo3d.cli.simulate.hardware import Hardware
from shampoo3d.cli.simulate.simulation import Simulation, cycle
from shampoo3d.cli.train import gpt
from shampoo3d.cli.train.launch import free_port
from shampoo3d.cli.train.settings import Settings
from shampoo3d.cli.train.shards import Shards
from shampoo3d.cli.train.text import read_text, training_batches

CYCLES = 3
WITHIN = 0.25
WHAT = "the demo's GPT (width 128, 4 layers; wider: 256, 2 layers), one thread for each process"


@dataclass(frozen=True)
class Case:
    """A layout: of the demo under DeepSpeed, or of its GPT in plain PyTorch, or under FSDP2.

    Attributes:
        model: settings of the demo's GPT.
        layout: options of `shampoo3d simulate`.
    """

    name: str
    model: dict[str, int] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    deepspeed: bool = False

    @property
    def request(self) -> Request:
        return Request("the demo's GPT", **({"block_size": 128} | self.layout))

    @property
    def settings(self) -> Settings:
        of = self.request
        model = {"batch": of.data * 2, "micro_batches": 2 if of.pipe > 1 else 1} | self.model
        return Settings(
            output=Path("unused"), device="cpu",
            pipe=of.pipe, data=of.data, model_parallel=of.tensor, zero_stage=of.zero,
            block_size=of.block_size or 128, **model,
        )  # fmt: skip


SMALL: dict[str, int] = {}
WIDE = {"width": 256, "layers": 2}
CASES = (
    Case("pipe 2 x data 2: the demo", SMALL, {"pipe": 2, "data": 2}, deepspeed=True),
    Case("one process"),
    Case("one process, wider, blocks of 256", WIDE, {"block_size": 256}),
    Case("one process, wider, blocks of 64", WIDE, {"block_size": 64}),
    Case("one process, SOAP", SMALL, {"preset": "soap"}),
    Case("one process, the thesis's rule", SMALL, {"preset": "classic", "preconditioning_compute_steps": 10}),
    Case("data 2, replicas", SMALL, {"data": 2}, deepspeed=True),
    Case("data 2, ZeRO 1", SMALL, {"data": 2, "zero": 1}, deepspeed=True),
    Case("data 2, ZeRO 2", SMALL, {"data": 2, "zero": 2}, deepspeed=True),
    Case("data 2, FSDP2", SMALL, {"data": 2, "fsdp": True}),
    Case("tensor 2", SMALL, {"tensor": 2}, deepspeed=True),
    Case("pipe 2", SMALL, {"pipe": 2}, deepspeed=True),
    Case("data 2, ZeRO 3", WIDE, {"data": 2, "zero": 3}, deepspeed=True),
    Case("data 2, FSDP2, SOAP", WIDE, {"data": 2, "fsdp": True, "preset": "soap"}),
)


def plain(case: Case) -> nn.Module:
    """Build the demo's GPT as one module."""
    vocabulary = len(read_text(None, case.settings.context).vocabulary)
    return gpt.GPT(gpt.layers(case.settings, vocabulary, Shards(size=1)), seed=0)


# ---- foreseen --------------------------------------------------------------------------------------------------------


def foreseen(case: Case, hardware: Hardware) -> dict[str, Any]:
    request = case.request
    if case.deepspeed:
        from shampoo3d.cli.train.forecast import planned

        vocabulary = len(read_text(None, case.settings.context).vocabulary)
        teams, plans = planned(case.settings, vocabulary, request.hp)
        forecast = Forecast(request, [], request.hp, teams, plans)
    else:
        forecast = Forecast.of(request, of_module(plain(case)))
    of = Simulation.of(forecast, hardware)
    own = {
        rank: of.busy(rank) + statistics.mean(timeline.travelled[rank] for timeline in of.timelines.values())
        for rank in of.ranks
    }
    phases = {name: seconds for name, seconds in of.phases().items() if seconds > 1e-5}
    return {"cpu": max(own.values()), "cpu by rank": own, "elapsed": of.mean, "phases": phases}


# ---- measured --------------------------------------------------------------------------------------------------------


def run(rank: int, world: int, port: int, case: Case, results: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    hp = case.request.hp
    optimizer, step = in_deepspeed(case, world) if case.deepspeed else in_torch(case, world)
    taken: list[tuple[float, float]] = []
    begun: list[tuple[float, float]] = []

    def now() -> tuple[float, float]:
        return time.process_time(), time.perf_counter()

    optimizer.register_step_pre_hook(lambda *_: begun.append(now()))
    optimizer.register_step_post_hook(
        lambda *_: taken.append(tuple(b - a for a, b in zip(begun[-1], now(), strict=True)))
    )
    steps = cycle(hp)
    for _ in range(steps.start - 1 + CYCLES * len(steps)):
        step()
    of_turn: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
    for number, pair in enumerate(taken[steps.start - 1 :]):
        of_turn[number % len(steps)].append(pair)
    numbers = [
        statistics.mean(of(pair[clock] for pair in pairs) for pairs in of_turn.values())
        for of, clock in ((min, 0), (statistics.median, 0), (statistics.median, 1))
    ]
    results.put((rank, *numbers))
    if world > 1:
        dist.barrier()
        time.sleep(0.2)
        os._exit(0)  # DeepSpeed's threads need not be waited for


def in_torch(case: Case, world: int) -> tuple[Shampoo, Callable[[], Any]]:
    """Return the optimizer of a model in plain PyTorch, and a function that takes a step."""
    model = plain(case)
    if world > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.children():
            if isinstance(layer, gpt.Block):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    text = read_text(None, case.settings.context)
    optimizer = Shampoo(model.parameters(), 1e-4, hyperparams=case.request.hp)
    numbers: Iterator[int] = iter(range(10**9))

    def step() -> None:
        tokens, targets = next(training_batches(text, case.settings, next(numbers), 0))
        optimizer.zero_grad()
        gpt.loss(model(tokens), targets).backward()
        optimizer.step()

    return optimizer, step


def in_deepspeed(case: Case, world: int) -> tuple[Shampoo, Callable[[], Any]]:
    """Return the optimizer of the demo on one rank, and a function that trains for a step."""
    import deepspeed
    import deepspeed.ops

    # Its shared-memory operation takes half a minute to build.
    deepspeed.ops.__compatible_ops__ = dict.fromkeys(deepspeed.ops.__compatible_ops__, False)
    deepspeed.init_distributed("gloo", verbose=False)
    from shampoo3d.cli.train.parallel import WholeModel, make_engine, make_grid, make_module

    settings = case.settings
    text, grid = read_text(None, settings.context), make_grid(settings)
    module = make_module(settings, len(text.vocabulary), grid)
    optimizer = Shampoo(module.parameters(), 1e-4, hyperparams=case.request.hp, topology=grid.topology())
    engine = make_engine(module, optimizer, settings, grid)
    model = engine if settings.pipe > 1 else WholeModel(engine)
    numbers: Iterator[int] = iter(range(10**9))
    data_rank = grid.get_data_parallel_rank()
    return optimizer, lambda: model.train_batch(training_batches(text, settings, next(numbers), data_rank))


def measured(case: Case) -> dict[str, Any]:
    context, world = mp.get_context("spawn"), case.request.world
    results = context.SimpleQueue()
    arguments = (world, free_port(), case, results)
    ranks = [context.Process(target=run, args=(rank, *arguments)) for rank in range(world)]
    for process in ranks:
        process.start()
    found = sorted(results.get() for _ in ranks)
    for process in ranks:
        process.join()
    _, cpu, median, elapsed = zip(*found, strict=True)
    return {"cpu": max(cpu), "cpu by rank": cpu, "cpu, median": max(median), "elapsed, median": max(elapsed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "simulate.json")
    parser.add_argument("--only", default="", help="layouts whose name has this in it")
    parser.add_argument("--seconds", type=float, default=0.05, help="of each measurement of a calibration")
    parser.add_argument("--again", action="store_true", help="foresee again what is in the output, measure nothing")
    options = parser.parse_args()
    if options.again:
        result = json.loads(options.output.read_text())
        named = {case.name: case for case in CASES}
        rows = []
        for of in result["rows"]:
            hardware = Hardware.from_json(json.dumps(of["hardware"]))
            rows.append({**show(named[of["layout"]], of["measured"], hardware), "load": of["load"]})
        within = sum(abs(row["ratio"] - 1) <= WITHIN for row in rows)
        write(options.output, {**result, "within": within, "rows": rows})
        return
    cases = [case for case in CASES if options.only in case.name]
    rows: list[dict[str, Any]] = []
    for world in dict.fromkeys(case.request.world for case in cases):
        before = calibrate("cpu", world, options.seconds, cpu=True)
        taken = []
        for case in (case for case in cases if case.request.world == world):
            taken.append((case, measured(case)))
            show(case, taken[-1][1], before)
        hardware = joined([before, calibrate("cpu", world, options.seconds, cpu=True)])
        print(f"with both calibrations of {world} processes:")
        rows += [show(case, steps, hardware) for case, steps in taken]
        within = sum(abs(row["ratio"] - 1) <= WITHIN for row in rows)
        print(f"{within} of {len(rows)} layouts within {WITHIN:.0%}", flush=True)
        write(options.output, {"setting": setting(what=WHAT, backend="gloo"), "within": within, "rows": rows})


def show(case: Case, steps: dict[str, Any], hardware: Hardware) -> dict[str, Any]:
    told = foreseen(case, hardware)
    ratio = told["cpu"] / steps["cpu"]
    print(
        f"{case.name:36} foreseen {told['cpu'] * 1e3:7.1f} ms, measured {steps['cpu'] * 1e3:7.1f} ms, "
        f"ratio {ratio:.2f}; median {steps['cpu, median'] * 1e3:7.1f} ms",
        flush=True,
    )
    return {
        "layout": case.name, "ranks": case.request.world, "foreseen": told, "measured": steps, "ratio": ratio,
        "load": os.getloadavg()[0], "hardware": json.loads(hardware.to_json()),
    }  # fmt: skip


if __name__ == "__main__":
    main()
