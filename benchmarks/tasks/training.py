"""One run: a model trained by one optimizer, its validation losses, and what it took."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from tasks.contenders import Optimizer, Settings
from tasks.problems import Batch, Task
from torch import nn

WARMUP = 0.05  # of all steps, linear; then half a cosine down to zero
EVALUATIONS = 25
# Of the passing time, of all threads, and of the thread that trains.
CLOCKS: dict[str, Callable[[], float]] = {
    "wall": time.perf_counter,
    "cpu": time.process_time,
    "thread": time.thread_time,
}


def share_of_rate(step: int, steps: int) -> float:
    """Return the part of the learning rate that step 1, ..., ``steps`` has."""
    warmup = max(1, round(WARMUP * steps))
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@dataclass
class Stopwatch:
    """Seconds by each of the clocks, added up."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CLOCKS, 0.0))

    @contextmanager
    def running(self) -> Iterator[None]:
        start = {name: clock() for name, clock in CLOCKS.items()}
        yield
        for name, clock in CLOCKS.items():
            self.seconds[name] += clock() - start[name]


@dataclass
class Curve:
    """Validation losses, and the seconds of training before each."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CLOCKS})

    def add(self, step: int, loss: float, seconds: Mapping[str, float]) -> None:
        self.steps.append(step)
        self.losses.append(round(loss, 6))
        for name, passed in seconds.items():
            self.seconds[name].append(round(passed, 4))


@dataclass
class Outcome:
    """Result of a run.

    Args:
        final: the validation loss after the last step; None where training stopped before.
        stopped: why it did.
        training, optimizer: seconds of all training (without drawing batches and validating) and of ``step()`` in it.
    """

    final: float | None
    stopped: str | None
    training: dict[str, float]
    optimizer: dict[str, float]
    curve: Curve


def train(task: Task, make: Callable[..., Optimizer], settings: Settings, seed: int) -> Outcome:
    """Weights and batches by the seed; a loss that is not finite, or a decomposition that fails, ends the run."""
    model = task.make(seed)
    optimizer = make(model, **settings)
    rates = [group["lr"] for group in optimizer.param_groups]
    training, stepping, curve = Stopwatch(), Stopwatch(), Curve()
    marks = {round(task.steps * count / EVALUATIONS) for count in range(1, EVALUATIONS + 1)}
    curve.add(0, task.validation_loss(model), training.seconds)
    stopped = None
    try:
        for step, batch in zip(range(1, task.steps + 1), task.batches(seed), strict=False):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share_of_rate(step, task.steps)
            with training.running():
                training_step(task, model, optimizer, batch, stepping)
            if step in marks:
                curve.add(step, _finite("validation", task.validation_loss(model)), training.seconds)
    except (ArithmeticError, torch.linalg.LinAlgError) as error:
        stopped = f"step {step}: {error}"
    final = curve.losses[-1] if stopped is None else None
    return Outcome(final, stopped, _rounded(training), _rounded(stepping), curve)


def training_step(task: Task, model: nn.Module, optimizer: Optimizer, batch: Batch, stepping: Stopwatch) -> None:
    """Forward, backward and the optimizer's step, of which ``stepping`` takes the time."""
    optimizer.zero_grad()
    loss = task.training_loss(model, batch)
    _finite("training", float(loss.detach()))
    loss.backward()
    with stepping.running():
        optimizer.step()


def _finite(name: str, loss: float) -> float:
    if not math.isfinite(loss):
        raise ArithmeticError(f"the {name} loss is {loss}")
    return loss


def _rounded(watch: Stopwatch) -> dict[str, float]:
    return {name: round(seconds, 4) for name, seconds in watch.seconds.items()}
