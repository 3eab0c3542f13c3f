"""Assignment of blocks to owners: plain data, computed alike on every rank without communication."""

import hashlib
import heapq
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from shampoo3d.numerics.schedule import BlockId
from shampoo3d.numerics.state_names import nothing_at_home
from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.cost import applied_cost, block_bytes, block_cost, element_bytes, statistics_bytes
from shampoo3d.planning.factors import sizes
from shampoo3d.planning.layout import Matrix
from shampoo3d.planning.stagger import factored_blocks, refresh_offsets
from shampoo3d.settings.hyperparams import ShampooHyperParams
from shampoo3d.settings.validation import check_integer, check_kind

Counterparts = Callable[[int], tuple[int, ...]]


@dataclass(frozen=True)
class PlannedBlock:
    """One block and its owner.

    Attributes:
        matrix, key: the parameter's name and the block's position in it, such as ``"0:128,0:64"``.
        dtype: of the parameter.
        shape, elements: of the block.
        axes: those that have a Kronecker factor; empty for a block that is grafted only.
        bytes: of its state: statistics, roots and, where its holders are replicas, momenta.
        cost: estimated work of a step, in multiply-adds of a matrix product.
        owner: the global rank that keeps its statistics and computes its roots.
        keepers: the ranks that have its roots and precondition with them, the owner included; see ``root_copies``.
        model_dtype: of the model's own parameter, where ``dtype`` is the one of a master copy.
        offset: its turn to refresh its roots, see :func:`shampoo3d.numerics.schedule.phase`.
        kept_cost: the work of a keeper that is not the owner: it only applies the roots.
        diagonal: of the axes, those whose factor is diagonal.
    """

    matrix: str
    key: str
    dtype: str
    shape: Shape
    elements: int
    axes: tuple[int, ...]
    bytes: int
    cost: float
    owner: int
    keepers: tuple[int, ...] = ()
    model_dtype: str = ""
    offset: int = 0
    kept_cost: float = 0.0
    diagonal: tuple[int, ...] = ()

    @property
    def id(self) -> BlockId:
        return self.matrix, self.key

    @property
    def factors(self) -> Shape:
        """Sizes of its Kronecker factors that are not diagonal."""
        return sizes(self.shape, self.axes, self.diagonal)[0]

    @property
    def diagonals(self) -> Shape:
        """Sizes of its diagonal factors."""
        return sizes(self.shape, self.axes, self.diagonal)[1]

    @property
    def root_numbers(self) -> int:
        """Number of elements of its roots."""
        return sum(d * d for d in self.factors) + sum(self.diagonals)

    @property
    def kind(self) -> tuple[Shape, tuple[int, ...], tuple[int, ...]]:
        """Shape and axes: blocks that have these in common can be in one stack."""
        return self.shape, self.axes, self.diagonal

    @property
    def kept_bytes(self) -> int:
        """Bytes of state on a keeper that is not the owner: no statistics."""
        return self.bytes - statistics_bytes(self.factors, self.dtype, self.diagonals)


@dataclass(frozen=True)
class Plan:
    """Blocks that one team of ranks shares, and their owners among these ranks.

    Attributes:
        resident: per rank, bytes of momenta that stay where their elements are stored (ZeRO, FSDP), whoever owns the
            blocks.
        every: steps between two refreshes of a root: roots in use are at most ``every - 1`` steps old.
    """

    ranks: tuple[int, ...]
    blocks: tuple[PlannedBlock, ...]
    resident: tuple[int, ...] = ()
    every: int = 1

    def owned_by(self, rank: int) -> tuple[PlannedBlock, ...]:
        return tuple(block for block in self.blocks if block.owner == rank)

    def load(self) -> dict[int, float]:
        """Return the estimated cost per rank."""
        load = dict.fromkeys(self.ranks, 0.0)
        for block in self.blocks:
            for rank in block.keepers:
                load[rank] += block.cost if rank == block.owner else block.kept_cost
        return load

    def bytes(self) -> dict[int, int]:
        """Return the bytes of state per rank: of blocks that it owns or has the roots of, and resident momenta."""
        totals = dict(zip(self.ranks, self.resident or [0] * len(self.ranks), strict=True))
        for block in self.blocks:
            for rank in block.keepers:
                totals[rank] += block.bytes if rank == block.owner else block.kept_bytes
        return totals

    def to_json(self) -> str:
        return json.dumps(self, default=lambda of: {field.name: getattr(of, field.name) for field in fields(of)})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read what :meth:`to_json` has written.

        Raises:
            TypeError, ValueError: saying why ``text`` is not a plan.
        """
        check_kind("text", text, (str, bytes), "what to_json() has written")
        lists = ("shape", "axes", "keepers", "diagonal")
        try:
            data = json.loads(text)
            blocks = (PlannedBlock(**block | {name: tuple(block[name]) for name in lists}) for block in data["blocks"])
            plan = cls(tuple(data["ranks"]), tuple(blocks), tuple(data["resident"]), data["every"])
            check_integer("every", plan.every, least=1)
            for rank in plan.ranks:
                check_integer("a rank", rank, least=0)
            for block in plan.blocks:
                if foreign := {block.owner, *block.keepers} - {*plan.ranks}:
                    where = f"rank {next(iter(foreign))}, which is not one of {plan.ranks}"
                    raise ValueError(f"block {block.key} of {block.matrix!r} is assigned to {where}")
        except KeyError as error:
            raise ValueError(f"text is not a plan: it has no {error}; got {text[:60]!r}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"text is not a plan: {error}; got {text[:60]!r}") from None
        return plan

    def digest(self) -> str:
        """Return a short fingerprint: equal on two ranks exactly if their plans are."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def make_plan(
    matrices: Sequence[Matrix],
    ranks: Sequence[int],
    hp: ShampooHyperParams,
    fixed: Mapping[BlockId, int] | None = None,
    load: Mapping[int, tuple[float, int]] | None = None,
    memory_bound: int | None = None,
    offsets: Mapping[BlockId, int] | None = None,
) -> Plan:
    """Give each block to one of ``ranks`` so that the estimated costs are balanced.

    Greedy, the most expensive block first to the least loaded rank (Graham 1969: at most 4/3 of the optimum), ties to
    the one with less state. Blocks of equal cost are given in the order of their turns to refresh, so that each rank
    has about as many at one turn as at another. Then blocks of equal cost and size are exchanged, so that each is owned
    by the rank that already stores most of it, as far as possible: this saves traffic and changes no balance.

    Args:
        matrices: those that these ranks store, in the same order on each of them.
        ranks: the global ranks that store them.
        hp: the costs depend on block sizes and refresh intervals.
        fixed: the owners of blocks that already have one, which they keep.
        load: the cost and the bytes of state that each rank has besides this plan.
        memory_bound: bytes of state that no rank may exceed.
        offsets: of all blocks with factors, by :func:`refresh_offsets`; by default of those in ``matrices`` alone.

    Raises:
        ValueError: naming the block, the bytes and the bound, if no rank has room for it.
    """
    if offsets is None:
        offsets = refresh_offsets(factored_blocks(matrices), hp)
    drafts = [_draft(m, number, hp, fixed or {}, offsets) for m in matrices for number in range(len(m.blocks))]
    storing = _storing(matrices, drafts)
    counterparts = {matrix.name: matrix.sharding.counterparts for matrix in matrices}
    momenta_bytes = _resident(matrices, hp)
    resident = tuple(momenta_bytes[rank] for rank in ranks)
    loads = _Loads(ranks, load or {}, resident, memory_bound)
    owners = _balanced(drafts, storing, counterparts, loads)
    owners |= _nearest([b for b in drafts if b.axes and b.owner < 0], counterparts, ranks, owners, storing)
    blocks = []
    for draft in drafts:
        owner = owners.get(draft.id, draft.owner)
        blocks.append(replace(draft, owner=owner, keepers=counterparts[draft.matrix](owner)))
    return Plan(tuple(ranks), tuple(blocks), resident, hp.preconditioning_compute_steps)


def _balanced(
    drafts: Sequence[PlannedBlock],
    storing: Mapping[BlockId, Counter[int]],
    counterparts: Mapping[str, Counterparts],
    loads: "_Loads",
) -> dict[BlockId, int]:
    """Choose an owner for each block without one: the least loaded rank; without factors, of those that store it."""
    owners: dict[BlockId, int] = {}
    for block in sorted(drafts, key=lambda b: (b.owner < 0, -b.cost, -b.elements, b.offset)):
        owner, others = block.owner, counterparts[block.matrix]
        if owner < 0:
            owner = owners[block.id] = loads.least(block, others, None if block.axes else storing[block.id])
        if owner < 0:
            raise ValueError(
                f"memory_bound={loads.bound} leaves no rank for block {block.key} of {block.matrix!r}: it has "
                f"{block.bytes} bytes of state, and all blocks together {sum(b.bytes for b in drafts)} on "
                f"{len(loads.resident)} ranks, which keep {min(loads.resident)} to {max(loads.resident)} bytes of "
                "momenta besides; take a smaller block_size or more ranks"
            )
        loads.give(block, owner, others)
    return owners


class _Loads:
    """Cost and bytes of state of each rank so far; ties go to the rank with less state, then to the first in order."""

    def __init__(
        self,
        ranks: Sequence[int],
        load: Mapping[int, tuple[float, int]],
        resident: Sequence[int],
        bound: int | None,
    ) -> None:
        self.resident, self.bound = resident, bound
        self._totals: dict[int, tuple[float, int, int]] = {}
        for position, (rank, momenta_bytes) in enumerate(zip(ranks, resident, strict=True)):
            cost, size = load.get(rank, (0.0, 0))
            self._totals[rank] = cost, size + momenta_bytes, position
            if bound is not None and size + momenta_bytes > bound:
                raise ValueError(
                    f"memory_bound={bound} is less than the {size + momenta_bytes} bytes of state that rank {rank} "
                    "keeps without any block; take more ranks"
                )
        self._heap = [(*total, rank) for rank, total in self._totals.items()]
        heapq.heapify(self._heap)

    def give(self, block: PlannedBlock, owner: int, others: Counterparts) -> None:
        """Add the block to its owner, and copies of its roots to its counterparts."""
        for rank in others(owner):
            cost, size, position = self._totals[rank]
            mine = rank == owner
            self._totals[rank] = (
                cost + (block.cost if mine else block.kept_cost),
                size + (block.bytes if mine else block.kept_bytes),
                position,
            )
            heapq.heappush(self._heap, (*self._totals[rank], rank))
            if self.bound is not None and self._totals[rank][1] > self.bound:  # the owner was fixed before
                raise ValueError(
                    f"memory_bound={self.bound} is less than the {self._totals[rank][1]} bytes of state that rank "
                    f"{rank} keeps with block {block.key} of {block.matrix!r}, which it owns already; make a new "
                    "optimizer"
                )

    def least(self, block: PlannedBlock, others: Counterparts, among: Iterable[int] | None) -> int:
        """Return the least loaded rank with room for the block (its counterparts: for copies of its roots), or -1."""

        def fits(owner: int) -> bool:
            return self.bound is None or all(
                self._totals[rank][1] + (block.bytes if rank == owner else block.kept_bytes) <= self.bound
                for rank in others(owner)
            )

        if among is not None:
            return min(filter(fits, among), key=lambda rank: self._totals[rank], default=-1)
        seen, chosen = [], -1
        while self._heap and chosen < 0:
            *total, rank = entry = heapq.heappop(self._heap)
            if tuple(total) == self._totals[rank]:  # else an outdated entry
                seen.append(entry)
                chosen = rank if fits(rank) else -1
        for entry in seen:
            heapq.heappush(self._heap, entry)
        return chosen


def _resident(matrices: Sequence[Matrix], hp: ShampooHyperParams) -> Counter[int]:
    """Count the bytes of momenta of the elements of sharded matrices that each rank stores."""
    totals: Counter[int] = Counter()
    for matrix in (matrix for matrix in matrices if matrix.sharding.sharded):
        # A flat slice has room for matrices of both kinds, unless those with factors have no state there.
        bare = matrix.factored and nothing_at_home(hp)
        size = 0 if bare else element_bytes(hp, matrix.dtype, factored=False)
        for holder in matrix.holders:
            totals[holder.rank] += holder.shard.elements * size
    return totals


def _draft(
    matrix: Matrix,
    number: int,
    hp: ShampooHyperParams,
    fixed: Mapping[BlockId, int],
    offsets: Mapping[BlockId, int],
) -> PlannedBlock:
    """Describe a block, with owner -1 unless it is fixed."""
    block, dtype = matrix.blocks[number], matrix.sharding.dtype
    id_, (factors, diagonals) = (matrix.name, block.key), sizes(block.shape, matrix.axes, matrix.diagonal)
    size = block_bytes(block.shape, factors, hp, dtype, diagonals, momenta=not matrix.sharding.sharded)
    cost = block_cost(block.elements, factors, hp, diagonals)
    return PlannedBlock(
        matrix.name,
        block.key,
        dtype,
        block.shape,
        block.elements,
        matrix.axes,
        size,
        cost,
        fixed.get(id_, -1),
        model_dtype=matrix.sharding.model_dtype,
        offset=offsets[id_] if matrix.axes else 0,
        kept_cost=applied_cost(block.elements, factors, hp),
        diagonal=matrix.diagonal,
    )


def _storing(matrices: Sequence[Matrix], drafts: Sequence[PlannedBlock]) -> dict[BlockId, Counter[int]]:
    """Count the elements of each block that each rank stores."""
    counts: dict[BlockId, Counter[int]] = {draft.id: Counter() for draft in drafts}
    for matrix in matrices:
        for fragment in matrix.fragments():
            counter = counts[matrix.name, matrix.blocks[fragment.block].key]
            for rank in fragment.ranks:
                counter[rank] += fragment.elements
    return counts


def _nearest(
    blocks: Sequence[PlannedBlock],
    counterparts: Mapping[str, Counterparts],
    ranks: Sequence[int],
    owners: Mapping[BlockId, int],
    storing: Mapping[BlockId, Counter[int]],
) -> dict[BlockId, int]:
    """Exchange the owners of blocks of equal cost so that most elements are owned where they are stored already."""
    alike: defaultdict[Any, list[BlockId]] = defaultdict(list)
    for block in blocks:
        if len(storing[block.id]) < len(ranks) or len(set(storing[block.id].values())) > 1:
            others_of = counterparts[block.matrix]
            others = tuple(map(others_of, ranks)) if len(others_of(ranks[0])) > 1 else ()
            alike[block.cost, block.bytes, block.elements, others].append(block.id)
    nearest: dict[BlockId, int] = {}
    for ids in alike.values():
        free = Counter(owners[id_] for id_ in ids)
        wishes = ((-count, index, rank) for index, id_ in enumerate(ids) for rank, count in storing[id_].items())
        for _, index, rank in sorted(wishes):
            if free[rank] and ids[index] not in nearest:
                nearest[ids[index]] = rank
                free[rank] -= 1
        rest = (id_ for id_ in ids if id_ not in nearest)
        nearest |= zip(rest, free.elements(), strict=True)
    return nearest


def make_plans(
    held: Mapping[tuple[int, ...], Sequence[Matrix]],
    hp: ShampooHyperParams,
    fixed: Mapping[BlockId, int] | None = None,
    memory_bound: int | None = None,
    offsets: Mapping[BlockId, int] | None = None,
) -> list[Plan]:
    """Make a plan for each set of ranks that store the same matrices, the larger sets first.

    A set is balanced on top of the plans of the sets that contain it, which all its ranks know. (Ranks that share a
    tied weight with another stage are such a set; all sets are in one order everywhere, so no two wait for each other.)
    By default the ``offsets`` are those of all blocks in ``held``.
    """
    plans: list[Plan] = []
    if offsets is None:
        offsets = refresh_offsets(factored_blocks(itertools.chain.from_iterable(held.values())), hp)
    for ranks in in_order(held):
        known = [(plan.load(), plan.bytes()) for plan in plans if set(ranks) <= set(plan.ranks)]
        load = {rank: (sum(cost[rank] for cost, _ in known), sum(size[rank] for _, size in known)) for rank in ranks}
        plans.append(make_plan(held[ranks], ranks, hp, fixed, load, memory_bound, offsets))
    return plans


def in_order(teams: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Sort sets of ranks into the order in which all their members meet: the larger first."""
    return sorted(teams, key=lambda ranks: (-len(ranks), ranks))
