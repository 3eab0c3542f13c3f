"""Cases on several ranks of the stand-in for an accelerator, over gloo: what each rank finds.

Importing it registers the stand-in: only processes of a test of their own may.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import draw
from shampoo3d import Distribution, Shampoo, ShampooHyperParams, StepRefusedError
from shampoo3d.distributed.topology import ParallelGroups
from shampoo3d.engines import reading
from shampoo3d.engines.engine import GroupContent, LocalShard
from shampoo3d.engines.native import Torch
from shampoo3d.numerics import background
from shampoo3d.planning.layout import Shard
from standin import DEVICE, Accelerator, AtOnce, accelerator

from .standin_settings import PRESETS, SHAPES, gradients, weights

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


class Session:
    """An optimizer of parameters in some layout on the device."""

    def __init__(self, layout: str, hp: ShampooHyperParams) -> None:
        copies = Distribution(root_copies=dist.get_world_size() if layout == "root copies" else 1)
        if layout in ("replicas", "root copies"):
            self.cut: Callable[[Sequence[Tensor]], list[Tensor]] = list
            self.params = [nn.Parameter(w.to(DEVICE)) for w in weights()]
            self.optimizer = Shampoo(self.params, lr=0.01, hyperparams=hp, distribution=copies)
        else:
            engine = Pieces(one=layout == "one slice")
            reading.ENGINES.insert(0, engine)
            self.cut, self.params = engine.cut, engine.pieces
            self.optimizer = Shampoo(engine.params, lr=0.01, hyperparams=hp, distribution=copies)
            self.optimizer.param_groups[0]["params"] = [*self.params]

    def put(self, t: int) -> "Session":
        for param, gradient in zip(self.params, self.cut(gradients(t)), strict=True):
            param.grad = gradient.to(DEVICE)
        return self

    def train(self, *steps: int) -> "Session":
        for t in steps:
            self.put(t).optimizer.step()
        return self

    def weights(self) -> list[Tensor]:
        return [param.detach().cpu().clone() for param in self.params]

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
        grad.view(-1)[-1] = float("nan")


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
