"""Statistics of new blocks from those of the old blocks of the same matrix.

The statistics of a new block along axis i are the sum over the old blocks b that it intersects of b's statistics, for
the rows in both, times the share of b's other axes that it has: ``L_i = sum_b share_b L_i^b``. For sums of
``G_(i) G_(i)^T`` this is exact if the new block has all of the other axes of every b, and its rows lie in one b;
entries between rows of two b are 0, and a share is the average contribution of columns. Averages ("kl", and the squares
along an axis) are weighted by b's share of the new block.
"""

import bisect
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shampoo3d.checkpoint.manifest import Parameter
from shampoo3d.checkpoint.tensors import Held, among_equals_of, merge_chunks, stacked
from shampoo3d.numerics.state_names import squares_name
from shampoo3d.numerics.symmetric import assembled
from shampoo3d.numerics.tiles import Shape, tile_shapes
from shampoo3d.planning.blocks import Block, Cuts
from shampoo3d.planning.layout import Matrix
from shampoo3d.runtime.bindings import Binding
from shampoo3d.runtime.team import Batch, Team
from shampoo3d.settings.hyperparams import ShampooHyperParams

Name = str
Tiles = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class _Old:
    """An old block, with tensors for its statistics by name."""

    block: Block
    index: int
    count: int
    tiles: Tiles


@dataclass(eq=False)
class Reblocking:
    """New blocks that this rank owns, of matrices that were saved with other blocks.

    Attributes:
        exact: by matrix, True if all its statistics on this rank are carried over exactly.
    """

    teams: Sequence[Team]
    called: Mapping[Binding, Name]
    saved: Mapping[Name, Parameter]
    recut: Collection[Name]
    exact: dict[Name, bool] = field(default_factory=dict)
    _old: dict[Name, dict[Block, _Old]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for _, _, binding, new, name in self._new():
            blocks = self._old.setdefault(name, {})
            equals = among_equals_of(self.saved[name].cuts)
            for block in _reached(self.saved[name].cuts, new):
                if block not in blocks:
                    blocks[block] = _Old(block, *equals[block], self._room(name, block, binding.matrix))

    def _new(self) -> Iterator[tuple[Batch, int, Binding, Block, Name]]:
        """Yield the new blocks, each with its batch and its row there."""
        for team in self.teams:
            for batch in (batch for batch in team.batches if not batch.guests):
                for row, slot in enumerate(batch.slots):
                    binding, block = team.binding_of(slot), team.block_of(slot)
                    if (name := self.called.get(binding, "")) in self.recut:
                        yield batch, row, binding, block, name

    def _room(self, name: Name, block: Block, matrix: Matrix) -> Tiles:
        of, dtype = self.saved[name], getattr(torch, matrix.sharding.state_dtype)
        shapes: dict[str, Shape] = {}
        for axis in of.axes:
            d = block.shape[axis]
            tiles: Mapping[str, Shape] = {"": (d,)} if axis in of.diagonal else tile_shapes(d)
            shapes |= {f"L{axis}{tile}": shape for tile, shape in tiles.items()}
        if self.teams[0].hp.borrows_decrease:
            shapes |= {squares_name(axis): (d,) for axis, d in enumerate(block.shape)}
        return {kind: torch.zeros(shape, dtype=dtype) for kind, shape in shapes.items()}

    def held(self) -> list[Held]:
        """Return the statistics of old blocks that this rank must read."""
        rows: dict[tuple[Name, str], tuple[Shape, list[tuple[Block, Tensor]]]] = {}
        for name, blocks in self._old.items():
            for old in blocks.values():
                for kind, values in old.tiles.items():
                    key, size, row, stack = stacked(old.block, kind, values, old.index, old.count)
                    rows.setdefault((name, key), (size, []))[1].append((row, stack))
        return [Held(*key, size, tuple(merge_chunks(parts))) for key, (size, parts) in rows.items()]

    def finish(self, hp: ShampooHyperParams) -> None:
        """Set the new statistics, once the old ones are read, and compute their roots."""
        rows: dict[tuple[Batch, int], list[int]] = {}
        for batch, row, _, new, name in self._new():
            old = [self._old[name][block] for block in _reached(self.saved[name].cuts, new)]
            for number, axis in enumerate(batch.stack.axes):
                statistics = batch.stack.statistics[number]
                statistics.put(row, _statistics(new, axis, old, f"L{axis}", mean=hp.variant.statistics == "kl"))
                same = hp.variant.statistics != "kl" and _is_exact(new, axis, old)
                self.exact[name] = self.exact.get(name, True) and same
            for axis, squares in enumerate(batch.stack.squares):
                squares[row] = _statistics(new, axis, old, squares_name(axis), mean=True)
            rows.setdefault((batch, self.saved[name].step), []).append(row)
        for (batch, t), numbers in rows.items():
            if hp.statistics_count(t):
                index = torch.tensor(numbers, device=batch.stack.device)
                batch.stack.refresh_roots(index, t)


def _reached(cuts: Sequence[Cuts], block: Block) -> Iterator[Block]:
    """Yield the blocks of a grid that intersect a block."""
    sides = []
    for edges, start, stop in zip(cuts, block.start, block.stop, strict=True):
        first, last = bisect.bisect_right(edges, start) - 1, bisect.bisect_left(edges, stop)
        sides.append(list(itertools.pairwise(edges[first : last + 1])))
    for corner in itertools.product(*sides):
        yield Block(tuple(a for a, _ in corner), tuple(b - a for a, b in corner))


def _statistics(block: Block, axis: int, old: Sequence[_Old], name: str, *, mean: bool) -> Tensor:
    """Compute L or squares along an axis of a new block, by the sum in the module's docstring."""
    sample = _whole(old[0], name)
    L = sample.new_zeros((block.shape[axis],) * sample.dim())
    for of in old:
        both = of.block.intersect(block)
        assert both is not None
        here, there = both.within(block)[axis], both.within(of.block)[axis]
        share = _others(both, axis) / _others(block if mean else of.block, axis)
        if L.dim() == 1:
            L[here] += share * _whole(of, name)[there]
        else:
            L[here, here] += share * _whole(of, name)[there, there]
    return L


def _is_exact(block: Block, axis: int, old: Sequence[_Old]) -> bool:
    within_one = all(
        of.block.start[axis] <= block.start[axis] and block.stop[axis] <= of.block.stop[axis] for of in old
    )
    return within_one and all(_has_all_others(block, of.block, axis) for of in old)


def _has_all_others(block: Block, old: Block, axis: int) -> bool:
    sides = zip(block.start, block.stop, old.start, old.stop, strict=True)
    return all(i == axis or (a <= c and d <= b) for i, (a, b, c, d) in enumerate(sides))


def _others(block: Block, axis: int) -> int:
    """Count the elements at one index of the axis."""
    return math.prod(block.shape) // block.shape[axis]


def _whole(of: _Old, name: str) -> Tensor:
    tiles = [values for kind, values in of.tiles.items() if kind.split("_")[0] == name]
    return assembled(tiles)
