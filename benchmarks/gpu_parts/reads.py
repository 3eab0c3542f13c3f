"""Places at which the host waits for the GPU during steps, found with PyTorch's own debug mode.

``torch.cuda.set_sync_debug_mode("warn")`` warns of each operation that makes the host wait; the innermost function of
the package that is at work then is the place. Afterwards steps are taken in mode "error", where nothing may wait.
"""

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from gpu_parts.bench import FAULT, NEEDS_CUDA, OK, PRESETS, Bench, Found, first_line
from gpu_parts.results import SHAPES, draw, put
from torch import nn

from shampoo3d import Shampoo, ShampooHyperParams

STEPS, EVERY = 8, 2
EXPECTED = {
    "runtime/records.py:checksum": "at binding: replicas are compared",
    "runtime/agreement.py:_read_votes": "the first step after binding",
    "runtime/bindings.py:_index": "numbers of the blocks that have a turn, sent once",
    "numerics/roots/eigen.py:decompose": "eigh tells whether it converged",
}
"""Reasons why the host waits there."""
QUIET = {"runtime/records.py:checksum", "runtime/agreement.py:_read_votes", "runtime/bindings.py:_index"}
"""Places where it no longer waits after the first cycle of turns."""


def place() -> str:
    """Return the innermost function of the package that is at work."""
    for frame in reversed(traceback.extract_stack()):
        _, found, inside = frame.filename.replace("\\", "/").rpartition("/shampoo3d/")
        if found and not frame.name.startswith("<"):  # a comprehension is no function of its own
            return f"{inside}:{frame.name}"
    return "outside of the package"


@contextmanager
def debug_mode(mode: Literal["warn", "error"]) -> Iterator[None]:
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def places() -> Iterator[Counter[str]]:
    """Count the warnings of waiting by their places."""
    found: Counter[str] = Counter()

    def record(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing" in str(message):
            found[place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = record
        yield found


def settings() -> Iterator[tuple[str, ShampooHyperParams]]:
    for name, make in PRESETS.items():
        hp = make(block_size=32, preconditioning_compute_steps=EVERY)
        yield name, hp
        if hp.variant.direction == "root":
            yield f"{name}, eigh", replace(hp, computation=replace(hp.computation, root_method="eigh"))
        yield f"{name}, asynchronous", replace(hp, computation=replace(hp.computation, asynchronous=True))
        yield f"{name}, raise", replace(hp, nonfinite_gradient="raise")
        yield f"{name}, ignore", replace(hp, nonfinite_gradient="ignore")


def begun(hp: ShampooHyperParams, device: torch.device) -> tuple[list[nn.Parameter], Shampoo]:
    params = [nn.Parameter(draw(shape, k, torch.float32).to(device)) for k, shape in enumerate(SHAPES)]
    return params, Shampoo(params, lr=0.01, hyperparams=hp)


def observed(hp: ShampooHyperParams, device: torch.device) -> tuple[Counter[str], Counter[str]]:
    """Count the places of the first steps, and of the last cycle."""
    params, optimizer = begun(hp, device)
    early: Counter[str] = Counter()
    late: Counter[str] = Counter()
    for t in range(STEPS):
        put(params, t)
        with places() as found, debug_mode("warn"):
            optimizer.step()
        (late if t >= STEPS - EVERY else early).update(found)
    return early, late


def forbidden(hp: ShampooHyperParams, device: torch.device) -> str:
    """Take steps in which nothing may wait; return the place and the error, empty if there is none."""
    params, optimizer = begun(hp, device)
    for t in range(STEPS):
        put(params, t)
        if t < STEPS - EVERY:
            optimizer.step()
            continue
        try:
            with debug_mode("error"):
                optimizer.step()
        except RuntimeError as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "/shampoo3d/" in f.filename]
            frames = [frame for frame in frames if not frame.name.startswith("<")]
            where = f"{frames[-1].filename.rsplit('/shampoo3d/')[-1]}:{frames[-1].name}" if frames else "elsewhere"
            return f"{where}: {first_line(error)}"
    return ""


def told(found: Counter[str]) -> str:
    return ", ".join(f"{where} ({count})" for where, count in sorted(found.items())) or "nowhere"


def reads(bench: Bench) -> Found:
    """Places at which the host waits for the device in a step."""
    if not bench.cuda:
        yield "waits", {"settings": "all", "verdict": NEEDS_CUDA}
        return
    for where, why in EXPECTED.items():
        yield "expected", {"place": where, "why": why}
    for name, hp in settings():
        early, late = observed(hp, bench.device)
        unexpected = [where for where in early + late if where not in EXPECTED]
        unexpected += [where for where in late if where in QUIET]
        row = {"settings": name, "in the first steps": told(early), "in the last cycle": told(late)}
        verdict = f"{FAULT}: not expected at {', '.join(dict.fromkeys(unexpected))}" if unexpected else OK
        yield "waits", {**row, "verdict": verdict}
        error = forbidden(hp, bench.device)
        row = {"settings": name, "error": error or "none", "verdict": _judge(error)}
        yield "steps in which nothing may wait", row


def _judge(error: str) -> str:
    """An eigen-decomposition that tells whether it converged is expected; any other error is not."""
    return OK if not error or error.startswith("numerics/roots/eigen.py:decompose") else f"{FAULT}: the host waited"
