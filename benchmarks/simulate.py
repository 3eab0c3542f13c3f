"""Seconds of a step as `shampoo3d simulate` foresees them, next to those of real processes over gloo on this machine.

python benchmarks/simulate.py [--output benchmarks/results/simulate.json] [--only NAME]

Before and after the layouts of as many ranks the machine is calibrated, with as many busy processes, by the CPU's clock
and by the wall's. CPU seconds are those of the rank that has most, of each step of a refresh cycle the least of several
cycles, since others may use the machine; elapsed seconds are from when the last rank comes to a step to when the last
one leaves it, the median of the cycles. Both are means over the cycle.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranks import Case, on_ranks, plain
from record import setting, write

from shampoo3d import Shampoo
from shampoo3d.cli.plan.forecast import Forecast
from shampoo3d.cli.plan.models import of_module
from shampoo3d.cli.simulate.calibrate import calibrate, joined
from shampoo3d.cli.simulate.hardware import Hardware
from shampoo3d.cli.simulate.simulation import Simulation, cycle
from shampoo3d.cli.train.text import read_text

CLOCKS = ("cpu", "elapsed")
CYCLES = 3
WITHIN = 0.25
WHAT = "the demo's GPT (width 128, 4 layers; wider: 256, 2 layers), one thread for each process"


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
    Case("data 2, ZeRO 3", WIDE, {"data": 2, "zero": 3, "block_size": 128}, deepspeed=True),
    Case("data 2, FSDP2, SOAP", WIDE, {"data": 2, "fsdp": True, "preset": "soap", "block_size": 128}),
)


# ---- foreseen --------------------------------------------------------------------------------------------------------


def foreseen(case: Case, hardware: dict[str, Hardware]) -> dict[str, Any]:
    """Return what a simulation on the machine by each clock tells; a clock's own seconds count."""
    request = case.request
    if case.deepspeed:
        from shampoo3d.cli.train.forecast import planned

        vocabulary = len(read_text(None, case.settings.context).vocabulary)
        teams, plans = planned(case.settings, vocabulary, request.hp)
        forecast = Forecast(request, [], request.hp, teams, plans)
    else:
        forecast = Forecast.of(request, of_module(plain(case)))
    of = Simulation.of(forecast, hardware["cpu"])
    own = {
        rank: of.busy(rank) + statistics.mean(timeline.travelled[rank] for timeline in of.timelines.values())
        for rank in of.ranks
    }
    phases = {name: seconds for name, seconds in of.phases().items() if seconds > 1e-5}
    elapsed = Simulation.of(forecast, hardware["elapsed"]).mean
    return {"cpu": max(own.values()), "cpu by rank": own, "elapsed": elapsed, "phases": phases}


# ---- measured --------------------------------------------------------------------------------------------------------


Moment = tuple[float, float]
"""CPU seconds of the process so far, and seconds on the machine's clock, which all its processes share."""


def moments(optimizer: Shampoo, step: Callable[[], Any]) -> list[tuple[Moment, Moment]]:
    """Train for some refresh cycles and return when each `step()` of the optimizer began and ended."""
    found: list[Moment] = []

    def note(*_: Any) -> None:
        found.append((time.process_time(), time.perf_counter()))

    optimizer.register_step_pre_hook(note)
    optimizer.register_step_post_hook(note)
    steps = cycle(optimizer.hyperparams)
    for _ in range(steps.start - 1 + CYCLES * len(steps)):
        step()
    return list(zip(found[::2], found[1::2], strict=True))[steps.start - 1 :]


def measured(case: Case) -> dict[str, Any]:
    """Return CPU seconds of the rank that has most, and those from the last rank's coming to a step to its end."""
    ranks = on_ranks(case, moments)
    by_rank = [[end[0] - begin[0] for begin, end in steps] for steps in ranks]
    elapsed = [max(end[1] for _, end in step) - max(begin[1] for begin, _ in step) for step in zip(*ranks, strict=True)]
    cpu = [by_turn(min, seconds) for seconds in by_rank]
    return {
        "cpu": max(cpu),
        "cpu by rank": cpu,
        "cpu, median": max(by_turn(statistics.median, seconds) for seconds in by_rank),
        "elapsed, median": by_turn(statistics.median, elapsed),
    }


def by_turn(of: Callable[[list[float]], float], seconds: list[float]) -> float:
    """Return the mean over a refresh cycle of what ``of`` makes of the same step of all cycles."""
    turns = len(seconds) // CYCLES
    return statistics.mean(of(seconds[turn::turns]) for turn in range(turns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "simulate.json")
    parser.add_argument("--only", default="", help="layouts whose name has this in it")
    parser.add_argument("--seconds", type=float, default=0.05, help="of each measurement of a calibration")
    options = parser.parse_args()
    cases = [case for case in CASES if options.only in case.name]
    rows: list[dict[str, Any]] = []
    for world in dict.fromkeys(case.request.world for case in cases):
        before = calibrated(world, options.seconds)
        taken = [(case, measured(case)) for case in cases if case.request.world == world]
        after = calibrated(world, options.seconds)
        hardware = {clock: joined([before[clock], after[clock]]) for clock in CLOCKS}
        rows += [row(case, steps, hardware) for case, steps in taken]
        within = {clock: sum(abs(of[f"{clock} ratio"] - 1) <= WITHIN for of in rows) for clock in CLOCKS}
        print(f"within {WITHIN:.0%}, of {len(rows)} layouts: {within}", flush=True)
        write(options.output, {"setting": setting(what=WHAT, backend="gloo"), "within": within, "rows": rows})


def calibrated(world: int, seconds: float) -> dict[str, Hardware]:
    """Measure the machine by each clock."""
    return {clock: calibrate("cpu", world, seconds, cpu=clock == "cpu") for clock in CLOCKS}


def row(case: Case, steps: dict[str, Any], hardware: dict[str, Hardware]) -> dict[str, Any]:
    told = foreseen(case, hardware)
    found = {
        "layout": case.name, "ranks": case.request.world, "foreseen": told, "measured": steps,
        "cpu ratio": told["cpu"] / steps["cpu"], "elapsed ratio": told["elapsed"] / steps["elapsed, median"],
        "load": os.getloadavg()[0], "hardware": {clock: json.loads(of.to_json()) for clock, of in hardware.items()},
    }  # fmt: skip
    print(
        f"{case.name:36} CPU ms: foreseen {told['cpu'] * 1e3:6.1f}, measured {steps['cpu'] * 1e3:6.1f}, ratio "
        f"{found['cpu ratio']:.2f}; elapsed: {told['elapsed'] * 1e3:6.1f}, {steps['elapsed, median'] * 1e3:6.1f}, "
        f"{found['elapsed ratio']:.2f}",
        flush=True,
    )
    return found


if __name__ == "__main__":
    main()
