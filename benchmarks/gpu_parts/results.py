"""Weights after some steps with given gradients, against float64 on the CPU, for presets, dtypes and layouts.

The error is the distance of the weights from those of float64, as a part of the way that these have come. A CPU has
rounding errors, too: the same settings and method of roots in float32 on the CPU are next to it, and a device that is
four times further away, and more than half a percent, is at fault.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_parts.bench import FAULT, PRESETS, Bench, Found, first_line, judged, relative
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from shampoo3d import Shampoo, ShampooHyperParams

CPU = torch.device("cpu")
SHAPES = [
    (96, 32),
    (96,),
    (64, 64),
    (128, 32),
    (32, 8, 2, 2),
]  # in square blocks, so that all statistics have full rank
STEPS, SAVED, RATE, BLOCK = 8, 5, 0.01, 32
WITHIN, SAME, CROSSED = 5e-3, 3e-3, 2e-2
"""Errors and differences of layouts that are no fault; the last after other roundings and methods of roots."""
FLOAT32 = {"root_storage": "state", "momentum_storage": "state"}
CHANGES: dict[str, dict[str, Any]] = {
    "": {},
    "asynchronous": {"asynchronous": True},
    "together": {"refresh": "together"},
    "bfloat16 products": {"products": "bfloat16"},
    "bfloat16 state": {"root_storage": "bfloat16", "momentum_storage": "bfloat16"},
    "float32 state": FLOAT32,
    "eigh": {"root_method": "eigh"},
}


class Bag(nn.Module):
    """Parameters of the shapes above, with the same values whatever the device and dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(draw(shape, seed, dtype)) for seed, shape in enumerate(SHAPES))
        self.to(device)


def draw(shape: Sequence[int], seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def put(params: Sequence[Tensor], t: int) -> None:
    """Give the gradients of step t, which have much in common.

    No block of these is nearly singular: rounding would choose a part of the eigenbases that SOAP works in.
    """
    for k, param in enumerate(params):
        mean, own = draw(param.shape, 300 + k, torch.float64), draw(param.shape, 1000 * (t + 1) + k, torch.float64)
        G = (mean + 0.3 * own).to(param.device, param.dtype)
        param.grad = distribute_tensor(G, param.device_mesh, param.placements) if isinstance(param, DTensor) else G


def whole(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach().clone() for p in params]


def advance(optimizer: Shampoo, params: Sequence[Tensor], steps: range) -> list[Tensor]:
    for t in steps:
        put(params, t)
        optimizer.step()
    return whole(params)


def trained(hp: ShampooHyperParams, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    params = list(Bag(device, dtype).weights)
    return advance(Shampoo(params, RATE, hyperparams=hp), params, range(STEPS))


def preset(name: str, **changes: Any) -> ShampooHyperParams:
    hp = PRESETS[name](block_size=BLOCK, preconditioning_compute_steps=3)
    return replace(hp, computation=replace(hp.computation, **changes))


def like_the_device(hp: ShampooHyperParams, bench: Bench) -> ShampooHyperParams:
    """On the CPU, compute roots by the method that "auto" takes on the device."""
    if hp.variant.direction == "root" and hp.computation.root_method == "auto":
        return replace(hp, computation=replace(hp.computation, root_method="minimax"))
    return hp


def against_float64(bench: Bench) -> Found:
    start = list(Bag(CPU, torch.float64).weights)
    for name, change in product(PRESETS, CHANGES):
        if change == "eigh" and name == "soap":
            continue
        hp = preset(name, **CHANGES[change])
        if change and hp == preset(name):
            continue
        exact = trained(hp, CPU, torch.float64)
        for dtype in (torch.float32,) if change else (torch.float32, torch.bfloat16):
            error = relative(trained(hp, bench.device, dtype), exact, start)
            on_cpu = relative(trained(like_the_device(hp, bench), CPU, dtype), exact, start) if bench.cuda else error
            verdict = judged(error, max(4 * on_cpu, WITHIN), "error")
            about = {"preset": name, "computation": change or "as it is", "parameters": str(dtype)[6:]}
            yield "results", {**about, "error": error, "error of the CPU": on_cpu, "verdict": verdict}


# ---- layouts of one process ------------------------------------------------------------------------------------------


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join a process group of one rank, as a script that was written for many does on one GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with tempfile.TemporaryDirectory() as place:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{place}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def plain(hp: ShampooHyperParams, device: torch.device) -> list[Tensor]:
    return trained(hp, device, torch.float32)


def replicated(hp: ShampooHyperParams, device: torch.device) -> list[Tensor]:
    model = nn.parallel.DistributedDataParallel(Bag(device, torch.float32))
    return advance(Shampoo(model, RATE, hyperparams=hp), list(model.parameters()), range(STEPS))


def sharded(hp: ShampooHyperParams, device: torch.device) -> list[Tensor]:
    model = Bag(device, torch.float32)
    fully_shard(model, mesh=init_device_mesh(device.type, (1,)))
    return advance(Shampoo(model, RATE, hyperparams=hp), list(model.parameters()), range(STEPS))


def resumed(hp: ShampooHyperParams, first: torch.device, then: torch.device, folder: bool) -> list[Tensor]:
    """Save after some steps, with the weights, and go on with a new optimizer, perhaps on another device."""
    params = list(Bag(first, torch.float32).weights)
    optimizer = Shampoo(params, RATE, hyperparams=hp)
    advance(optimizer, params, range(SAVED))
    again = [nn.Parameter(p.detach().to(then, copy=True)) for p in params]
    other = Shampoo(again, RATE, hyperparams=hp)
    with tempfile.TemporaryDirectory() as place:
        if folder:
            optimizer.save_checkpoint(Path(place) / "state")
            other.load_checkpoint(Path(place) / "state")
        else:
            torch.save(optimizer.state_dict(), Path(place) / "state.pt")
            other.load_state_dict(torch.load(Path(place) / "state.pt", map_location=then, weights_only=True))
        return advance(other, again, range(SAVED, STEPS))


Layout = Callable[[ShampooHyperParams, torch.device], list[Tensor]]
ALONE: dict[str, tuple[Layout, float]] = {
    "state dictionary saved and loaded": (lambda hp, device: resumed(hp, device, device, False), SAME),
    "folder saved and loaded": (lambda hp, device: resumed(hp, device, device, True), SAME),
}
CROSSING: dict[str, tuple[Layout, float]] = {
    "saved on the device, loaded on the CPU": (lambda hp, device: resumed(hp, device, CPU, True), CROSSED),
    "saved on the CPU, loaded on the device": (lambda hp, device: resumed(hp, CPU, device, True), CROSSED),
}
GROUPED: dict[str, tuple[Layout, float]] = {
    "process group of one rank": (plain, SAME),
    "DistributedDataParallel": (replicated, SAME),
    "FSDP2": (sharded, SAME),
}


def in_layouts(bench: Bench) -> Found:
    """Run the layouts; a CPU leaves out asynchronous roots and other devices, which tests run there."""
    ways: list[dict[str, Any]] = [{}, {"asynchronous": True}] if bench.cuda else [{}]
    settings = {
        (name, "asynchronous" if way else "in the step"): preset(name, **way) for name in PRESETS for way in ways
    }
    alike = {names: plain(hp, bench.device) for names, hp in settings.items()}
    for names, hp in settings.items():
        yield from against(names, hp, alike[names], ALONE, bench.device)
    for name in PRESETS if bench.cuda else ():
        hp = preset(name, **FLOAT32)  # with bfloat16, SOAP feels the roundings of another device
        yield from against((name, "in the step"), hp, plain(hp, bench.device), CROSSING, bench.device)
    with process_group(bench.device):
        for names, hp in settings.items():
            yield from against(names, hp, alike[names], GROUPED, bench.device)


def against(
    names: tuple[str, str],
    hp: ShampooHyperParams,
    expected: Sequence[Tensor],
    layouts: Mapping[str, tuple[Layout, float]],
    device: torch.device,
) -> Found:
    start = list(Bag(CPU, torch.float64).weights)
    for layout, (run, most) in layouts.items():
        row = {"preset": names[0], "roots": names[1], "layout": layout}
        try:
            apart = relative(run(hp, device), expected, start)
        except Exception as error:  # the other layouts are still to be tried
            yield "layouts", {**row, "difference": None, "verdict": f"{FAULT}: {first_line(error)}"}
        else:
            yield "layouts", {**row, "difference": apart, "verdict": judged(apart, most, "difference")}


def results(bench: Bench) -> Found:
    """Results against float64 on the CPU, and of the layouts that one device can hold against each other."""
    yield from against_float64(bench)
    yield from in_layouts(bench)
