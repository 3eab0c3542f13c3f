"""Settings, weights and gradients of the cases on the stand-in, for the ranks and for the process that knows better."""

from dataclasses import replace

from torch import Tensor, nn

from common import draw
from shampoo3d import Shampoo, ShampooHyperParams

SHAPES = [(16, 8), (16,), (12, 12), (8, 4, 3, 3)]
PRESETS = {
    "default": ShampooHyperParams.default(block_size=8),
    "soap": ShampooHyperParams.soap(block_size=8),
    "classic": ShampooHyperParams.classic(block_size=8, matrix_eps=1e-4),
}
for _name in ("default", "soap", "classic"):
    _hp = PRESETS[_name]
    PRESETS[f"{_name}, asynchronous"] = replace(_hp, computation=replace(_hp.computation, asynchronous=True))


def weights() -> list[Tensor]:
    return [draw(shape, seed) for seed, shape in enumerate(SHAPES)]


def gradients(t: int) -> list[Tensor]:
    return [draw(shape, 1000 * t + k) for k, shape in enumerate(SHAPES)]


def expected(preset: str, steps: int) -> list[Tensor]:
    """Weights after so many steps of one process on the CPU."""
    params = [nn.Parameter(w) for w in weights()]
    optimizer = Shampoo(params, lr=0.01, hyperparams=PRESETS[preset])
    for t in range(steps):
        for param, gradient in zip(params, gradients(t), strict=True):
            param.grad = gradient
        optimizer.step()
    return [param.detach() for param in params]
