"""3D-Shampoo under DeepSpeed's pipeline x data parallelism: the README's lines in a whole script.

DS_ACCELERATOR=cpu torchrun --nproc-per-node 4 examples/deepspeed_pipeline.py
"""

import os
from collections.abc import Iterator

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn

import shampoo3d

STAGES, STEPS, WIDTH = 2, 40, 64
CONFIG = {
    "train_micro_batch_size_per_gpu": 16,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.0,  # DeepSpeed clips by 1.0 unless told otherwise
    "steps_per_print": 10**9,
}


def batches(rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Points and a fixed function of them; every data-parallel rank has its own."""
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
    layers = [LayerSpec(nn.Linear, WIDTH, WIDTH), nn.GELU(), LayerSpec(nn.Linear, WIDTH, WIDTH), nn.GELU()]
    model = PipelineModule(
        [*layers, LayerSpec(nn.Linear, WIDTH, 8)],
        num_stages=STAGES,
        loss_fn=nn.functional.mse_loss,
        partition_method="parameters",
    )
    settings = {"preset": "recommended", "block_size": 32}
    optimizer = shampoo3d.Shampoo(model.parameters(), lr=0.01, topology=model.topology(), hyperparams=settings)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    data = batches(engine.grid.get_data_parallel_rank())
    for step in range(STEPS):
        loss = engine.train_batch(data)
        if engine.global_rank == 0 and step % 10 == 9:
            print(f"step {step + 1}: loss {float(loss):.4f}", flush=True)
    if engine.grid.get_data_parallel_rank() == 0:
        print(f"stage {engine.stage_id}:\n{optimizer.report()}", flush=True)
    dist.barrier()  # nobody leaves while another may still need the connection
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
