"""Parts run one after the other, on a GPU each in a process of its own: what one does to it is over with that."""

import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_parts.bench import FAULT, NEEDS_CUDA, Bench, Found, first_line
from record import setting, write

RUNNING, FINISHED, FAILED = "running", "finished", "failed"
GRACE = 40.0
"""Seconds that a part may take longer than planned, before its process is ended."""
LEAST = 10.0
"""Seconds for a part whose time others have taken."""


@dataclass(frozen=True)
class Part:
    """A part: its work, and the share of the time that it has of all parts.

    Args:
        about: the module that tells what is done, for the page.
    """

    work: Callable[[Bench], Found]
    weight: float
    about: Any


Outcome = dict[str, Any]
"""Status, error, seconds, and the rows by table."""


def here(part: Part, bench: Bench, keep: Callable[[Outcome], None]) -> None:
    """Run a part in this process, and keep what is there after each row."""
    outcome: Outcome = {"status": RUNNING, "error": "", "seconds": 0.0, "tables": {}}
    keep(outcome)
    try:
        for table, row in part.work(bench):
            outcome["tables"].setdefault(table, []).append(row)
            outcome["seconds"] = round(time.perf_counter() - bench.started, 1)
            print(f"{table}: {shown(row)}", flush=True)
            keep(outcome)
    except Exception as error:  # it is told in the result, and fails the command
        traceback.print_exc()
        outcome["error"] = first_line(error)
    verdicts = [row.get("verdict", "") for rows in outcome["tables"].values() for row in rows]
    bad = outcome["error"] or any(verdict.startswith(FAULT) for verdict in verdicts)
    nothing = bool(verdicts) and all(verdict == NEEDS_CUDA for verdict in verdicts)
    outcome["status"] = FAILED if bad else NEEDS_CUDA if nothing else FINISHED
    outcome["seconds"] = round(time.perf_counter() - bench.started, 1)
    keep(outcome)


def apart(script: Path, name: str, seconds: float, passed_on: Sequence[str]) -> tuple[Outcome, dict[str, Any]]:
    """Run a part in another process; return its outcome, whatever became of it, and what it says of its machine."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "part.json"
        command = [sys.executable, str(script), "--only", name, "--seconds", f"{seconds:.0f}", "--output", str(output)]
        try:
            code = subprocess.run([*command, *passed_on], timeout=seconds + GRACE).returncode
            ended = f"its process ended with exit status {code}"
        except subprocess.TimeoutExpired:
            ended = f"its process was ended after {seconds + GRACE:.0f} s"
        written = json.loads(output.read_text()) if output.exists() else {"parts": {}, "setting": {}}
    outcome: Outcome = written["parts"].get(name, {"status": RUNNING, "tables": {}})
    if outcome["status"] == RUNNING:
        outcome |= {"status": FAILED, "error": ended}
    return outcome | {"seconds": round(time.perf_counter() - began, 1)}, written["setting"]


def run(parts: Mapping[str, Part], script: Path, options: Any, passed_on: Sequence[str]) -> dict[str, Any]:
    """Run parts; what is there is written again and again. One alone, and those of a CPU, share this process."""
    # Some GPUs take one process at a time: where parts have their own, this one must not touch it.
    separate = options.device.type == "cuda" and len(options.only) > 1
    result: dict[str, Any] = {"setting": {} if separate else about(options), "parts": {}}
    end = time.perf_counter() + options.seconds

    def keep(name: str, outcome: Outcome) -> None:
        result["parts"][name] = outcome
        write(options.output, result)

    for number, name in enumerate(options.only):
        part = parts[name]
        share = part.weight / sum(parts[other].weight for other in options.only[number:])
        seconds = max(LEAST, share * (end - time.perf_counter()))
        print(f"== {name}, in {seconds:.0f} s", flush=True)
        if separate:
            outcome, told = apart(script, name, seconds, passed_on)
            result["setting"] |= told | {"seconds": options.seconds}
            keep(name, outcome)
        else:
            bench = Bench(options.device, options.size, seconds, options.peer)
            here(part, bench, partial(keep, name))
    return result


def about(options: Any) -> dict[str, Any]:
    """Describe the circumstances."""
    on_gpu = options.device.type == "cuda"
    return setting(
        what="one GPU: results, waiting, speed, memory, graphs and training",
        device=torch.cuda.get_device_name() if on_gpu else "CPU",
        cuda=torch.version.cuda if on_gpu else None,
        size=options.size.name,
        seconds=options.seconds,
    )


def shown(row: Mapping[str, Any]) -> str:
    """Show a row on one line, without what is more than a number or words."""
    return ", ".join(f"{key} {cell(value)}" for key, value in row.items() if not isinstance(value, (dict, list)))


def cell(value: Any) -> str:
    """Show a value: numbers with three digits."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def failures(result: Mapping[str, Any]) -> Iterable[str]:
    """Name what failed, and why."""
    for name, outcome in result["parts"].items():
        if outcome["status"] == FAILED:
            rows = [row for rows in outcome["tables"].values() for row in rows]
            faults = sum(str(row.get("verdict", "")).startswith(FAULT) for row in rows)
            yield f"{name}: {outcome['error'] or f'{faults} faults'}"
