"""Transfers of elements between ranks: gradients to owners, updates home, new weights to replicas. Pure.

Every element of a shard group has one **home**, the rank that keeps its momenta and updates its weight: the rank that
stores it, if only one does; else one of its replicas, the owner of its block if that is one of them.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

from shampoo3d.planning.layout import Fragment, Matrix
from shampoo3d.planning.plan import Plan
from shampoo3d.planning.runs import Kind

T = TypeVar("T")

BUCKET_ELEMENTS = 2**22
"""Elements that a rank receives in one collective: bounds the buffers, whatever the model's size."""

ACCELERATED = 2**3
"""Factor by which there are more on an accelerator, which few at a time would leave waiting for its host."""

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
    """Return True, on all ranks alike, if gradients may have to travel."""
    factored = [(number, matrix) for number, matrix in enumerate(matrices) if matrix.axes]
    if any(matrix.sharded and len(matrix.holders.replica_groups) > 1 for _, matrix in factored):
        return True
    # Of thousands of blocks of which replicas store parts some are not with their owners, and are soon found.
    apart = (pair for pair in factored if pair[1].sharded or not pair[1].holders.replicated)
    return any(t.home != t.keeper for number, matrix in apart for t in _of_matrix(plan, number, matrix, None))


def _transfers(plan: Plan, matrices: Sequence[Matrix], rank: int | None) -> Iterator[list[Transfer]]:
    kept: defaultdict[int, list[int]] = defaultdict(list)
    for _, slots in plan.of_rank(rank, kept=True) if rank is not None else ():
        for number, block in map(plan.place, slots):
            kept[number].append(block)
    for number, matrix in enumerate(matrices):
        transfers = _of_matrix(plan, number, matrix, rank, kept[number])
        yield sorted(transfers, key=lambda t: (t.slot, t.shard_group, t.box.start))


def _of_matrix(
    plan: Plan, number: int, matrix: Matrix, rank: int | None, kept: Iterable[int] = ()
) -> Iterator[Transfer]:
    holders, first = matrix.holders, plan.firsts[number]
    shard_groups = list(holders.shard_groups)
    keepers_of = cache(partial(plan.keepers, number))
    for fragment in matrix.fragments(rank, kept):
        keepers = keepers_of(fragment.block)
        keeper = keepers[0] if matrix.sharded else keepers[shard_groups.index(fragment.shard_group)]
        # The keeper, if it stores the fragment; else replicas take turns as keepers do, so that they are balanced.
        home = fragment.ranks[holders.places.get(keeper, 0) % len(fragment.ranks)]
        gathered = fragment.shard_group == holders.shard_group_of(keeper)
        yield Transfer(
            **vars(fragment), slot=first + fragment.block, matrix=number, home=home, keeper=keeper, gathered=gathered
        )


def local_blocks(matrices: Sequence[Matrix], transfers: Iterable[Transfer], rank: int) -> dict[int, Transfer]:
    """Return, by slot, the blocks that a rank preconditions and is the home of completely; they need not travel."""
    mine: defaultdict[int, list[Transfer]] = defaultdict(list)
    for transfer in transfers:
        matrix = matrices[transfer.matrix]
        if transfer.keeper == rank and matrix.axes and not matrix.sharded:
            mine[transfer.slot].append(transfer)
    whole = {
        slot: transfers_[0] for slot, transfers_ in mine.items() if len(transfers_) == 1 and transfers_[0].home == rank
    }
    return {slot: t for slot, t in whole.items() if t.elements == matrices[t.matrix].blocks[t.block].elements}


def bucket_elements(device_type: str) -> int:
    """Return how many elements a rank receives in one collective of a step."""
    return BUCKET_ELEMENTS * (1 if device_type == "cpu" else ACCELERATED)


Dtypes = tuple[str, str]
"""Dtypes of a parameter, and of the model's own where the parameter is a master copy."""


class Rounds:
    """The rounds of a step: one collective each way per round.

    In a round each owner has at most ``most`` elements of preconditioned blocks, or one block, of one dtype; blocks of
    one kind are together.

    Attributes:
        dtypes: of each round.
    """

    def __init__(self, plan: Plan, most: float) -> None:
        self._plan, self._most = plan, most
        self._known: dict[int, dict[int, int]] = {}
        counts: dict[Dtypes, defaultdict[int, Counter[Kind]]] = {}
        for run in (run for run in plan.runs if run.kind.axes):
            by_owner = counts.setdefault(_dtypes(run.kind), defaultdict(Counter))
            for first, last, owner in run.by_owner():
                by_owner[owner][run.kind] += last - first
        self.dtypes: list[Dtypes] = []
        self._firsts: dict[Dtypes, int] = {}
        for dtypes, by_owner in counts.items():
            self._firsts[dtypes] = len(self.dtypes)
            alike = {tuple(sorted(kinds.items(), key=lambda item: item[0].kind)) for kinds in by_owner.values()}
            self.dtypes += [dtypes] * max(self._number(kinds) for kinds in alike)

    def _number(self, kinds: Iterable[tuple[Kind, int]]) -> int:
        """Return the number of rounds for so many blocks of each kind, as :func:`packed` makes them."""
        if self._most == math.inf:
            return 1
        rounds, free, most = 0, 0, int(self._most)
        for kind, count in kinds:
            size = kind.elements
            count -= (more := min(count, free // size))
            free -= more * size
            if count:
                each = max(1, most // size)
                rounds += (needed := -(-count // each))
                free = max(0, most - size * (count - (needed - 1) * each))
        return rounds

    def of(self, owner: int) -> dict[int, int]:
        """Return the round of each slot of an owner."""
        if owner not in self._known:
            kinds: defaultdict[Dtypes, list[tuple[Any, int, int]]] = defaultdict(list)
            for run, slots in self._plan.of_rank(owner):
                if run.kind.axes:
                    alike, elements = run.kind.kind, run.kind.elements
                    kinds[_dtypes(run.kind)] += [(alike, slot, elements) for slot in slots]
            found = self._known[owner] = {}
            for dtypes, blocks in kinds.items():
                for number, together in enumerate(packed(sorted(blocks), lambda block: block[2], self._most)):
                    found |= {slot: self._firsts[dtypes] + number for _, slot, _ in together}
        return self._known[owner]


def _dtypes(kind: Kind) -> Dtypes:
    return kind.dtype, kind.model_dtype


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
