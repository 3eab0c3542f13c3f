"""State and bytes per rank of a GPT under DeepSpeed: how they fall with the ranks, against what is foreseen.

python benchmarks/traffic.py [--output benchmarks/results/traffic.json]

Real processes over gloo on this machine; steps with all gradients, roots refreshed at each. No times are measured.
"""

import argparse
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from record import setting, write
from torch import Tensor, nn

from shampoo3d import Distribution, Shampoo, ShampooHyperParams

WIDTH, LAYERS, VOCABULARY, BLOCK, STEPS = 128, 4, 256, 64, 3
RANKS = (1, 2, 4, 8)
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "ZeRO 0": (0, {}),
    "ZeRO 0, root_copies=2": (0, {"root_copies": 2}),
    "ZeRO 1": (1, {}),
    "ZeRO 2": (2, {}),
    "ZeRO 3": (3, {}),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
    layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), layers, nn.Linear(WIDTH, VOCABULARY))


def batches(rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    while True:
        tokens = torch.randint(VOCABULARY, (2, 17), generator=generator)
        yield tokens[:, :-1], tokens[:, 1:]


def run(rank: int, world: int, port: int, stage: int, settings: dict[str, Any], results: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import deepspeed
    import deepspeed.ops

    # Its shared-memory operation takes half a minute to build.
    deepspeed.ops.__compatible_ops__ = dict.fromkeys(deepspeed.ops.__compatible_ops__, False)
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    net = model()
    hyperparams = ShampooHyperParams(block_size=BLOCK, beta2=0.95, matrix_eps=1e-6)
    optimizer = Shampoo(net.parameters(), 1e-3, hyperparams=hyperparams, distribution=Distribution(**settings))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    before: dict[str, int] = {}
    for step, (tokens, labels) in zip(range(STEPS), batches(rank), strict=False):
        if step == STEPS - 1:
            before = optimizer.received_bytes()
        logits = engine(tokens)
        engine.backward(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
        engine.step()
    received = {what: n - before.get(what, 0) for what, n in optimizer.received_bytes().items()}
    found = {"state": optimizer.state_bytes(), "received": received, "foreseen": dict(optimizer.report().traffic)}
    all_gather_object: list[Any] = [None] * world
    dist.all_gather_object(all_gather_object, found)
    if rank == 0:
        results.put(all_gather_object)
    dist.barrier()
    os._exit(0)  # DeepSpeed's threads need not be waited for


def measure(world: int, stage: int, settings: dict[str, Any]) -> dict[str, Any]:
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (world, port, stage, settings, results)
    ranks = [context.Process(target=run, args=(rank, *arguments)) for rank in range(world)]
    for process in ranks:
        process.start()
    all_gather_object: list[dict[str, Any]] = results.get()
    for process in ranks:
        process.join()
    kinds = sorted({what for found in all_gather_object for what in found["received"]} - {"norms"})
    for found in all_gather_object:
        assert all(found["received"].get(what, 0) == found["foreseen"].get(what, 0) for what in kinds), found
    return {
        "ranks": world,
        "state bytes per rank": [found["state"] for found in all_gather_object],
        "received per rank": {what: [found["received"].get(what, 0) for found in all_gather_object] for what in kinds},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "traffic.json")
    output: Path = parser.parse_args().output
    parameters = [p.numel() for p in model().parameters()]
    rows = []
    for name, (stage, settings) in WAYS.items():
        for world in RANKS:
            if world % settings.get("root_copies", 1) == 0:
                rows.append({"way": name, **measure(world, stage, settings)})
                state, received = rows[-1]["state bytes per rank"], rows[-1]["received per rank"]
                total = max(map(sum, zip(*received.values(), strict=True))) if received else 0
                print(f"{name:26} ranks {world}: state {max(state):>10}, received at most {total:>10}", flush=True)
    model_ = f"GPT-like, width {WIDTH}, {LAYERS} layers, block {BLOCK}, {sum(parameters)} parameters, float32"
    write(output, {"setting": setting(model=model_, backend="gloo"), "rows": rows})


if __name__ == "__main__":
    main()
