"""A small GPT as the list of layers that DeepSpeed's PipelineModule cuts into stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear, scaled_dot_product_attention

if TYPE_CHECKING:
    from .settings import Settings

PARTITION = "type:^block$"
"""Every stage gets the same number of transformer blocks."""


class Position(nn.Module):
    """Adds the learned position vectors."""

    def __init__(self, context: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(context, width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.embedding.weight[: x.shape[1]]
        return out


class Block(nn.Module):
    """Pre-norm attention and MLP; the depth of the model scales down what each block adds to the residual stream."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        for part in (self.qkv, self.out, self.up, self.down):
            nn.init.normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)
        with torch.no_grad():
            self.out.weight /= (2 * layers) ** 0.5
            self.down.weight /= (2 * layers) ** 0.5

    def attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        out: Tensor = x + self.down(gelu(self.up(self.norm2(x))))
        return out


class Embedding(nn.Embedding):
    """Token vectors, also used as the output layer, hence their small scale."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__(vocabulary, width)
        nn.init.normal_(self.weight, std=0.02)


def head(embedding: Embedding, x: Tensor) -> Tensor:
    return linear(x, embedding.weight)


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


def layers(settings: Settings, vocabulary: int) -> list[Any]:
    """The specifications of all layers; a process builds only those of its stage."""
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    width = settings.width
    return [
        TiedLayerSpec("embedding", Embedding, vocabulary, width),
        LayerSpec(Position, settings.context, width),
        *(LayerSpec(Block, width, settings.heads, settings.layers) for _ in range(settings.layers)),
        LayerSpec(nn.LayerNorm, width),
        TiedLayerSpec("embedding", Embedding, vocabulary, width, forward_fn=head),
    ]
