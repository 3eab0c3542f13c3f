"""3D-Shampoo in one process, beside AdamW: a small character model on the texts of Python's own help.

python examples/plain.py
"""

from collections.abc import Iterable
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

import shampoo3d

CONTEXT, STEPS = 16, 300


def model_of(vocabulary: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(vocabulary, 32), nn.Flatten(), nn.Linear(32 * CONTEXT, 256), nn.GELU(), nn.Linear(256, vocabulary)
    )


def adamw(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=6e-3)


def shampoo(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return shampoo3d.Shampoo(params, lr=6e-3)


def main() -> None:
    text = "\n".join(value for value in topics.values() if isinstance(value, str))
    vocabulary = sorted(set(text))
    number = {character: i for i, character in enumerate(vocabulary)}
    codes = torch.tensor([number[character] for character in text])
    for make_optimizer in (adamw, shampoo):
        model = model_of(len(vocabulary))
        optimizer = make_optimizer(model.parameters())
        generator = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(STEPS):
            starts = torch.randint(len(codes) - CONTEXT, (256, 1), generator=generator)
            windows = codes[starts + torch.arange(CONTEXT + 1)]
            loss = nn.functional.cross_entropy(model(windows[:, :-1]), windows[:, -1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"{type(optimizer).__name__:8} mean loss of the last 50 of {STEPS} steps: {sum(losses[-50:]) / 50:.3f}")
        if isinstance(optimizer, shampoo3d.Shampoo):
            print(optimizer.report())


if __name__ == "__main__":
    main()
