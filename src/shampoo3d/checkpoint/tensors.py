"""State as logical tensors of which each rank has rectangles, so that checkpoints do not depend on the layout.

Elements (weights, averages, momenta) belong to tensors of the shape of the merged matrix; a factor is a row of one
tensor for all blocks of its shape. ``torch.distributed.checkpoint`` writes and reads the rectangles, also across
layouts.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from shampoo3d.checkpoint.slices import first_shard_group, parts_of
from shampoo3d.checkpoint.state import factors_of
from shampoo3d.engines.reading import engine
from shampoo3d.numerics.state_names import owned_names
from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.blocks import Block, Cuts, Grid
from shampoo3d.planning.shards import Piece
from shampoo3d.runtime.bindings import Binding, GroupTensor
from shampoo3d.runtime.team import Team

WEIGHT = "weight"


class Scattered(Tensor):
    """A logical tensor of which this rank has some rectangles; nothing can be computed with it.

    Attributes:
        chunks: the rectangles that are each written or read as one, with functions that return their values.
    """

    chunks: tuple[tuple[Block, Callable[[], Tensor]], ...]

    @staticmethod
    def __new__(
        cls, size: Shape, dtype: torch.dtype, chunks: Sequence[tuple[Block, Callable[[], Tensor]]]
    ) -> "Scattered":
        tensor: Scattered = Tensor._make_wrapper_subclass(cls, size, dtype=dtype)
        tensor.chunks = tuple(chunks)
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} of a tensor that is not whole on any rank")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Scattered({tuple(self.shape)}, {[block.key for block, _ in self.chunks]})"

    # The three methods by which torch.distributed.checkpoint asks for the rectangles.

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        items = []
        for chunk in self.__create_chunk_list__():
            data = TensorWriteData(chunk, TensorProperties(self.dtype), self.shape)
            items.append(WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        return items

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(b.start), torch.Size(b.shape)) for b, _ in self.chunks]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        # In reading, index.index is the number of the chunk, and chunks kept twice may start at the same corner. In
        # writing, it is another number, but no two chunks start at the same corner.
        here = [number for number, (block, _) in enumerate(self.chunks) if block.start == tuple(index.offset or ())]
        return self.chunks[index.index if index.index in here else here[0]][1]()


@dataclass(frozen=True)
class Chunk:
    """Rectangles that form a larger one, with their values as views of the state."""

    block: Block
    members: tuple[tuple[Block, Tensor], ...]

    def read(self) -> Tensor:
        """Return the values of all members: a view if there is only one."""
        if len(self.members) == 1:
            return self.members[0][1]
        whole = self.members[0][1].new_empty(self.block.shape)
        for block, values in self.members:
            whole[block.within(self.block)] = values
        return whole

    def write(self, values: Tensor) -> None:
        """Overwrite the values of all members."""
        for block, member in self.members:
            member.copy_(values[block.within(self.block)])


def merge_chunks(parts: Iterable[tuple[Block, Tensor]]) -> list[Chunk]:
    """Merge neighbours along each axis in turn, the last axis first: thousands of blocks become few chunks."""
    chunks = [Chunk(block, ((block, values),)) for block, values in parts]
    for axis in reversed(range(len(chunks[0].block.shape))):
        rows: list[list[Chunk]] = []
        for chunk in sorted(chunks, key=lambda chunk: _across(chunk.block, axis)):
            last = rows[-1][-1].block if rows else None
            if last and _continues(last, chunk.block, axis) and _alike(rows[-1][-1], chunk):
                rows[-1].append(chunk)
            else:
                rows.append([chunk])
        chunks = [_row(row, axis) for row in rows]
    return chunks


def _across(block: Block, axis: int) -> tuple[Shape, Shape, int]:
    """Return what neighbours along an axis have in common, and then the position on that axis."""
    others = [i for i in range(len(block.shape)) if i != axis]
    return tuple(block.start[i] for i in others), tuple(block.shape[i] for i in others), block.start[axis]


def _continues(last: Block, block: Block, axis: int) -> bool:
    return _across(last, axis)[:2] == _across(block, axis)[:2] and last.stop[axis] == block.start[axis]


def _alike(one: Chunk, other: Chunk) -> bool:
    a, b = one.members[0][1], other.members[0][1]
    return (a.dtype, a.device) == (b.dtype, b.device)


def _row(chunks: Sequence[Chunk], axis: int) -> Chunk:
    first = chunks[0].block
    shape = list(first.shape)
    shape[axis] = sum(chunk.block.shape[axis] for chunk in chunks)
    return Chunk(Block(first.start, tuple(shape)), tuple(member for chunk in chunks for member in chunk.members))


@dataclass(frozen=True)
class Held:
    """A logical tensor of the state, and the rectangles of it that this rank keeps.

    Attributes:
        name: name of the matrix that it belongs to.
        what: its kind, such as "weight", "momentum" or, for all blocks of one shape, "128x128/L0".
        size: its shape.
    """

    name: str
    what: str
    size: Shape
    chunks: tuple[Chunk, ...]

    @property
    def key(self) -> str:
        """Name in a folder."""
        return f"{self.name}/{self.what}"

    @property
    def is_factor(self) -> bool:
        """True if it belongs to blocks, and not to elements."""
        return "/" in self.what

    @property
    def dtype(self) -> torch.dtype:
        return self.chunks[0].members[0][1].dtype

    def scattered(self) -> Scattered:
        """Prepare saving by torch.distributed.checkpoint; chunks are assembled one by one, as they are written."""
        return Scattered(self.size, self.dtype, [(chunk.block, chunk.read) for chunk in self.chunks])

    def staged(self) -> tuple[Scattered, list[Tensor]]:
        """Prepare reading, into buffers for the chunks in the memory of the CPU."""
        buffers = [torch.empty(chunk.block.shape, dtype=chunk.members[0][1].dtype) for chunk in self.chunks]
        targets = [(chunk.block, partial(_same, values)) for chunk, values in zip(self.chunks, buffers, strict=True)]
        return Scattered(self.size, self.dtype, targets), buffers

    def take(self, buffers: Sequence[Tensor]) -> None:
        """Copy the values that were read into the state."""
        for chunk, values in zip(self.chunks, buffers, strict=True):
            chunk.write(values)


def _same(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class Weights:
    """Weights on this rank.

    Attributes:
        flats: the weights of each group tensor, in row-major order.
        models: the model's own parameters beside these, by name, if an engine keeps master copies.
    """

    flats: Mapping[GroupTensor, Tensor]
    models: Mapping[str, Tensor]

    def stored(self, team: Team, binding: Binding) -> Iterator[tuple[Piece, Tensor]]:
        """Yield all pieces of a matrix that this rank stores, with views of their values."""
        for shard in parts_of(team, binding, everything=True):
            for piece in binding.matrix.pieces(shard):
                yield piece, binding.view(self.flats[binding.group_tensor], piece)
            if binding.matrix.name in self.models:
                for flat, there in engine().model_storage(self.models[binding.matrix.name], shard):
                    for piece in binding.matrix.pieces(there):
                        start = flat.storage_offset() + piece.offset
                        yield piece, flat.as_strided(piece.box.shape, piece.strides, start)

    def at_home(self, team: Team, binding: Binding) -> Iterator[tuple[Piece, Tensor]]:
        """Yield the pieces whose home is this rank, with views of their values; each element on one rank only."""
        for piece in _at_home(team, binding):
            yield piece, binding.view(self.flats[binding.group_tensor], piece)


def held(
    teams: Sequence[Team], called: Mapping[Binding, str], weights: Weights | None, *, everything: bool
) -> list[Held]:
    """Collect the state and the weights on this rank.

    Args:
        called: the names of the matrices to collect.
        weights: None for the state alone.
        everything: True to collect everything on this rank, for reading; else each element on one rank, for writing.
    """
    sizes: dict[tuple[str, str], Shape] = {}
    parts: dict[tuple[str, str], list[tuple[Block, Tensor]]] = {}
    for team in teams:
        for binding, kind, size, block, values in _rectangles(team, weights, everything=everything):
            if binding in called:
                key = called[binding], kind
                sizes[key] = size
                parts.setdefault(key, []).append((block, values))
    return [Held(*key, sizes[key], tuple(merge_chunks(members))) for key, members in parts.items()]


Rectangle = tuple[Binding, str, Shape, Block, Tensor]
"""Matrix, kind of tensor, its shape, a rectangle of it, the values."""


def _rectangles(team: Team, weights: Weights | None, *, everything: bool) -> Iterator[Rectangle]:
    yield from _momenta(team, everything=everything)
    for binding in team.bindings:
        if weights is None:
            break
        pieces = weights.stored(team, binding) if everything else weights.at_home(team, binding)
        for piece, values in pieces:
            yield binding, WEIGHT, binding.matrix.merged, piece.box, values
    of_elements = owned_names(team.hp)
    equals = {binding: among_equals(binding.matrix.blocks) for binding in team.bindings if binding.matrix.factored}
    for binding, block, views, guest in factors_of(team):
        for kind, values in views.items() if everything or not guest else ():
            if kind in of_elements:
                yield binding, kind, binding.matrix.merged, block, values
            else:
                yield binding, *stacked(block, kind, values, *equals[binding][block])


def stacked(block: Block, kind: str, values: Tensor, index: int, count: int) -> tuple[str, Shape, Block, Tensor]:
    """Describe a factor as a row in one tensor for all blocks of its shape: kind and shape of that, row, values.

    Args:
        index, count: see :func:`among_equals`.
    """
    row = Block((index, *(0,) * values.dim()), (1, *values.shape))
    return f"{block_name(block)}/{kind}", (count, *values.shape), row, values[None]


@lru_cache(maxsize=64)
def among_equals_of(cuts: tuple[Cuts, ...]) -> Mapping[Block, tuple[int, int]]:
    """Apply :func:`among_equals` to the blocks of a grid."""
    return among_equals(Grid(cuts))


def among_equals(blocks: Sequence[Block]) -> dict[Block, tuple[int, int]]:
    """Return for each block its index among those of its shape, and their number."""
    counts = Counter(block.shape for block in blocks)
    seen: Counter[Shape] = Counter()
    indices = {}
    for block in blocks:
        indices[block] = seen[block.shape], counts[block.shape]
        seen[block.shape] += 1
    return indices


def block_name(block: Block) -> str:
    """Return the name for all blocks of this one's shape."""
    return "x".join(map(str, block.shape))


def _momenta(team: Team, *, everything: bool) -> Iterator[Rectangle]:
    for bucket in team.stacked_buckets:
        for binding, fragment in bucket.members:
            if everything or fragment.shard_group == first_shard_group(binding):
                for kind, values in bucket.state(fragment).items():
                    yield binding, kind, binding.matrix.merged, fragment.box, values
    for binding in (binding for binding in team.bindings if binding.matrix.sharded):
        flat = team.shard_buckets[binding.group_tensor]
        for shard in parts_of(team, binding, everything=everything):
            for piece in binding.matrix.pieces(shard):
                for kind, values in flat.state(binding, piece).items():
                    yield binding, kind, binding.matrix.merged, piece.box, values


def _at_home(team: Team, binding: Binding) -> Iterator[Piece]:
    """Yield the pieces of a matrix in the first shard group whose home is this rank."""
    if binding.matrix.sharded:
        for shard in parts_of(team, binding, everything=False):
            yield from binding.matrix.pieces(shard)
        return
    here = binding.number, team.rank, first_shard_group(binding)
    for transfer in team.share.transfers:
        if (transfer.matrix, transfer.home, transfer.shard_group) == here:
            yield transfer.piece
