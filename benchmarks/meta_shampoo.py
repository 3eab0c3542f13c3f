"""Meta's Distributed Shampoo as a peer of ``benchmarks/step.py``.

It is not on the package index: clone https://github.com/facebookresearch/optimizers and give ``--path`` the clone.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distributed_shampoo import (
    AdamPreconditionerConfig,
    DistributedShampoo,
    RootInvShampooPreconditionerConfig,
    SGDPreconditionerConfig,
)
from distributed_shampoo.shampoo_types import ClassicMomentumConfig
from torch import nn

BETA2, EPSILON, MOMENTUM = 0.95, 1e-6, 0.9

logging.getLogger("distributed_shampoo").setLevel(logging.ERROR)


@dataclass(frozen=True)
class _Way:
    """A way to set it up; ``settings`` are told in the results."""

    settings: str
    graft: Any
    beta1: float
    momentum: Any
    packed: bool

    def __call__(self, params: Sequence[nn.Parameter], block_size: int, refresh: int, exponent: int) -> Any:
        return DistributedShampoo(
            params,
            lr=1e-3,
            betas=(self.beta1, BETA2),
            epsilon=EPSILON,
            max_preconditioner_dim=block_size,
            precondition_frequency=refresh,
            use_bias_correction=self.beta1 > 0,
            grafting_config=self.graft,
            iterate_averaging_config=self.momentum,
            preconditioner_config=RootInvShampooPreconditionerConfig(
                inverse_exponent_override={1: 0.0, 2: 1 / exponent},  # vectors are grafted only, as ours are
                use_symmetric_packing=self.packed,
            ),
        )


_NESTEROV = ClassicMomentumConfig(momentum=MOMENTUM, use_nesterov=True)
_SAME = "beta2 0.95, epsilon 1e-6 (absolute), eigh, SGD graft, Nesterov momentum 0.9, vectors grafted only"

same = _Way(f"{_SAME}; symmetric matrices packed (its default)", SGDPreconditionerConfig(), 0.0, _NESTEROV, True)
unpacked = _Way(f"{_SAME}; symmetric matrices not packed", SGDPreconditionerConfig(), 0.0, _NESTEROV, False)
adam_graft = _Way(
    "beta2 0.95, epsilon 1e-6 (absolute), eigh, Adam graft, filtered gradient 0.9, bias correction; packed",
    AdamPreconditionerConfig(beta2=BETA2),
    0.9,
    None,
    True,
)
