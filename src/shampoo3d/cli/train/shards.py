"""Tensor parallelism: linear layers whose matrices several processes share, marked as Megatron-LM marks them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear


@dataclass(frozen=True)
class Shards:
    """Index of this process among the `size` processes that share every sharded matrix, and their group."""

    index: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def cut(self, whole: Tensor, axis: int, pieces: int = 1) -> nn.Parameter:
        """Return this process's shard of each of `pieces` equal pieces along `axis`."""
        pieces_and_shards = (pieces, self.size, whole.shape[axis] // pieces // self.size)
        shards = whole.detach().reshape(*whole.shape[:axis], *pieces_and_shards, *whole.shape[axis + 1 :])
        shard = nn.Parameter(shards.select(axis + 1, self.index).flatten(axis, axis + 1).clone())
        vars(shard).update(tensor_model_parallel=True, partition_dim=axis, partition_stride=pieces)
        return shard

    def spread(self, x: Tensor) -> Tensor:
        """Pass `x` to every shard; its gradient is the sum of theirs."""
        out: Tensor = _Spread.apply(x, self) if self.size > 1 else x  # type: ignore[no-untyped-call]
        return out

    def total(self, x: Tensor) -> Tensor:
        """Sum every shard's `x`; the gradient of the sum is that of each of them."""
        out: Tensor = _Total.apply(x, self) if self.size > 1 else x  # type: ignore[no-untyped-call]
        return out

    def add_up(self, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=self.group)
        return x


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.shards.add_up(gradient), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards) -> Tensor:
        return shards.add_up(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


class ColumnParallel(nn.Linear):
    """A linear layer of which every shard computes some outputs.

    The outputs may be several `pieces`, such as queries, keys and values; a shard computes its part of each piece.
    """

    def __init__(self, inputs: int, outputs: int, shards: Shards, pieces: int = 1) -> None:
        super().__init__(inputs, outputs)
        self.shards, self.pieces = shards, pieces

    def keep_own_part(self) -> None:
        self.weight = self.shards.cut(self.weight, 0, self.pieces)
        self.bias = self.shards.cut(self.bias, 0, self.pieces)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.shards.spread(x))


class RowParallel(nn.Linear):
    """A linear layer of which every shard has some inputs; the bias is whole on all shards and added once."""

    def __init__(self, inputs: int, outputs: int, shards: Shards) -> None:
        super().__init__(inputs, outputs)
        self.shards = shards

    def keep_own_part(self) -> None:
        self.weight = self.shards.cut(self.weight, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shards.total(linear(x, self.weight)) + self.bias
