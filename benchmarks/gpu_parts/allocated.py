"""Bytes that the package foresees for a few layers of GPT-2 small, against those that the allocator gives out.

Kept: statistics, roots, momenta and buffers, after some steps. At most: with all that a step allocates and frees again.
On a CPU, whose allocator does not count, those of the tensors that operations return.
"""

from dataclasses import replace

import torch
from gpu_parts.bench import FAULT, OK, PRESETS, Bench, Found, Row, put_gradients
from tasks.models import GPT

from shampoo3d import Shampoo, ShampooHyperParams
from shampoo3d.planning.assignment import make_plan
from shampoo3d.planning.grid import describe
from shampoo3d.planning.layout import Sharding
from shampoo3d.planning.shards import Holder, Holders, Shard
from shampoo3d.runtime.memory import Memory, Meter, memory

LAYERS, EVERY = 3, 2
STEPS = 2 * EVERY + 3  # with every kind of step
WITHIN = 0.05
"""Part by which the bytes that are kept may differ: libraries take memory of the same allocator to work in."""


def foreseen(model: GPT, hp: ShampooHyperParams, device: str) -> Memory:
    tables = {model.embedding.weight, model.position.weight}
    shardings = [
        Sharding(
            name,
            tuple(param.shape),
            str(param.dtype).removeprefix("torch."),
            Holders([Holder(0, Shard.whole(tuple(param.shape)))]),
            excluded="embedding" if param in tables and hp.ignore_embedding_layer else "",
        )
        for name, param in model.named_parameters()
    ]
    matrices = [describe(sharding, hp, 1) for sharding in shardings]
    return memory([(make_plan(matrices, (0,), hp), matrices)], 0, hp, device=device)


def allocated(model: GPT, hp: ShampooHyperParams, device: torch.device) -> tuple[int, int]:
    """Return the bytes that are kept, and the most, by the GPU's allocator."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    optimizer = Shampoo(model.parameters(), 1e-3, hyperparams=hp)
    optimizer.bind()  # compares values of parameters, which is not foreseen
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(STEPS):
        optimizer.step()
    assert optimizer.root_failures == 0  # and nothing is under way in the background
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device) - before, torch.cuda.max_memory_allocated(device) - before


def metered(model: GPT, hp: ShampooHyperParams) -> tuple[int, int]:
    """Return the same for the tensors that operations return, on a CPU."""
    params = list(model.parameters())
    optimizer = Shampoo(params, 1e-3, hyperparams=hp)
    with Meter([*params, *(param.grad for param in params if param.grad is not None)]) as meter:
        for _ in range(STEPS):
            optimizer.step()
        return meter.live, meter.peak


def settings(bench: Bench) -> dict[str, ShampooHyperParams]:
    block = bench.size.blocks[0]
    made = {name: make(block_size=block, preconditioning_compute_steps=EVERY) for name, make in PRESETS.items()}
    made = {name: replace(hp, computation=replace(hp.computation, fresh_steps=0)) for name, hp in made.items()}
    full = replace(made["default"].computation, root_storage="state", momentum_storage="state")
    made["default, float32 state"] = replace(made["default"], computation=full)
    if bench.cuda:  # a thread's tensors are not seen by the meter
        beside = replace(made["default"].computation, asynchronous=True)
        made["default, asynchronous"] = replace(made["default"], computation=beside)
    return made


def forecast(bench: Bench) -> Found:
    """Bytes foreseen against those allocated, of the optimizer alone."""
    whole = bench.size.models[0]
    shape = replace(whole, layers=min(LAYERS, whole.layers))
    model = shape.make(bench.device)
    put_gradients(list(model.parameters()))
    if bench.cuda:
        allocated(model, settings(bench)["default"], bench.device)  # libraries take what they work in, and keep it
    for name, hp in settings(bench).items():
        told = foreseen(model, hp, bench.device.type)
        kept, most = allocated(model, hp, bench.device) if bench.cuda else metered(model, hp)
        yield "bytes", row(name, f"{shape.name}, {shape.layers} layers", told, kept, most)


def row(name: str, model: str, told: Memory, kept: int, most: int) -> Row:
    expected = told.state + told.buffers
    apart = abs(kept / expected - 1)
    return {
        "settings": name,
        "model": model,
        "kept MB, foreseen": expected / 1e6,
        "kept MB": kept / 1e6,
        "at most MB, foreseen": told.total / 1e6,
        "at most MB": most / 1e6,
        "at most, of foreseen": most / told.total,
        "verdict": OK if apart <= WITHIN else f"{FAULT}: what is kept differs by {apart:.0%}",
    }
