"""A small GPT as a list of layers, for DeepSpeed's PipelineModule to cut into stages or for one module to hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear, scaled_dot_product_attention

from .shards import ColumnParallel, RowParallel, Shards

if TYPE_CHECKING:
    from .settings import Settings

PARTITION = "type:^block$"
"""The rule by which every stage gets the same number of transformer blocks."""


class Embedding(nn.Embedding):
    """An embedding that is the output layer, too: given vectors, it returns their products with every token's vector.

    Hence the small scale.
    """

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__(vocabulary, width)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight) if x.is_floating_point() else super().forward(x)


class Position(nn.Embedding):
    """A layer that adds learned position vectors."""

    def __init__(self, context: int, width: int) -> None:
        super().__init__(context, width)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[: x.shape[1]]


class Block(nn.Module):
    """Pre-norm attention and MLP; the depth of the model scales down what each block adds to the residual stream.

    A shard has whole heads and a part of the MLP's hidden units.
    """

    def __init__(self, width: int, heads: int, layers: int, shards: Shards) -> None:
        super().__init__()
        self.head_width = width // heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = ColumnParallel(width, 3 * width, shards, pieces=3)
        self.out = RowParallel(width, width, shards)
        self.norm2 = nn.LayerNorm(width)
        self.up = ColumnParallel(width, 4 * width, shards)
        self.down = RowParallel(4 * width, width, shards)
        projections = (self.qkv, self.out, self.up, self.down)
        for projection in projections:
            nn.init.normal_(projection.weight, std=0.02)
            nn.init.zeros_(projection.bias)
        with torch.no_grad():
            self.out.weight /= (2 * layers) ** 0.5
            self.down.weight /= (2 * layers) ** 0.5
        # Only now, so that the number of shards does not change what is drawn.
        for projection in projections:
            projection.keep_own_part()

    def attend(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, -1, self.head_width).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        out: Tensor = x + self.down(gelu(self.up(self.norm2(x))))
        return out


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


def layers(settings: Settings, vocabulary: int, shards: Shards) -> list[Any]:
    """Return the specifications of all layers; a process builds only those of its stage, and its shard of them."""
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    width, depth = settings.width, settings.layers
    return [
        TiedLayerSpec("embedding", Embedding, vocabulary, width),
        LayerSpec(Position, settings.context, width),
        *(LayerSpec(Block, width, settings.heads, depth, shards) for _ in range(depth)),
        LayerSpec(nn.LayerNorm, width),
        TiedLayerSpec("embedding", Embedding, vocabulary, width),
    ]


class GPT(nn.Module):
    """All layers in one module, with the names and, by their seeds, the weights that PipelineModule would give them."""

    def __init__(self, specs: list[Any], seed: int) -> None:
        super().__init__()
        self.tied_modules = nn.ModuleDict()
        self.path: list[nn.Module] = []
        for index, spec in enumerate(specs):
            parent, name = (self.tied_modules, spec.key) if hasattr(spec, "key") else (self, str(index))
            if not hasattr(parent, name):
                torch.manual_seed(seed + index)
                parent.add_module(name, spec.build())
            self.path.append(getattr(parent, name))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.path:
            x = layer(x)
        return x
