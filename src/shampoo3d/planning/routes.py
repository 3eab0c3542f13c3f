"""Which elements travel between which ranks: gradients to owners, updates home, new weights to replicas. Pure.

Every element of a cover has one **home**, the rank that keeps its momenta and changes its weight: where it is stored,
if it is stored once; else one of its replicas, the owner of its block if that is one of them.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from shampoo3d.planning.layout import ITEM_BYTES, STATE_BYTES, Cell, Matrix
from shampoo3d.planning.plan import Plan
from shampoo3d.settings.distribution import Distribution
from shampoo3d.settings.hyperparams import ShampooHyperParams

T = TypeVar("T")

BUCKET_ELEMENTS = 2**22
"""Elements that a rank receives in one collective: bounds the buffers, whatever the model's size."""

CACHED_ELEMENTS = 2**18
"""On a CPU so many elements are worked on together, from statistics to direction: as many as its cache holds."""


@dataclass(frozen=True, eq=False)
class Leg:
    """The way of a cell between its home and the keeper of its block's roots: the owner or, in its cover, another.

    Attributes:
        slot: the block's number in the plan.
        matrix: the matrix's number in the team.
        cell: the elements.
        home, keeper: global ranks.
        gathered: the keeper takes the gradient from this cell (of one cover, where there are several).
    """

    slot: int
    matrix: int
    cell: Cell
    home: int
    keeper: int
    gathered: bool

    @property
    def elements(self) -> int:
        return self.cell.piece.box.elements


@dataclass(frozen=True)
class Routes:
    """All legs of a team, in one order on all its ranks."""

    plan: Plan
    legs: tuple[Leg, ...]

    @classmethod
    def of(cls, plan: Plan, matrices: Sequence[Matrix], rank: int | None = None) -> "Routes":
        """All legs, or those that a rank has to do with: what it stores, and all of the blocks whose roots it keeps."""
        return cls(plan, tuple(itertools.chain.from_iterable(_legs(plan, matrices, rank))))

    @property
    def travels(self) -> bool:
        """Whether any preconditioned block's owner is not the home of all its elements."""
        return any(leg.home != leg.keeper and self.plan.blocks[leg.slot].axes for leg in self.legs)


def travels(plan: Plan, matrices: Sequence[Matrix]) -> bool:
    """Whether gradients may have to travel; known to all ranks without looking at every leg of a sharded matrix."""
    if any(matrix.axes and matrix.storage.sharded and len(matrix.storage.classes) > 1 for matrix in matrices):
        return True
    return Routes.of(plan, matrices).travels


def _legs(plan: Plan, matrices: Sequence[Matrix], rank: int | None) -> Iterator[list[Leg]]:
    slot = 0
    for number, matrix in enumerate(matrices):
        planned = plan.blocks[slot : slot + len(matrix.blocks)]
        kept = {i for i, block in enumerate(planned) if rank in block.keepers}
        covers = list(matrix.storage.covers)
        position = {rank: i for ranks in matrix.storage.classes.values() for i, rank in enumerate(ranks)}
        cover_of = {holder.rank: holder.cover for holder in matrix.storage.holders}
        legs = []
        for cell in matrix.cells(rank, kept):
            block = planned[cell.block]
            keeper = block.owner if matrix.storage.sharded else block.keepers[covers.index(cell.cover)]
            # The keeper, where it stores the cell; else replicas take turns as keepers do, so that they are balanced.
            home = cell.ranks[position.get(keeper, 0) % len(cell.ranks)]
            legs.append(Leg(slot + cell.block, number, cell, home, keeper, cell.cover == cover_of[keeper]))
        slot += len(matrix.blocks)
        yield sorted(legs, key=lambda leg: leg.slot)


def settled(plan: Plan, matrices: Sequence[Matrix], legs: Iterable[Leg], rank: int) -> dict[int, Leg]:
    """The blocks kept by a rank of which all elements are at home there, so that nothing of them travels, by slot."""
    mine: defaultdict[int, list[Leg]] = defaultdict(list)
    for leg in legs:
        if leg.keeper == rank and plan.blocks[leg.slot].axes and not matrices[leg.matrix].storage.sharded:
            mine[leg.slot].append(leg)
    whole = {slot: legs_[0] for slot, legs_ in mine.items() if len(legs_) == 1 and legs_[0].home == rank}
    return {slot: leg for slot, leg in whole.items() if leg.elements == plan.blocks[slot].elements}


def rounds(plan: Plan, most: float) -> list[list[int]]:
    """The slots of preconditioned blocks in the rounds in which they are worked on: one collective each way per round.

    In a round each owner has at most ``most`` elements, or one block, of one dtype; blocks of one kind are together.
    """
    by_dtype: defaultdict[tuple[str, str], defaultdict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for slot, block in enumerate(plan.blocks):
        if block.axes:
            by_dtype[block.dtype, block.model_dtype][block.owner].append(slot)
    found: list[list[int]] = []
    for owned in by_dtype.values():
        in_order = (sorted(slots, key=lambda slot: plan.blocks[slot].kind) for slots in owned.values())
        queues = [packed(slots, lambda slot: plan.blocks[slot].elements, most) for slots in in_order]
        found += ([slot for part in parts for slot in part] for parts in itertools.zip_longest(*queues, fillvalue=()))
    return found


def packed(items: Iterable[T], elements: Callable[[T], int], most: float) -> list[list[T]]:
    """Consecutive items in groups of at most ``most`` elements; an item that has more is a group of its own."""
    groups: list[list[T]] = []
    filled = 0
    for item in items:
        size = elements(item)
        if not groups or filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size
    return groups


def buckets(ranks: Sequence[int], items: Sequence[tuple[int, int]], most: int) -> Iterator[dict[int, list[int]]]:
    """The numbers of the items, (rank that has it, elements) each, per rank, with about ``most`` elements at a time."""
    quota = max(1, most // len(ranks))
    held: dict[int, list[int]] = {rank: [] for rank in ranks}
    for number, (rank, _) in enumerate(items):
        held[rank].append(number)
    queues = [packed(numbers, lambda number: items[number][1], quota) for numbers in held.values()]
    for parts in itertools.zip_longest(*queues, fillvalue=[]):
        yield dict(zip(ranks, parts, strict=True))


def width(bucket: Mapping[int, Sequence[int]], items: Sequence[tuple[int, int]]) -> int:
    """What each rank contributes to the collective of a bucket: as much as the one that has most."""
    return max(sum(items[number][1] for number in numbers) for numbers in bucket.values())


def traffic(
    plan: Plan, matrices: Sequence[Matrix], rank: int, hp: ShampooHyperParams, distribution: Distribution
) -> dict[str, int]:
    """Bytes that a rank receives from others in a step in which all parameters have gradients, by what they are.

    "gradients" on their way to the keepers of roots, "updates" on their way home, "weights" for replicas, and "roots",
    these only in steps that refresh.
    """
    found: Counter[str] = Counter({"gradients": 0, "updates": 0, "weights": 0, "roots": 0})
    copies: defaultdict[tuple[tuple[int, ...], str], list[tuple[int, int]]] = defaultdict(list)
    for leg in Routes.of(plan, matrices, rank).legs:
        storage = matrices[leg.matrix].storage
        if leg.home != leg.keeper and plan.blocks[leg.slot].axes:
            named = storage.model_dtype if distribution.update_precision == "parameter" else storage.state_dtype
            if leg.gathered and leg.keeper == rank:
                found["gradients"] += leg.elements * ITEM_BYTES[storage.dtype]
            if leg.home == rank:
                found["updates"] += leg.elements * ITEM_BYTES[named]
        if len(leg.cell.ranks) > 1 and rank in leg.cell.ranks:
            copies[leg.cell.ranks, storage.dtype].append((leg.home, leg.elements))
    for (ranks, dtype), items in copies.items():
        padded = sum(width(bucket, items) for bucket in buckets(ranks, items, BUCKET_ELEMENTS))
        found["weights"] += padded * (len(ranks) - 1) * ITEM_BYTES[dtype]
    for block in plan.blocks:
        if rank in block.keepers and rank != block.owner:
            V = block.elements if block.axes and hp.variant.direction == "adam" else 0
            found["roots"] += (block.root_numbers + V) * STATE_BYTES[block.dtype]
    return dict(found)
