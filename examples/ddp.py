"""3D-Shampoo under DistributedDataParallel: every process has the whole model, each block's work is done by one.

torchrun --nproc-per-node 2 examples/ddp.py
"""

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import shampoo3d

STEPS, WIDTH = 40, 64


def batches(rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Points and a fixed function of them; every process has its own."""
    teacher = torch.randn(WIDTH, 8, generator=torch.Generator().manual_seed(0)) / 8
    generator = torch.Generator().manual_seed(1 + rank)
    while True:
        x = torch.randn(32, WIDTH, generator=generator)
        yield x, (x @ teacher).tanh()


def train(device: torch.device) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 8)]
    model = DistributedDataParallel(nn.Sequential(*layers).to(device))
    optimizer = shampoo3d.Shampoo(model.parameters(), lr=0.01, hyperparams={"block_size": 32})
    data = batches(dist.get_rank())
    for step in range(STEPS):
        x, y = (part.to(device) for part in next(data))
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0 and step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    if dist.get_rank() == 0:
        print(optimizer.report(), flush=True)


def main() -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    train(torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu"))
    # The model is gone by now: DistributedDataParallel that outlives its group may wait for it for ever, over gloo.
    dist.barrier()  # nobody leaves while another may still need the connection
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
