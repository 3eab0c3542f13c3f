"""One small language model in float64 that can be built whole, as pipeline layers, or as tensor-parallel shards.

However it is built, a parameter has the same name, and its values are cut from the same full weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """Sizes of the logical model. `mix` and `odd` add parameters of odd kinds; `tied` ties head to embedding.

    `branch`: a process without a rare sample does not use the parameters for rare samples, which get no gradient there,
    instead of zeros.
    """

    vocabulary: int = 11
    length: int = 5
    width: int = 12
    heads: int = 2
    layers: int = 2
    mix: bool = True
    odd: bool = False
    branch: bool = False
    tied: bool = True
    batch: int = 12


@dataclass(frozen=True)
class Shards:
    """This process's place among the `size` processes that share every tensor-parallel matrix."""

    index: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def total(self, x: Tensor) -> Tensor:
        if self.size > 1:
            x = x.contiguous().clone()
            dist.all_reduce(x, group=self.group)
        return x


class _Spread(torch.autograd.Function):
    """Identity whose gradient is summed over the shards: each shard of the next matrix saw the whole input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.shards.total(gradient), None


class _Sum(torch.autograd.Function):
    """Sum over the shards; the gradient of a sum is the same for every term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards) -> Tensor:
        return shards.total(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _sharded(dim: int, *sizes: int) -> nn.Parameter:
    """A parameter that says how it is cut, as Megatron's do, also where there is one shard only."""
    parameter: Any = nn.Parameter(torch.empty(*sizes))
    parameter.tensor_model_parallel = True
    parameter.partition_dim = dim
    return parameter


class ColumnParallel(nn.Linear):
    """A linear layer of which each shard computes some outputs."""

    def __init__(self, inputs: int, outputs: int, shards: Shards) -> None:
        super().__init__(inputs, outputs)
        self.shards = shards
        self.weight = _sharded(0, outputs // shards.size, inputs)
        self.bias = _sharded(0, outputs // shards.size)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(_Spread.apply(x, self.shards), self.weight, self.bias)


class RowParallel(nn.Linear):
    """A linear layer of which each shard holds some inputs; the bias is whole everywhere and added once."""

    def __init__(self, inputs: int, outputs: int, shards: Shards) -> None:
        super().__init__(inputs, outputs)
        self.shards = shards
        self.weight = _sharded(1, outputs, inputs // shards.size)
        self.bias: Any = nn.Parameter(torch.empty(outputs))
        self.bias.tensor_model_parallel = False
        self.bias.partition_dim = -1

    def forward(self, x: Tensor) -> Tensor:
        return _Sum.apply(functional.linear(x, self.weight), self.shards) + self.bias


class Layer(nn.Module):
    """A GPT-2 layer. The fused QKV matrix is ordered by head, so that a contiguous shard is a set of whole heads."""

    def __init__(self, shape: Shape, shards: Shards) -> None:
        super().__init__()
        self.size = shape.width // shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.qkv = ColumnParallel(shape.width, 3 * shape.width, shards)
        self.out = RowParallel(shape.width, shape.width, shards)
        self.up = ColumnParallel(shape.width, 4 * shape.width, shards)
        self.down = RowParallel(4 * shape.width, shape.width, shards)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        fused = self.qkv(self.norm1(x)).view(batch, length, -1, 3, self.size)
        q, k, v = fused.permute(3, 0, 2, 1, 4)
        scores = (q @ k.transpose(2, 3) * self.size**-0.5).masked_fill(_future(length), float("-inf"))
        attended = (scores.softmax(3) @ v).transpose(1, 2).reshape(batch, length, -1)
        x = x + self.out(attended)
        return x + self.down(torch.tanh(self.up(self.norm2(x))))


def _future(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


class Mix(nn.Module):
    """Parameters of odd kinds: a convolution, matrices that no small block size divides, a stack, a single number."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(shape.width, shape.width, 3, padding=1)
        self.down, self.up = nn.Linear(shape.width, 7), nn.Linear(7, shape.width, bias=False)
        self.positions = nn.Parameter(torch.empty(1, shape.length, shape.width))
        self.scale = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions
        x = x + self.convolution(x.transpose(1, 2)).transpose(1, 2)
        return x + self.scale * self.up(torch.tanh(self.down(x)))


class Odd(nn.Module):
    """Parameters that are hard to handle: of sizes that nothing divides, 4-D, frozen, and with gradients that are there
    never, or only on the rank that sees the rare sample, the one that starts with token 0."""

    RARE = 1.0  # far above the first number of every other token's embedding

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.branch = shape.branch
        self.image, self.flat = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 1, (1, 5), padding=(0, 2), bias=False)
        self.widen, self.narrow, self.back = nn.Linear(shape.width, 13), nn.Linear(13, 7), nn.Linear(7, shape.width)
        self.frozen = nn.Parameter(torch.empty(shape.width, shape.width), requires_grad=False)
        self.unused = nn.Parameter(torch.empty(5, 3))
        self.rare, self.scale = nn.Linear(shape.width, shape.width), nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        rare = x[:, :1, :1] > self.RARE
        x = x + self.flat(torch.tanh(self.image(x.unsqueeze(1)))).squeeze(1)
        x = x + self.back(torch.tanh(self.narrow(torch.tanh(self.widen(x @ self.frozen)))))
        return x if self.branch and not rare.any() else x + rare * self.scale * torch.tanh(self.rare(x))


class Embedding(nn.Embedding):
    """The embedding, and the head that may be tied to it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape.vocabulary, shape.width)


def head(embedding: nn.Module, x: Tensor) -> Tensor:
    return functional.linear(x, embedding.weight)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Whole(nn.Module):
    """All layers in one module, with the names that DeepSpeed's PipelineModule gives to the same layers."""

    def __init__(self, shape: Shape, shards: Shards | None = None) -> None:
        super().__init__()
        self.forward_functions: list[Any] = []
        self.tied_modules = nn.ModuleDict()
        for index, (kind, arguments) in enumerate(_layers(shape, shards or Shards())):
            if kind is head:
                self.forward_functions.append(lambda x: head(self.tied_modules["embedding"], x))
                continue
            module = kind(*arguments)
            if kind is Embedding and shape.tied:
                self.tied_modules["embedding"] = module
            else:
                self.add_module(str(index), module)
            self.forward_functions.append(module)

    def forward(self, x: Tensor) -> Tensor:
        for function in self.forward_functions:
            x = function(x)
        return x


def _layers(shape: Shape, shards: Shards) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    yield Embedding, (shape,)
    if shape.odd:
        yield Odd, (shape,)
    if shape.mix:
        yield Mix, (shape,)
    for _ in range(shape.layers):
        yield Layer, (shape, shards)
    yield nn.LayerNorm, (shape.width,)
    if shape.tied:
        yield head, ()
    else:
        yield nn.Linear, (shape.width, shape.vocabulary, False)


def pipeline_specs(shape: Shape, shards: Shards) -> list[Any]:
    """The same layers for DeepSpeed's PipelineModule; the tied embedding lives on the first and the last stage."""
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    specs: list[Any] = []
    for kind, arguments in _layers(shape, shards):
        if kind is head:
            specs.append(TiedLayerSpec("embedding", Embedding, shape, forward_fn=head))
        elif kind is Embedding and shape.tied:
            specs.append(TiedLayerSpec("embedding", Embedding, shape))
        else:
            specs.append(LayerSpec(kind, *arguments))
    return specs


def full_weights(shape: Shape) -> dict[str, Tensor]:
    """The start of every run: float64, the same for every topology."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, parameter in Whole(shape).named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        weights[name] = noise * scale + (parameter.ndim == 1 and name.endswith("weight"))
    if shape.odd:
        next(iter(weights.values()))[0, 0] = 2 * Odd.RARE
    return weights


def shard_of(name: str, parameter: nn.Parameter, full: Tensor, shards: Shards) -> Tensor:
    """The part of the full tensor that this process holds."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    return full.chunk(shards.size, parameter.partition_dim)[shards.index]


def load_weights(module: nn.Module, shape: Shape, shards: Shards) -> None:
    """Give the module this process's part of the start, in the module's own precision."""
    weights = full_weights(shape)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(shard_of(name, parameter, weights[name], shards))


def batch(shape: Shape, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels of one step: the whole batch, which no topology changes."""
    tokens = torch.randint(
        shape.vocabulary, (shape.batch, shape.length + 1), generator=torch.Generator().manual_seed(1000 + step)
    )
    if shape.odd:
        tokens[:, 0].clamp_(min=1)
        tokens[5 * step % shape.batch, 0] = 0
    return tokens[:, :-1], tokens[:, 1:]


def micro_batches(shape: Shape, step: int, replica: int, replicas: int) -> list[tuple[Tensor, Tensor]]:
    """The equal parts of the batch that one data-parallel replica sees, in several pieces where that is possible."""
    count = accumulation(shape, replicas)
    inputs, labels = (part.chunk(replicas)[replica].chunk(count) for part in batch(shape, step))
    return list(zip(inputs, labels, strict=True))


def accumulation(shape: Shape, replicas: int) -> int:
    mine = shape.batch // replicas
    return next((count for count in (2, 3) if mine % count == 0), 1)
