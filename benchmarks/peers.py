"""The optimizers that ``benchmarks/step.py`` measures, each made by ``make(params, block_size, refresh, exponent)``."""

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from block_loop import BlockLoop
from torch import nn

from shampoo3d import Computation, Shampoo, ShampooHyperParams

LR, MOMENTUM, BETA2, MATRIX_EPS = 1e-3, 0.9, 0.95, 1e-6
OURS, OURS_REDUCED = "3D-Shampoo", "3D-Shampoo, bfloat16 products and roots"
PRESETS = {
    "3D-Shampoo, default()": ShampooHyperParams.default(),
    "3D-Shampoo, soap()": ShampooHyperParams.soap(),
}
LOOP, PYTORCH_OPTIMIZER = "per-block loop", "pytorch_optimizer Shampoo"
LOOP_BLOCKS = (64, 128)

Params = Sequence[nn.Parameter]
Make = Callable[[Params, int, int, int], Any]


@dataclass(frozen=True)
class Contender:
    """An optimizer to measure.

    Args:
        blocks, refreshes: whether block size and refresh interval make a difference to it.
        threads: whether it goes on computing on another thread after ``step()``.
        only_blocks: the block sizes it is measured at; empty for all.
        widest: the largest width it is measured at.
        everywhere: or else at the main block size and interval only.
    """

    name: str
    settings: str
    make: Make
    blocks: bool = True
    refreshes: bool = True
    threads: bool = False
    only_blocks: tuple[int, ...] = ()
    widest: float = math.inf
    everywhere: bool = True

    def suits(self, width: int, block: int) -> bool:
        return width <= self.widest and (not self.only_blocks or block in self.only_blocks)


def shampoo(params: Params, block_size: int, refresh: int, exponent: int, computation: Computation) -> Shampoo:
    hp = ShampooHyperParams(
        beta2=BETA2,
        matrix_eps=MATRIX_EPS,
        block_size=block_size,
        inverse_exponent_override=exponent,
        preconditioning_compute_steps=refresh,
        computation=computation,
    )
    return Shampoo(params, LR, MOMENTUM, hp)


def preset(params: Params, block_size: int, refresh: int, exponent: int, hp: ShampooHyperParams) -> Shampoo:
    """Make a preset's step as it is later in training; embeddings, too, have factors here, without a model to tell."""
    computation = replace(hp.computation, fresh_steps=0)
    hp = replace(hp, block_size=block_size, preconditioning_compute_steps=refresh, computation=computation)
    return Shampoo(params, LR, hyperparams=hp)


def contenders() -> Iterator[Contender]:
    """Ours and what comes with PyTorch."""
    same = f"beta2 {BETA2}, matrix_eps {MATRIX_EPS}, SGD graft, Nesterov momentum {MOMENTUM}, vectors grafted only"
    variants = {
        OURS: Computation(),
        OURS_REDUCED: Computation(products="bfloat16", root_storage="bfloat16"),
        f"{OURS}, refresh together": Computation(refresh="together"),
        f"{OURS}, asynchronous": Computation(asynchronous=True),
    }
    for name, computation in variants.items():
        make = partial(shampoo, computation=computation)
        yield Contender(name, same, make, threads=computation.asynchronous, everywhere=name == OURS)
    for name, hp in PRESETS.items():
        yield Contender(
            name, "the preset, with this block size and interval, from its 21st step on", partial(preset, hp=hp)
        )
    yield Contender(LOOP, f"{same}; eigh of one factor at a time", BlockLoop, only_blocks=LOOP_BLOCKS)
    for name, settings, plain in (("AdamW", "; fused on a GPU", _adamw), ("Muon", "; matrices only", _muon)):
        settings = f"PyTorch's defaults{settings}"
        yield Contender(f"torch {name}", settings, plain, blocks=False, refreshes=False, everywhere=False)


def optional_contenders() -> Iterator[Contender]:
    """Return the optimizers of pytorch_optimizer; none without it."""
    if find_spec("pytorch_optimizer") is None:
        return
    same = f"beta2 {BETA2}, matrix_eps {MATRIX_EPS}, SGD graft, Nesterov momentum {MOMENTUM}, vectors grafted only"
    roots = "SVD on a CPU, where it is faster than the default Newton iteration"
    yield Contender(PYTORCH_OPTIMIZER, f"ScalableShampoo: {same}; roots by {roots}", _scalable_shampoo)
    soap = f"betas 0.9 and {BETA2}; whole matrices, QR; up to width 512, beyond which a refresh takes many seconds"
    yield Contender("pytorch_optimizer SOAP", soap, _soap, blocks=False, widest=512, everywhere=False)


def peer(text: str) -> Contender:
    """``NAME=MODULE:CALLABLE``; the callable may tell its settings in an attribute ``settings``."""
    name, separator, path = text.partition("=")
    module, colon, attribute = path.partition(":")
    if not (name and separator and module and colon and attribute):
        raise ValueError(f"--peer must be NAME=MODULE:CALLABLE, got {text!r}")
    make = getattr(importlib.import_module(module), attribute)
    return Contender(name, getattr(make, "settings", path), make)


def _adamw(params: Params, block_size: int, refresh: int, exponent: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, LR, fused=params[0].is_cuda or None)


def _muon(params: Params, block_size: int, refresh: int, exponent: int) -> torch.optim.Optimizer:
    return torch.optim.Muon([param for param in params if param.dim() == 2], LR)


def _scalable_shampoo(params: Params, block_size: int, refresh: int, exponent: int) -> Any:
    return importlib.import_module("pytorch_optimizer").ScalableShampoo(
        params,
        LR,
        betas=(MOMENTUM, BETA2),
        inverse_exponent_override=exponent,
        start_preconditioning_step=1,
        preconditioning_compute_steps=refresh,
        block_size=block_size,
        skip_preconditioning_rank_lt=2,
        shape_interpretation=False,
        matrix_eps=MATRIX_EPS,
        use_svd=params[0].device.type == "cpu",
    )


def _soap(params: Params, block_size: int, refresh: int, exponent: int) -> Any:
    soap = importlib.import_module("pytorch_optimizer").SOAP
    return soap(params, LR, betas=(0.9, BETA2), weight_decay=0.0, precondition_frequency=refresh)
