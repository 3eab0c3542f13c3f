"""The manual that comes with Python, byte by byte, and the loss of a model that predicts the next byte of it."""

import statistics
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

CONTEXT = 64


def manual() -> Tensor:
    """Return all pages in one, as bytes."""
    raw = "\n".join(topics[name] for name in sorted(topics)).encode()
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw so many pieces of the text, (count, length) integers."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def loss_of(model: nn.Module, text: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    pieces = windows(text, batch, CONTEXT + 1, generator)
    return nn.functional.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: nn.Module, text: Tensor, batch: int) -> float:
    """Return the mean loss of 20 batches, the same for all models."""
    generator = torch.Generator().manual_seed(0)
    return statistics.mean(float(loss_of(model, text, batch, generator)) for _ in range(20))
