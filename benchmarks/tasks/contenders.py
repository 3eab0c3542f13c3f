"""The optimizers that are compared, each with the grid on which it is tuned.

All have the same budget: five learning rates, a few more where the best is at the grid's edge, and at the best of them
one other value of one more setting. None decays weights: these runs are too short for it to matter.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Protocol
from unittest import mock

import torch
from torch import nn

from shampoo3d import Shampoo, ShampooHyperParams

Settings = Mapping[str, float | str]

ADAM_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)  # for steps as long as Adam's
SGD_RATES = (0.01, 0.0316, 0.1, 0.316, 1.0)  # for steps as long as the gradient
BASELINE = "AdamW"

# Ours, by name; a learning rate means what it means to the optimizer whose step length is borrowed.
OURS = {
    "3D-Shampoo": ShampooHyperParams.default(),
    "3D-Shampoo, SOAP": ShampooHyperParams.soap(),
    "3D-Shampoo, classic": ShampooHyperParams.classic(block_size=256, preconditioning_compute_steps=10),
}


class Optimizer(Protocol):
    """The part of ``torch.optim.Optimizer`` that training needs."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    def zero_grad(self) -> None: ...
    def step(self) -> Any: ...


@dataclass(frozen=True)
class Contender:
    """An optimizer to compare.

    Args:
        settings: what is the same in all its trials, in words.
        make: from a model, ``lr`` and any_or_unknown the settings of ``alternative``.
        rates: the learning rates that are tried, each the same factor above the one before.
        alternative: what is tried at the best of them; may be empty.
    """

    name: str
    settings: str
    make: Callable[..., Optimizer]
    rates: tuple[float, ...] = ADAM_RATES
    alternative: Settings | None = None


# ---- PyTorch's -------------------------------------------------------------------------------------------------------


def adamw(model: nn.Module, lr: float, beta2: float = 0.95) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr, betas=(0.9, beta2), weight_decay=0.0)


def sgd(model: nn.Module, lr: float, momentum: float = 0.9) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr, momentum, nesterov=True)


class Muon:
    """``torch.optim.Muon`` for matrices, AdamW for the rest, as one optimizer with one learning rate.

    Muon takes matrices only, so the kernels of a convolution are shown to it as the matrix (out, in * height * width)
    that shares their memory. Embeddings and vectors are AdamW's and, with ``output="adamw"``, the last linear layer.
    """

    def __init__(self, model: nn.Module, lr: float, output: str = "muon") -> None:
        others = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
        if output == "adamw":
            others.add([module for module in model.modules() if isinstance(module, nn.Linear)][-1].weight)
        params = list(model.parameters())
        mine = [param for param in params if param.dim() > 1 and param not in others]
        self.model = model
        self.matrices = [(param, nn.Parameter(param.detach().view(len(param), -1))) for param in mine]
        matrices = [matrix for _, matrix in self.matrices]
        rest = [param for param in params if param.dim() < 2 or param in others]
        self.parts = (
            torch.optim.Muon(matrices, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr, betas=(0.9, 0.95), weight_decay=0.0),
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def step(self) -> None:
        for param, matrix in self.matrices:
            matrix.grad = None if param.grad is None else param.grad.view_as(matrix)
        with _products():
            for part in self.parts:
                part.step()


@contextmanager
def _products() -> Iterator[None]:
    """Let the products of Muon be in float32 on a CPU without units for bfloat16, which takes several times as long."""
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        yield
        return
    with mock.patch.object(torch.Tensor, "bfloat16", lambda x: x.to(torch.float32, copy=True)):
        yield


# ---- pytorch_optimizer's ---------------------------------------------------------------------------------------------


def package_version() -> str | None:
    """None where it is not installed."""
    return None if find_spec("pytorch_optimizer") is None else version("pytorch_optimizer")


def soap(model: nn.Module, lr: float, beta2: float = 0.95) -> Any:
    make = importlib.import_module("pytorch_optimizer").SOAP
    return make(model.parameters(), lr, betas=(0.95, beta2), weight_decay=0.0, precondition_frequency=10)


def scalable_shampoo(model: nn.Module, lr: float, beta2: float = 0.95) -> Any:
    package = importlib.import_module("pytorch_optimizer.optimizer.shampoo")
    return package.ScalableShampoo(
        model.parameters(),
        lr,
        betas=(0.9, beta2),
        moving_average_for_momentum=True,
        start_preconditioning_step=1,
        preconditioning_compute_steps=10,
        graft_type=package.LayerWiseGrafting.RMSPROP,
        use_svd=True,
    )


# ---- ours, and others' -----------------------------------------------------------------------------------------------


def shampoo(model: nn.Module, lr: float, *, hyperparams: ShampooHyperParams, **changes: Any) -> Optimizer:
    return Shampoo(model.parameters(), lr, hyperparams=replace(hyperparams, **changes), model=model)


def ours(name: str, hp: ShampooHyperParams) -> Contender:
    rates = SGD_RATES if hp.graft_type.name == "SGD" else ADAM_RATES
    defaults = ShampooHyperParams()
    values = {field.name: getattr(hp, field.name) for field in fields(hp)}
    told = [f"{key} {value}" for key, value in values.items() if value != getattr(defaults, key)]
    return Contender(name, ", ".join(told), partial(shampoo, hyperparams=hp), rates, {"beta2": 0.99})


def peer(text: str) -> Contender:
    """``NAME=MODULE:CALLABLE``; as for ``benchmarks/step.py``, of parameters, block size, refresh and exponent.

    The learning rate is set in its parameter groups. It may tell its ``settings``, and the ``rates`` of its grid.
    """
    name, separator, path = text.partition("=")
    module, colon, attribute = path.partition(":")
    if not (name and separator and module and colon and attribute):
        raise ValueError(f"--peer must be NAME=MODULE:CALLABLE, got {text!r}")
    make = getattr(importlib.import_module(module), attribute)
    settings = f"{getattr(make, 'settings', path)}; block 1024, refresh every 10 steps, exponent -1/4"
    return Contender(name, settings, partial(_of_params, make), getattr(make, "rates", ADAM_RATES))


def _of_params(make: Callable[..., Any], model: nn.Module, lr: float) -> Any:
    optimizer = make(list(model.parameters()), 1024, 10, 4)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return optimizer


def contenders() -> Iterator[Contender]:
    """All but the peers; those of pytorch_optimizer only where it is installed."""
    yield Contender(BASELINE, "betas 0.9 and 0.95", adamw, alternative={"beta2": 0.99})
    yield Contender("SGD", "Nesterov momentum 0.9", sgd, SGD_RATES, {"momentum": 0.95})
    muon = "matrices and kernels by torch.optim.Muon, momentum 0.95, lengths as AdamW's; the rest by AdamW"
    yield Contender("Muon", muon, Muon, alternative={"output": "adamw"})
    if package_version() is not None:
        at = "of pytorch_optimizer; refresh every 10 steps"
        yield Contender("SOAP", f"{at}, betas 0.95 and 0.95", soap, alternative={"beta2": 0.99})
        graft = "betas 0.9 and 0.95, averaged momentum, RMSprop graft, roots by SVD"
        yield Contender("ScalableShampoo", f"{at}, {graft}", scalable_shampoo, alternative={"beta2": 0.99})
    yield from (ours(name, hp) for name, hp in OURS.items())
