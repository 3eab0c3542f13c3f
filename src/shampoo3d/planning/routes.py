"""Transfers of elements between ranks: gradients to owners, updates home, new weights to replicas. Pure.

Every element of a shard group has one **home**, the rank that keeps its momenta and updates its weight: the rank that
stores it, if only one does; else one of its replicas, the owner of its block if that is one of them.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from shampoo3d.planning.layout import Fragment, Matrix
from shampoo3d.planning.plan import Plan

T = TypeVar("T")

BUCKET_ELEMENTS = 2**22
"""Elements that a rank receives in one collective: bounds the buffers, whatever the model's size."""

CACHED_ELEMENTS = 2**18
"""Elements that a CPU works on together, from statistics to direction: as many as its cache holds."""


@dataclass(frozen=True, eq=False)
class Transfer(Fragment):
    """A fragment on its way between its home and the keeper of its block's roots.

    The keeper is the block's owner or, in the fragment's shard group, another.

    Attributes:
        slot: the block's number in the plan.
        matrix: the matrix's number in the team.
        home, keeper: global ranks.
        gathered: the keeper takes the gradient from this fragment (of one shard group, where there are several).
    """

    slot: int
    matrix: int
    home: int
    keeper: int
    gathered: bool


def transfers_of(plan: Plan, matrices: Sequence[Matrix], rank: int | None = None) -> tuple[Transfer, ...]:
    """List all transfers of a team, in one order on all its ranks.

    If ``rank`` is given, only those that concern it: of what it stores and of the blocks whose roots it has.
    """
    return tuple(itertools.chain.from_iterable(_transfers(plan, matrices, rank)))


def travels(plan: Plan, matrices: Sequence[Matrix]) -> bool:
    """Return True, on all ranks alike, if gradients may have to travel; sharded matrices need no list of transfers."""
    if any(matrix.axes and matrix.sharded and len(matrix.sharding.replica_groups) > 1 for matrix in matrices):
        return True
    return any(t.home != t.keeper and plan.blocks[t.slot].axes for t in transfers_of(plan, matrices))


def _transfers(plan: Plan, matrices: Sequence[Matrix], rank: int | None) -> Iterator[list[Transfer]]:
    slot = 0
    for number, matrix in enumerate(matrices):
        planned = plan.blocks[slot : slot + len(matrix.blocks)]
        kept = {i for i, block in enumerate(planned) if rank in block.keepers}
        sharding = matrix.sharding
        shard_groups = list(sharding.shard_groups)
        position = {rank: i for ranks in sharding.replica_groups.values() for i, rank in enumerate(ranks)}
        shard_group_of = {holder.rank: holder.shard_group for holder in matrix.holders}
        transfers = []
        for fragment in matrix.fragments(rank, kept):
            block = planned[fragment.block]
            keeper = block.owner if matrix.sharded else block.keepers[shard_groups.index(fragment.shard_group)]
            # The keeper, if it stores the fragment; else replicas take turns as keepers do, so that they are balanced.
            home = fragment.ranks[position.get(keeper, 0) % len(fragment.ranks)]
            gathered = fragment.shard_group == shard_group_of[keeper]
            transfers.append(
                Transfer(
                    **vars(fragment),
                    slot=slot + fragment.block,
                    matrix=number,
                    home=home,
                    keeper=keeper,
                    gathered=gathered,
                )
            )
        slot += len(matrix.blocks)
        yield sorted(transfers, key=lambda t: (t.slot, t.shard_group, t.box.start))


def local_blocks(
    plan: Plan, matrices: Sequence[Matrix], transfers: Iterable[Transfer], rank: int
) -> dict[int, Transfer]:
    """Return, by slot, the blocks that a rank preconditions and is the home of completely; they need not travel."""
    mine: defaultdict[int, list[Transfer]] = defaultdict(list)
    for transfer in transfers:
        if (
            transfer.keeper == rank
            and plan.blocks[transfer.slot].axes
            and not matrices[transfer.matrix].sharding.sharded
        ):
            mine[transfer.slot].append(transfer)
    whole = {
        slot: transfers_[0] for slot, transfers_ in mine.items() if len(transfers_) == 1 and transfers_[0].home == rank
    }
    return {slot: transfer for slot, transfer in whole.items() if transfer.elements == plan.blocks[slot].elements}


def rounds(plan: Plan, most: float) -> list[list[int]]:
    """Divide the slots of preconditioned blocks into the rounds of a step: one collective each way per round.

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
    """Pack consecutive items into groups of at most ``most`` elements; a larger item is a group of its own."""
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
    """Yield buckets of about ``most`` elements: per rank, the numbers of its items (rank that has it, elements)."""
    quota = max(1, most // len(ranks))
    held: dict[int, list[int]] = {rank: [] for rank in ranks}
    for number, (rank, _) in enumerate(items):
        held[rank].append(number)
    queues = [packed(numbers, lambda number: items[number][1], quota) for numbers in held.values()]
    for parts in itertools.zip_longest(*queues, fillvalue=[]):
        yield dict(zip(ranks, parts, strict=True))


def width(bucket: Mapping[int, Sequence[int]], items: Sequence[tuple[int, int]]) -> int:
    """Return the elements that each rank contributes to the collective of a bucket: as many as the rank with most."""
    return max(sum(items[number][1] for number in numbers) for numbers in bucket.values())
