"""The models of the tasks, small enough for one core."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A pre-norm transformer block with one matrix for queries, keys and values."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """Logits of the next character at every place of the context."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.position.weight)))


class VisionTransformer(nn.Module):
    """Logits of the class of square images, which are cut into patches."""

    def __init__(self, side: int, patch: int, width: int, layers: int, heads: int, classes: int = 10) -> None:
        super().__init__()
        self.patch = patch
        self.embedding = nn.Linear(patch * patch, width)
        self.position = nn.Embedding((side // patch) ** 2, width)
        nn.init.normal_(self.position.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        x = self.blocks(self.embedding(patches.flatten(3).flatten(1, 2)) + self.position.weight)
        return self.head(self.norm(x).mean(1))


class ConvNet(nn.Sequential):
    """Logits of the class of square images: three convolutions, each followed by a pooling, and two layers on top."""

    def __init__(self, side: int, channels: Sequence[int] = (16, 32, 64), classes: int = 10) -> None:
        layers: list[nn.Module] = [nn.Unflatten(1, (1, side))]
        for before, after in pairwise((1, *channels)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        features = channels[-1] * (side // 2 ** len(channels)) ** 2
        super().__init__(*layers, nn.Flatten(), nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, classes))


class Autoencoder(nn.Sequential):
    """Logits of each pixel, by way of a code that four layers of tanh units, each half the one before, lead to."""

    def __init__(self, pixels: int) -> None:
        down = [pixels // 2**depth for depth in range(5)]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise([*down, *reversed(down[:-1])]):
            layers += [nn.Linear(before, after), nn.Tanh()]
        super().__init__(*layers[:-1], nn.Unflatten(1, (round(pixels**0.5),) * 2))
        # PyTorch's own weights shrink what passes a layer to about half: eight of them would leave nothing.
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight, nn.init.calculate_gain("tanh"))


def seeded(make: type[nn.Module], *args: int, seed: int) -> nn.Module:
    """The same weights for the same seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(*args)
