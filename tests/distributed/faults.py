"""Faults that are put into a run, and what each rank makes of them."""

import errno
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import shampoo3d.runtime.step
from shampoo3d import Shampoo, ShampooHyperParams
from shampoo3d.engines import native

from .fsdp import Sharding
from .layouts import Layout, zero
from .training import Session

SETTINGS = ShampooHyperParams(block_size=6, matrix_eps=1e-6)
LAYOUTS = {
    "ddp": Layout(Sharding(replicas=2)),
    "zero1": zero(1, data=2),
    "zero2": zero(2, data=2),
    "zero3": zero(3, data=2),
    "pipeline": zero(0, pipe=2, data=2),
    "tensor-parallel": zero(0, model=2),
    "fsdp2": Layout(Sharding(shards=2)),
}


@dataclass(frozen=True)
class Outcome:
    """End of something on one rank: the kind of error and its words, both empty if there was none."""

    kind: str = ""
    words: str = ""
    unchanged: bool = True
    seconds: float = 0.0


def attempted(optimizer: Shampoo, what: Callable[[], Any]) -> Outcome:
    """Do it; whether all parameters and all state on this rank are what they were, to the last bit."""
    before, start = snapshot(optimizer), time.monotonic()
    kind = words = ""
    try:
        what()
    except Exception as error:
        kind, words = type(error).__name__, str(error)
    seconds, after = time.monotonic() - start, snapshot(optimizer)
    unchanged = len(before) == len(after) and all(map(same, before, after))
    return Outcome(kind, words, unchanged, seconds)


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def snapshot(optimizer: Shampoo) -> list[Any]:
    """Return this rank's parameters, those that take part in steps, and state. Local."""
    return [*_leaves(optimizer.state.keys()), *_leaves(optimizer.state.values())]


def _leaves(of: Any) -> Iterator[Any]:
    if isinstance(of, dict):
        of = of.values()
    if isinstance(of, Tensor):
        yield local(of).detach().clone()
    elif isinstance(of, (int, float, str)):
        yield of
    else:
        for each in of:
            yield from _leaves(each)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def odd() -> bool:
    """Return whether this is the rank with the fault."""
    return dist.get_rank() == dist.get_world_size() - 1


def gradients(optimizer: Shampoo) -> list[Tensor]:
    found = (local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    return [gradient for gradient in found if gradient.numel()]


# --- faults of what a step is given, each undone afterwards


@contextmanager
def _element(optimizer: Shampoo, value: float) -> Iterator[None]:
    """Put a value into the middle of the largest gradient."""
    flat = max(gradients(optimizer), key=Tensor.numel).view(-1)
    place = len(flat) // 2
    before = flat[place].clone()
    flat[place] = value
    yield
    flat[place] = before


@contextmanager
def not_a_number(optimizer: Shampoo) -> Iterator[None]:
    with _element(optimizer, float("nan")):
        yield


@contextmanager
def infinite(optimizer: Shampoo) -> Iterator[None]:
    with _element(optimizer, float("inf")):
        yield


@contextmanager
def not_averaged(optimizer: Shampoo) -> Iterator[None]:
    """Double the gradients, like those of two replicas that were summed only."""
    for gradient in gradients(optimizer):
        gradient.mul_(2.0)
    yield
    for gradient in gradients(optimizer):
        gradient.mul_(0.5)


@contextmanager
def another_rate(optimizer: Shampoo) -> Iterator[None]:
    for group in optimizer.param_groups:
        group["lr"] *= 2.0
    yield
    for group in optimizer.param_groups:
        group["lr"] *= 0.5


GIVEN = {
    "NaN": not_a_number,
    "Inf": infinite,
    "not averaged": not_averaged,
    "another rate": another_rate,
}


def with_faults(optimizer: Shampoo, names: Collection[str]) -> dict[tuple[str, str], Outcome]:
    """Try the next step with each fault first, then without: where an engine calls it, with its gradients."""
    found: dict[tuple[str, str], Outcome] = {}

    def try_faults(*_: Any) -> None:
        if found:
            return
        settings = optimizer.hyperparams
        for policy in ("skip", "raise"):
            optimizer.hyperparams = replace(settings, nonfinite_gradient=policy)
            for name in names:
                found[name, policy] = Outcome()  # the attempts come by here, too
                with GIVEN[name](optimizer) if odd() else nullcontext():
                    found[name, policy] = attempted(optimizer, optimizer.step)
        optimizer.hyperparams = settings

    optimizer.register_step_pre_hook(try_faults)
    return found


# --- ranks that differ


def another_setting(params: Iterable[Any]) -> Shampoo:
    return Shampoo(params, hyperparams=replace(SETTINGS, block_size=8 if odd() else 6))


def another_order(params: Iterable[Any]) -> Shampoo:
    named, model = _named(params)
    return Shampoo(named[::-1] if odd() else named, hyperparams=SETTINGS, model=model)


def another_model(params: Iterable[Any]) -> Shampoo:
    """Without one of the matrices."""
    named, model = _named(params)
    given = [(name, param) for name, param in named if not odd() or not name.endswith("up.weight")]
    return Shampoo(given, hyperparams=SETTINGS, model=model)


def _named(params: Iterable[Any]) -> tuple[list[tuple[str, nn.Parameter]], nn.Module]:
    model = native.model_behind(params)
    assert model is not None
    return list(model.named_parameters()), model


# --- storage that fails


@contextmanager
def failing_storage(suffix: str, use: str) -> Iterator[None]:
    """Files of this name cannot be opened for this."""
    opened = Path.open

    def failing(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if path.name.endswith(suffix) and mode[0] == use:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return opened(path, mode, *args, **kwargs)

    with mock.patch.object(Path, "open", failing):
        yield


# --- ranks that are lost


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_before(session: Session, _: timedelta) -> None:
    session.optimizer.register_step_pre_hook(lambda *_: die())


def dies_within(_: Session, __: timedelta) -> None:
    """Between gradients and updates."""
    shampoo3d.runtime.step._precondition = lambda *_: die()  # type: ignore[assignment]


def hangs(session: Session, timeout: timedelta) -> None:
    """Once, for longer than the others wait."""

    def sleep(*_: Any) -> None:
        hook.remove()
        time.sleep(timeout.total_seconds() + 2.0)

    hook = session.optimizer.register_step_pre_hook(sleep)


def raises(session: Session, _: timedelta) -> None:
    """An error of the user's own, with which the process ends."""

    def fail(*_: Any) -> None:
        raise SystemExit("no such file")

    session.optimizer.register_step_pre_hook(fail)


LOST = {"dies before": dies_before, "dies within": dies_within, "hangs": hangs, "raises": raises}
