"""Effect of each setting of the computation on the loss of a small language model and on the seconds of a step.

A GPT of bytes on the manual that comes with Python, one process, one thread, several seeds; the same batches and rates
for all. Usage: ``python benchmarks/variants.py [--steps 300] [--seeds 3] [out.json]``.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from manual import CONTEXT, loss_of, manual, validation_loss
from record import setting, write
from torch import Tensor, nn

from shampoo3d import Computation, Shampoo, ShampooHyperParams

BATCH, WIDTH, LAYERS, RATE = 16, 64, 2, 0.1
EVERY_STEP = ShampooHyperParams(beta2=0.95, matrix_eps=1e-6, block_size=64)
EVERY_10 = replace(EVERY_STEP, preconditioning_compute_steps=10)
VARIANTS = {
    "every step": EVERY_STEP,
    "every step, asynchronous": replace(EVERY_STEP, computation=Computation(asynchronous=True)),
    "every 10, together": replace(EVERY_10, computation=Computation(refresh="together")),
    "every 10, staggered": EVERY_10,
    "every 10, staggered, asynchronous": replace(EVERY_10, computation=Computation(asynchronous=True)),
    "every 23, staggered": replace(EVERY_STEP, preconditioning_compute_steps=23),
    "every step, bfloat16 products": replace(EVERY_STEP, computation=Computation(products="bfloat16")),
    "every step, bfloat16 roots": replace(EVERY_STEP, computation=Computation(root_storage="bfloat16")),
    "every step, bfloat16 momenta": replace(EVERY_STEP, computation=Computation(momentum_storage="bfloat16")),
    "every step, minimax roots": replace(EVERY_STEP, computation=Computation(root_method="minimax")),
}


class Model(nn.Module):
    """A pre-norm transformer whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return self.norm(x) @ self.embedding.weight.T


def train(hp: ShampooHyperParams, text: Tensor, steps: int, seed: int) -> tuple[float, float]:
    """Validation loss at the end, and the median CPU seconds of a step of the optimizer."""
    cut = len(text) * 9 // 10
    torch.manual_seed(seed)
    model = Model()
    optimizer = Shampoo(model.parameters(), RATE, hyperparams=hp)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1, t / 20, (steps - t) / steps * 1.25))
    batches, seconds = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, text[:cut], BATCH, batches).backward()
        start = time.process_time()
        optimizer.step()
        seconds.append(time.process_time() - start)
        schedule.step()
    return validation_loss(model, text[cut:], BATCH), statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("output", type=Path, nargs="?", default=Path(__file__).parent / "results" / "variants.json")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    text = manual()
    rows = []
    for name, hp in VARIANTS.items():
        losses, seconds = zip(*(train(hp, text, chosen.steps, seed) for seed in range(chosen.seeds)), strict=True)
        rows.append({"variant": name, "losses": [round(x, 4) for x in losses], "seconds": statistics.median(seconds)})
        print(
            f"{name:36} {statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}), "
            f"{1e3 * rows[-1]['seconds']:.2f} ms a step"
        )
    write(chosen.output, setting(what="variants of the computation", steps=chosen.steps, rate=RATE, rows=rows))


if __name__ == "__main__":
    main()
