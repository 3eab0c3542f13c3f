"""The device, the sizes and the time that a part of ``benchmarks/gpu.py`` has, and the form of what it finds."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from step import gradient
from tasks.models import GPT
from torch import Tensor, nn

from shampoo3d import ShampooHyperParams

OK, NEEDS_CUDA = "ok", "needs CUDA"
FAULT = "FAULT"
"""First word of a verdict that makes the part, and the command, fail."""

Row = dict[str, Any]
Found = Iterator[tuple[str, Row]]
"""Rows, each with the name of its table. One with a ``verdict`` is the result of a check."""


@dataclass(frozen=True)
class Shape:
    """A GPT with GPT-2's layers, whose output layer is its embedding."""

    name: str
    width: int
    layers: int
    heads: int
    vocabulary: int = 50257
    context: int = 1024

    def make(self, device: torch.device) -> GPT:
        """Make it, with the same weights each time on one kind of device."""
        torch.manual_seed(0)
        with torch.device(device):
            model = GPT(self.vocabulary, self.context, self.width, self.layers, self.heads)
            model.head = nn.Linear(self.width, self.vocabulary, bias=False)
        model.head.weight = model.embedding.weight
        return model


@dataclass(frozen=True)
class Size:
    """Sizes of everything, for a GPU or a toy.

    Args:
        models: measured in ``steps``; blocks, refreshes: with each of these, the main ones first.
        sequences: of a micro-batch, and micro-batches of a training step.
        roots: sides of matrices; elements: of all matrices of a stack.
        stacks: width and blocks of the products in a step; see ``benchmarks/step.py``.
        trained: the model that is trained to AdamW's loss; batch, most_steps: of its training.
        text: bytes of it.
    """

    name: str
    models: tuple[Shape, ...]
    blocks: tuple[int, ...]
    refreshes: tuple[int, ...]
    sequences: tuple[int, int]
    roots: tuple[int, ...]
    elements: int
    stacks: tuple[int, tuple[int, ...]]
    trained: Shape
    batch: int
    most_steps: int
    text: int
    repeats: int


FULL = Size(
    "full",
    models=(Shape("GPT-2 small", 768, 12, 12), Shape("GPT-2 medium", 1024, 24, 16)),
    blocks=(256, 512, 1024),
    refreshes=(10, 1, 50),
    sequences=(4, 4),
    roots=(128, 256, 512, 1024),
    elements=2**24,
    stacks=(1024, (256, 512, 1024)),
    trained=Shape("GPT-2 small, bytes", 768, 12, 12, 256, 512),
    batch=32,
    most_steps=600,
    text=16_000_000,
    repeats=7,
)
TOY = Size(
    "toy",
    models=(Shape("toy", 32, 1, 2, 64, 16),),
    blocks=(16,),
    refreshes=(2, 1),
    sequences=(2, 2),
    roots=(16, 32),
    elements=2**11,
    stacks=(32, (16,)),
    trained=Shape("toy, bytes", 16, 1, 2, 256, 16),
    batch=4,
    most_steps=12,
    text=50_000,
    repeats=2,
)


@dataclass
class Bench:
    """All that a part gets.

    Args:
        seconds: after which it ought to have finished; it leaves out repetitions, then measurements, to do so.
        peers, paths: other optimizers, as for ``benchmarks/step.py``.
    """

    device: torch.device
    size: Size
    seconds: float
    peers: Sequence[str] = ()
    started: float = field(default_factory=time.perf_counter)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds until it ought to have finished."""
        return self.seconds - (time.perf_counter() - self.started)

    def quiet(self) -> None:
        """Wait until the device has done all that it was told."""
        if self.cuda:
            torch.cuda.synchronize(self.device)


PRESETS: dict[str, Callable[..., ShampooHyperParams]] = {
    "default": ShampooHyperParams.default,
    "soap": ShampooHyperParams.soap,
    # With the thesis's ridge, 1e-12, rounding decides what float32 roots are.
    "classic": partial(ShampooHyperParams.classic, matrix_eps=1e-4),
}


def put_gradients(params: Sequence[nn.Parameter], seed: int = 0) -> None:
    """Give each parameter a random gradient of its own, drawn on its device."""
    generator = torch.Generator(params[0].device).manual_seed(seed)
    for param in params:
        param.grad = gradient(param.shape, generator).to(param.dtype)


def first_line(error: BaseException) -> str:
    """Name an error with the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def relative(found: Sequence[Tensor], expected: Sequence[Tensor], start: Sequence[Tensor]) -> float:
    """Distance of weights from those expected, as a part of the way that these have come from the start."""
    a, b, c = (torch.cat([x.detach().cpu().double().flatten() for x in xs]) for xs in (found, expected, start))
    return float((a - b).norm() / (b - c).norm())


def judged(value: float, most: float, what: str) -> str:
    """Return the verdict on a number that must not be larger, nor NaN."""
    return OK if value <= most else f"{FAULT}: {what} {value:.3g}, at most {most:.3g} expected"
