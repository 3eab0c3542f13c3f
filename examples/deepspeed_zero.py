"""3D-Shampoo under DeepSpeed's ZeRO, stage 2 unless another is given: the engine cuts the matrices, the blocks stay.

DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 examples/deepspeed_zero.py [0|1|2|3]
"""

import os
import sys
from collections.abc import Iterator

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

import shampoo3d

STEPS, WIDTH = 40, 64
STAGE = int(sys.argv[1]) if len(sys.argv) > 1 else 2
CONFIG = {
    "train_micro_batch_size_per_gpu": 16,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.0,  # DeepSpeed clips by 1.0 unless told otherwise
    "zero_optimization": {"stage": STAGE},
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 10**9,
}


def batches(rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Points and a fixed function of them; every process has its own."""
    teacher = torch.randn(WIDTH, 8, generator=torch.Generator().manual_seed(0)) / 8
    generator = torch.Generator().manual_seed(1 + rank)
    while True:
        x = torch.randn(16, WIDTH, generator=generator)
        yield x, (x @ teacher).tanh()


def main() -> None:
    cuda = torch.cuda.is_available()
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 8)]
    model = nn.Sequential(*layers)
    optimizer = shampoo3d.Shampoo(model.parameters(), lr=0.01, hyperparams={"block_size": 32})
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    data = batches(dist.get_rank())
    for step in range(STEPS):
        for _ in range(engine.gradient_accumulation_steps()):
            x, y = (part.to(engine.device) for part in next(data))
            loss = nn.functional.mse_loss(engine(x), y)
            engine.backward(loss)
            engine.step()
        if dist.get_rank() == 0 and step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    if dist.get_rank() == 0:
        print(optimizer.report(), flush=True)
    dist.barrier()  # nobody leaves while another may still need the connection
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
