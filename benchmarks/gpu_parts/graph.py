"""A step captured as a CUDA graph and replayed with other gradients, against the same steps without one.

The number t of a step is part of the graph that was captured at it: its bias corrections, and which columns of a
gradient the statistics sample. One replay is to equal the step at which it was captured, for all presets; later ones
only where nothing in a step depends on t. That a step can't be captured is a result, and no fault.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from gpu_parts.bench import NEEDS_CUDA, PRESETS, Bench, Found, first_line, judged, relative
from gpu_parts.results import SHAPES, draw
from torch import Tensor, nn

from shampoo3d import Shampoo, ShampooHyperParams

EVERY, BEFORE, REPLAYS = 8, 10, 4  # no roots are due at steps 11 to 14
WITHIN = 1e-3
INDEPENDENT = {"classic"}
"""Presets in whose steps nothing depends on t."""


def quiet(name: str) -> ShampooHyperParams:
    """Make settings with which the host reads nothing and most steps have no roots."""
    hp = PRESETS[name](block_size=32, preconditioning_compute_steps=EVERY, nonfinite_gradient="ignore")
    return replace(hp, computation=replace(hp.computation, refresh="together", fresh_steps=0))


class Model:
    """Parameters with gradients that stay where they are, which is where a graph reads them."""

    def __init__(self, hp: ShampooHyperParams, device: torch.device) -> None:
        self.params = [nn.Parameter(draw(shape, k, torch.float32).to(device)) for k, shape in enumerate(SHAPES)]
        for param in self.params:
            param.grad = torch.zeros_like(param)
        self.optimizer = Shampoo(self.params, lr=0.01, hyperparams=hp)
        for t in range(BEFORE):
            self.put(t)
            self.optimizer.step()

    def put(self, t: int) -> None:
        for k, param in enumerate(self.params):
            assert param.grad is not None
            param.grad.copy_(draw(param.shape, 100 + k, torch.float32) + draw(param.shape, 1000 * t + k, torch.float32))

    @property
    def values(self) -> list[Tensor]:
        return [param.detach().clone() for param in self.params]


def eager(hp: ShampooHyperParams, device: torch.device) -> list[list[Tensor]]:
    """Return the weights before and after each of the steps that are to be replayed."""
    model = Model(hp, device)
    found = [model.values]
    for t in range(BEFORE, BEFORE + REPLAYS):
        model.put(t)
        model.optimizer.step()
        found.append(model.values)
    return found


def replayed(hp: ShampooHyperParams, device: torch.device) -> list[list[Tensor]]:
    """Return the weights before and after each replay of the step that is captured first, which changes nothing."""
    model = Model(hp, device)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.optimizer.step()
    found = [model.values]
    for t in range(BEFORE, BEFORE + REPLAYS):
        model.put(t)
        graph.replay()
        found.append(model.values)
    torch.cuda.synchronize(device)
    return found


def compared(name: str, expected: Sequence[list[Tensor]], found: Sequence[list[Tensor]]) -> Found:
    start = expected[0]
    one = relative(found[1], expected[1], start)
    all_of_them = relative(found[-1], expected[-1], start)
    yield "replays", {"preset": name, "replays": 1, "difference": one, "verdict": judged(one, WITHIN, "difference")}
    row = {"preset": name, "replays": REPLAYS, "difference": all_of_them}
    if name in INDEPENDENT:
        yield "replays", {**row, "verdict": judged(all_of_them, WITHIN, "difference")}
    else:
        yield "replays", {**row, "verdict": "as far as t matters: a graph repeats the step at which it was captured"}


def graph(bench: Bench, name: str) -> Found:
    """Step of a preset captured as a CUDA graph."""
    if not bench.cuda:
        yield "replays", {"preset": name, "verdict": NEEDS_CUDA}
        return
    hp = quiet(name)
    expected = eager(hp, bench.device)
    try:
        found = replayed(hp, bench.device)
    except Exception as error:  # PyTorch and CUDA have many; any of them is the answer that is asked for
        yield "replays", {"preset": name, "verdict": f"not captured: {first_line(error)}"}
        return
    yield from compared(name, expected, found)
