"""3D-Shampoo under FSDP2: every process stores some rows of each matrix, each block is worked on whole by one.

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shampoo3d

STEPS, WIDTH = 40, 64


def batches(rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Points and a fixed function of them; every process has its own."""
    teacher = torch.randn(WIDTH, 8, generator=torch.Generator().manual_seed(0)) / 8
    generator = torch.Generator().manual_seed(1 + rank)
    while True:
        x = torch.randn(32, WIDTH, generator=generator)
        yield x, (x @ teacher).tanh()


def main() -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 8)]
    model = nn.Sequential(*layers).to(kind)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = shampoo3d.Shampoo(model.parameters(), lr=0.01, hyperparams={"block_size": 32})
    data = batches(dist.get_rank())
    for step in range(STEPS):
        x, y = (part.to(kind) for part in next(data))
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0 and step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    if dist.get_rank() == 0:
        print(optimizer.report(), flush=True)
    dist.barrier()  # nobody leaves while another may still need the connection
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
