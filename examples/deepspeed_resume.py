"""A run that goes on elsewhere: 20 more steps from the newest checkpoint in a folder, whatever ranks wrote it.

DS_ACCELERATOR=cpu torchrun --nproc-per-node 4 examples/deepspeed_resume.py runs/resume 1
DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 examples/deepspeed_resume.py runs/resume 3
"""

import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

import shampoo3d

STEPS, BATCH, WIDTH = 20, 32, 64
FOLDER, STAGE = Path(sys.argv[1]), int(sys.argv[2])


def batch(step: int) -> tuple[Tensor, Tensor]:
    """This rank's share of the points of a step, and a fixed function of them: the same on any number of ranks."""
    teacher = torch.randn(WIDTH, 8, generator=torch.Generator().manual_seed(0)) / 8
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1 + step))
    mine = x.chunk(dist.get_world_size())[dist.get_rank()]
    return mine, (mine @ teacher).tanh()


def main() -> None:
    cuda = torch.cuda.is_available()
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 8)]
    model = nn.Sequential(*layers)
    optimizer = shampoo3d.Shampoo(model.parameters(), lr=0.01, hyperparams={"block_size": 32})
    config = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "zero_optimization": {"stage": STAGE},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    first, latest = 0, shampoo3d.latest_checkpoint(FOLDER)
    if latest is not None:
        first = optimizer.load_checkpoint(latest).step
    for step in range(first, first + STEPS):
        x, y = (part.to(engine.device) for part in batch(step))
        loss = nn.functional.mse_loss(engine(x), y)
        engine.backward(loss)
        engine.step()
        dist.all_reduce(loss := loss.detach())
        if dist.get_rank() == 0 and step % 5 == 4:
            mean = loss.item() / dist.get_world_size()
            print(f"stage {STAGE}, {dist.get_world_size()} ranks, step {step + 1}: loss {mean:.4f}", flush=True)
    optimizer.save_checkpoint(FOLDER / f"step-{first + STEPS}")
    if dist.get_rank() == 0:
        print(optimizer.report(), flush=True)
    dist.barrier()  # nobody leaves while another may still need the connection
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
