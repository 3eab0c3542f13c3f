"""Cases on several ranks of the stand-in for an accelerator, over gloo: what each rank finds.

Importing it registers the stand-in: only processes of a test of their own may.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Rows
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.utils._pytree import tree_map

from shampoo3d import Computation, Distribution, Shampoo, ShampooHyperParams, StepRefusedError
from shampoo3d.distributed.topology import ParallelGroups, Topology
from shampoo3d.engines import reading
from shampoo3d.engines.dtensor import local
from shampoo3d.engines.engine import GroupContent, LocalShard
from shampoo3d.engines.native import Torch
from shampoo3d.numerics import background
from shampoo3d.planning.shards import Shard
from standin import DEVICE, Accelerator, AtOnce, accelerator

from . import standin_settings
from .standin_settings import PRESETS, gradients, weights

Span = tuple[int, int]


class Pieces(Torch):
    """Parameters of which each rank has a piece on the device: of each its share, or of all in a row, as one tensor."""

    name = "pieces"

    def __init__(self, *, one: bool) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        self.params, self.one = [nn.Parameter(w) for w in weights()], one
        total = sum(param.numel() for param in self.params)

        def share(elements: int) -> Span:
            return elements * 3 * rank // (3 * world - 1) if rank else 0, (
                elements * 3 * (rank + 1) // (3 * world - 1) if rank + 1 < world else elements
            )

        if one:
            first, last, start, self.spans = *share(total), 0, list[Span]()
            for param in self.params:
                self.spans.append(tuple(min(max(edge - start, 0), param.numel()) for edge in (first, last)))  # type: ignore[arg-type]
                start += param.numel()
        else:
            self.spans = [share(param.numel()) for param in self.params]
        self.pieces = [nn.Parameter(piece.to(DEVICE)) for piece in self.cut(self.params)]

    def cut(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        pieces = [x.detach().reshape(-1)[a:b].clone() for x, (a, b) in zip(tensors, self.spans, strict=True)]
        return [torch.cat(pieces)] if self.one else pieces

    def is_flat(self, group: GroupContent) -> bool:
        return True

    def local_shards(
        self, group: GroupContent, parallel: ParallelGroups, tied: Mapping[Tensor, Any]
    ) -> list[LocalShard]:
        shards, offset, ranks = [], 0, parallel.world.ranks
        for number, (param, (first, last)) in enumerate(zip(group.originals, self.spans, strict=True)):
            shape, piece = tuple(param.shape), self.pieces[0 if self.one else number]
            shard = Shard.whole(shape).range(first, last)
            at = offset if self.one and first < last else 0
            shards.append(LocalShard(param, piece, group.number, at, shape, shard, ranks, ranks, sharded=True))
            offset += last - first
        return shards


def _rows(tensors: Sequence[Tensor]) -> list[Tensor]:
    world, rank = dist.get_world_size(), dist.get_rank()
    return [x.detach().tensor_split(world)[rank].contiguous() for x in tensors]


class Session:
    """An optimizer of parameters in some layout on the device."""

    def __init__(self, layout: str, hp: ShampooHyperParams) -> None:
        copies = Distribution(root_copies=dist.get_world_size() if layout == "root copies" else 1)
        self.layout = layout
        if layout in ("replicas", "root copies", "fsdp2"):
            self.cut: Callable[[Sequence[Tensor]], list[Tensor]] = _rows if layout == "fsdp2" else list
            self.params = [nn.Parameter(x) for x in self.placed(weights())]
            self.optimizer = Shampoo(self.params, lr=0.01, hyperparams=hp, distribution=copies)
        else:
            engine = Pieces(one=layout == "one slice")
            reading.ENGINES.insert(0, engine)
            self.cut, self.params = engine.cut, engine.pieces
            self.optimizer = Shampoo(engine.params, lr=0.01, hyperparams=hp, distribution=copies)
            self.optimizer.param_groups[0]["params"] = [*self.params]

    def placed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the part of each tensor that this rank stores, on the device."""
        here = [piece.to(DEVICE) for piece in self.cut(tensors)]
        if self.layout != "fsdp2":
            return here
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
        kinds = (TensorMeta(x.shape, x.stride(), x.dtype) for x in tensors)
        specs = (DTensorSpec(mesh, (Rows(0),), tensor_meta=kind) for kind in kinds)
        return [DTensor(x, spec, requires_grad=False) for x, spec in zip(here, specs, strict=True)]  # type: ignore[call-arg]

    def put(self, t: int) -> "Session":
        for param, gradient in zip(self.params, self.placed(gradients(t)), strict=True):
            param.grad = gradient
        return self

    def train(self, *steps: int) -> "Session":
        for t in steps:
            self.put(t).optimizer.step()
        return self

    def weights(self) -> list[Tensor]:
        return [local(param).detach().cpu().clone() for param in self.params]

    def check(self, expected: Sequence[Tensor], tolerance: float = 1e-9) -> None:
        for a, b in zip(self.weights(), self.cut(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@contextmanager
def on_device() -> Iterator[Accelerator]:
    engines = [*reading.ENGINES]
    background._thread = lambda _: AtOnce()  # type: ignore[assignment]
    with accelerator() as gpu:
        yield gpu
    reading.ENGINES[:] = engines


def odd() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def spoil(session: Session) -> None:
    """Put a NaN into the last gradient of the last rank."""
    if odd():
        grad = session.params[-1].grad
        assert grad is not None
        local(grad).view(-1)[-1] = float("nan")


# ---- steps that count and steps that do not


def trajectory(layout: str, preset: str, expected: Sequence[Tensor]) -> tuple[list[int], int]:
    """Train with a step that is skipped; return how often the host read in each step, and the launches of the last."""
    reads = []
    with on_device() as gpu:
        session = Session(layout, PRESETS[preset])
        for t in (0, 1, 2, -1, 3, 4, 5):
            session.put(abs(t))
            if t < 0:
                spoil(session)
            before = session.weights()
            gpu.clear()
            session.optimizer.step()
            reads.append(gpu.reads.total())
            assert t < 5 or not gpu.uploads, gpu.uploads
            if t < 0:
                assert all(map(torch.equal, session.weights(), before))
        session.check(expected)
        assert session.optimizer.skipped_steps == 1
        assert {entry["step"] for entry in session.optimizer.state.values()} == {6}
    return reads, len(gpu.launches)


def checkpoints(layout: str, preset: str, folder: Path, expected: Sequence[Tensor]) -> None:
    """Save right after a step that was skipped, and go on from a folder and from a dictionary."""
    with on_device():
        session = Session(layout, PRESETS[preset]).train(0, 1, 2).put(3)
        spoil(session)
        session.optimizer.step()
        session.optimizer.save_checkpoint(folder)
        # That of slices is the state itself, not a copy, as with any optimizer of PyTorch.
        state = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, session.optimizer.state_dict())
        before = session.weights()
        session.train(3, 4, 5).check(expected)
        after = session.weights()
        for load in ("folder", "dictionary"):
            resumed = Session(layout, PRESETS[preset])
            if load == "folder":
                resumed.optimizer.load_checkpoint(folder)
            else:
                resumed.optimizer.load_state_dict(state)
                for param, weight in zip(resumed.params, before, strict=True):
                    local(param).detach().copy_(weight)
            assert all(map(torch.equal, resumed.weights(), before))
            assert resumed.optimizer.skipped_steps == 1
            assert all(map(torch.equal, resumed.train(3, 4, 5).weights(), after)), (layout, load)


def launches(layout: str, layers: int, block_size: int) -> tuple[list[list[str]], int]:
    """Return the launches of two steps of one phase, with a refresh, and how many calls the host makes in the last."""
    layer = [(24, 8), (24,), (8, 8), (8,), (32, 8), (32,), (8, 32), (8,)]
    with on_device() as gpu, mock.patch.object(standin_settings, "SHAPES", layer * layers):
        often = Computation(root_storage="bfloat16", momentum_storage="bfloat16", refresh="together")
        hp = ShampooHyperParams.default(block_size=block_size, preconditioning_compute_steps=1, computation=often)
        session = Session(layout, hp)
        session.train(0, 1)
        found, calls = [], 0

        def count(_: object, event: str, __: object) -> None:
            nonlocal calls
            calls += event == "call"

        for t in (2, 3):
            session.put(t)
            gpu.clear()
            calls = 0
            sys.setprofile(count)
            session.optimizer.step()
            sys.setprofile(None)
            found.append(list(gpu.launches))
    return found, calls


# ---- faults of the last rank, each undone afterwards


@contextmanager
def not_a_number(session: Session) -> Iterator[None]:
    spoil(session)
    yield


@contextmanager
def not_averaged(session: Session) -> Iterator[None]:
    for param in session.params if odd() else ():
        param.grad = None if param.grad is None else param.grad * 2.0
    yield


@contextmanager
def setting(session: Session, lr: float) -> Iterator[None]:
    group = session.optimizer.param_groups[0]
    before, group["lr"] = group["lr"], lr if odd() else group["lr"]
    yield
    group["lr"] = before


@contextmanager
def no_gradient(session: Session) -> Iterator[None]:
    if odd():
        session.params[0].grad = None
    yield


@contextmanager
def another_shape(session: Session) -> Iterator[None]:
    param = session.params[0]
    before = param.data
    if odd():
        param.grad, param.data = None, torch.ones(3, 3, dtype=torch.float64).to(DEVICE)
    yield
    param.data = before


@contextmanager
def no_state(session: Session) -> Iterator[None]:
    state = session.optimizer.state[session.params[0]]
    before = dict(state)
    if odd():
        state.clear()
    yield
    state.update(before)


FAULTS: dict[str, Callable[[Session], Any]] = {
    "NaN": not_a_number,
    "not averaged": not_averaged,
    "another rate": lambda session: setting(session, 0.5),
    "no rate": lambda session: setting(session, -1.0),
    "no gradient": no_gradient,
    "another shape": another_shape,
    "no state": no_state,
}


def fault(layout: str, name: str, expected: Sequence[Tensor]) -> tuple[list[str], int, list[int]]:
    """Try the fourth step with a fault, and go on without.

    Returns:
        The errors of that step and of the two calls after it, the steps that were skipped, and the host's reads in the
        faulty step and the last one.
    """
    errors, reads = [], []
    with on_device() as gpu:
        session = Session(layout, replace(PRESETS["default"], nonfinite_gradient="raise")).train(0, 1, 2)
        before = session.weights()
        session.put(3)
        with FAULTS[name](session):
            for _ in range(3 if name == "no state" else 2):
                gpu.clear()
                errors.append(attempt(session))
                reads.append(gpu.reads.total())
        session.put(3)
        assert all(map(torch.equal, session.weights(), before))
        session.train(3, 4)
        gpu.clear()
        session.train(5)
        reads.append(gpu.reads.total())
        session.check(expected)
    return errors, session.optimizer.skipped_steps, [reads[0], reads[-1]]


def attempt(session: Session) -> str:
    try:
        session.optimizer.step()
    except StepRefusedError as error:
        return str(error)
    return ""


def new_parameters(alone: bool) -> tuple[int, list[int], list[int]]:
    """Train two stages of a pipeline, and from the third step on another parameter of the last one, or of both.

    Returns:
        The steps that were skipped, the steps of the first parameter and the most of any, and the host's reads.
    """
    reads = []
    with on_device() as gpu:
        params = [nn.Parameter(w.to(DEVICE)) for w in weights()[:2]]
        optimizer = Shampoo(
            params, lr=0.01, hyperparams=PRESETS["default"], topology=Topology(("pipe",), (dist.get_world_size(),))
        )
        for t in range(6):
            if t == 2 and (odd() or not alone):
                params.append(nn.Parameter(weights()[2].to(DEVICE)))
                optimizer.add_param_group({"params": params[2:]})
            for param, gradient in zip(params, gradients(t), strict=False):
                param.grad = gradient.to(DEVICE)
            gpu.clear()
            optimizer.step()
            reads.append(gpu.reads.total())
        skipped, counts = optimizer.skipped_steps, [entry["step"] for entry in optimizer.state.values()]
    return skipped, [counts[0], max(counts)], reads
