"""Who owns which block: plain data, computed alike on every rank without communication."""

import hashlib
import heapq
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from shampoo3d.blocks import Shape
from shampoo3d.hyperparams import ShampooHyperParams
from shampoo3d.layout import Matrix

BlockId = tuple[str, str]
"""A block by the name of its matrix and its key there."""


@dataclass(frozen=True)
class PlannedBlock:
    """One block and its owner.

    Attributes:
        matrix, key: the parameter's name and the block's place in it, such as ``"0:128,0:64"``.
        dtype: of the parameter.
        shape, elements: of the block.
        factors: the sizes of its Kronecker factors; empty for a block that is grafted only.
        cost: estimated work of a step, in multiply-adds of a matrix product.
        owner: the global rank that keeps its statistics, roots and momentum.
    """

    matrix: str
    key: str
    dtype: str
    shape: Shape
    elements: int
    factors: tuple[int, ...]
    cost: float
    owner: int

    @property
    def id(self) -> BlockId:
        return self.matrix, self.key


@dataclass(frozen=True)
class Plan:
    """The blocks that one set of replicas shares, and their owners among its ranks."""

    ranks: tuple[int, ...]
    blocks: tuple[PlannedBlock, ...]

    def owned_by(self, rank: int) -> tuple[PlannedBlock, ...]:
        return tuple(block for block in self.blocks if block.owner == rank)

    def load(self) -> dict[int, float]:
        """Estimated cost per rank."""
        return {rank: sum(block.cost for block in self.owned_by(rank)) for rank in self.ranks}

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        data = json.loads(text)
        lists = ("shape", "factors")
        blocks = (PlannedBlock(**block | {name: tuple(block[name]) for name in lists}) for block in data["blocks"])
        return cls(tuple(data["ranks"]), tuple(blocks))

    def digest(self) -> str:
        """A short fingerprint: equal on two ranks exactly if their plans are."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


# Measured by benchmarks/cost_model.py (CPU, float32), in multiply-adds of a large matrix product: a root by
# eigen-decomposition takes 6.5 d^3 + 2000 d^2, memory traffic and calls the rest.
_ROOT_CUBIC, _ROOT_SQUARE = 6.5, 2000.0
_PER_ELEMENT, _PER_BLOCK = 250.0, 1.5e6


def block_cost(shape: Shape, rank: int, hp: ShampooHyperParams) -> float:
    """Estimated work of a step on a block with ``rank`` preconditioned axes, in multiply-adds, refreshes spread out."""
    elements = math.prod(shape)
    cost = _PER_BLOCK + _PER_ELEMENT * elements
    for d in shape[:rank]:
        products = elements * d * (1 + 1 / hp.statistics_compute_steps)
        root = _ROOT_CUBIC * d**3 + _ROOT_SQUARE * d**2
        cost += products + root / hp.preconditioning_compute_steps
    return cost


def make_plan(
    matrices: Sequence[Matrix],
    ranks: Sequence[int],
    hp: ShampooHyperParams,
    fixed: Mapping[BlockId, int] | None = None,
    load: Mapping[int, float] | None = None,
) -> Plan:
    """Give each block to one of ``ranks`` so that the estimated costs are balanced.

    Greedy, the most expensive block first to the least loaded rank (Graham 1969: at most 4/3 of the optimum). Ties go
    to the rank with fewer elements, then to the one that comes first.

    Args:
        matrices: what these ranks hold, in the same order on each of them.
        ranks: the global ranks that hold them.
        hp: the costs depend on block sizes and refresh intervals.
        fixed: blocks that already have an owner keep it.
        load: what ranks have to do beside this plan.
    """
    fixed, load = fixed or {}, load or {}
    drafts = [
        PlannedBlock(m.name, b.key, m.storage.dtype, b.shape, b.elements, b.shape[: m.rank], cost, fixed.get(id_, -1))
        for m in matrices
        for b in m.blocks
        for id_, cost in [((m.name, b.key), block_cost(b.shape, m.rank, hp))]
    ]
    taken: dict[int, tuple[float, int]] = {rank: (load.get(rank, 0.0), 0) for rank in ranks}
    for block in drafts:
        if block.owner >= 0:
            cost, elements = taken[block.owner]
            taken[block.owner] = cost + block.cost, elements + block.elements
    heap = [(cost, elements, place, rank) for place, (rank, (cost, elements)) in enumerate(taken.items())]
    heapq.heapify(heap)
    owners: dict[BlockId, int] = {}
    for block in sorted((b for b in drafts if b.owner < 0), key=lambda b: (-b.cost, -b.elements)):
        cost, elements, place, rank = heap[0]
        owners[block.id] = rank
        heapq.heapreplace(heap, (cost + block.cost, elements + block.elements, place, rank))
    blocks = (PlannedBlock(**vars(b) | {"owner": owners.get(b.id, b.owner)}) for b in drafts)
    return Plan(tuple(ranks), tuple(blocks))


def make_plans(
    held: Mapping[tuple[int, ...], Sequence[Matrix]], hp: ShampooHyperParams, fixed: Mapping[BlockId, int] | None = None
) -> list[Plan]:
    """A plan for each set of ranks that hold the same matrices, the larger sets first.

    A set is balanced on top of the plans of the sets that contain it, which all its ranks know. (Ranks that share a
    tied weight with another stage are such a set; all sets are in one order everywhere, so no two wait for each other.)
    """
    plans: list[Plan] = []
    for ranks in sorted(held, key=lambda ranks: (-len(ranks), ranks)):
        known = [plan.load() for plan in plans if set(ranks) <= set(plan.ranks)]
        load = {rank: sum(plan[rank] for plan in known) for rank in ranks}
        plans.append(make_plan(held[ranks], ranks, hp, fixed, load))
    return plans
