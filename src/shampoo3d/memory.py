"""How many bytes a rank will keep and allocate, stated before anything is. Pure: the same on every rank."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shampoo3d.blocks import SMALLEST_SPLIT, Shape
from shampoo3d.cost import bytes_of, element_bytes, statistics_bytes
from shampoo3d.distribution import Distribution
from shampoo3d.hyperparams import LayerwiseGrafting, ShampooHyperParams
from shampoo3d.layout import ITEM_BYTES, STATE_BYTES, Matrix
from shampoo3d.plan import Plan, PlannedBlock
from shampoo3d.roots.choice import choose
from shampoo3d.routes import BUCKET_ELEMENTS, Leg, Routes, buckets, packed, rounds, travels, width

CACHED_ELEMENTS = 2**18
"""On a CPU so many elements are worked on together, from statistics to direction: as many as its cache holds."""
HALF = ITEM_BYTES["bfloat16"]


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        statistics, roots, momenta: the state, kept for ever.
        buffers: through which things travel; kept from the first step on.
        transient: the most that a step allocates beside all this, and frees again.
    """

    statistics: int
    roots: int
    momenta: int
    buffers: int
    transient: int

    @property
    def state(self) -> int:
        return self.statistics + self.roots + self.momenta

    @property
    def total(self) -> int:
        return self.state + self.buffers + self.transient


def memory(
    teams: Iterable[tuple[Plan, Sequence[Matrix]]],
    rank: int,
    hp: ShampooHyperParams,
    distribution: Distribution = Distribution(),
    *,
    device: str = "cpu",
) -> Memory:
    """The bytes of the optimizer on a rank; the model's weights and gradients are not counted.

    A block of shape d_1 x d_2 x ... has, per axis, ``3/4 d^2`` numbers of statistics (``d^2`` below 256) and ``d^2`` of
    roots, on its owner, and each of its elements has its momenta at home. What a step allocates besides is the largest
    of three moments, in elements at home e_j of the slabs j, in order:

        gradients taken:   sum_{i <= j} (S + D)_i + temporaries(e_j)
        blocks worked on:  sum_i (S + D)_i + those of two rounds that are no slab's + one unit's products or new roots
        weights changed:   sum_{i >= j} (S + D)_i + temporaries(e_j)

    S is one number per element. D is kept where it is more than the gradient itself and not its norm alone is needed.
    A refresh of the n blocks of a unit, of size d along an axis, takes ``n d^2`` times :func:`_root_copies`.

    The state is exact but for the padding that an engine appends to a flat slice. Not counted: workspaces of libraries,
    norms and indices, gradients that are not contiguous, and, with ``asynchronous``, what it may share with the model.

    Args:
        teams: the plans that the rank takes part in, with the matrices of each.
        hp: its ``weight_decay`` stands for that of all groups.
        device: "cpu", where blocks are worked on in units of CACHED_ELEMENTS, or any other, where all of a round are.
    """
    shares = [_Share(plan, matrices, rank, hp) for plan, matrices in teams if rank in plan.ranks]
    slabs = _slabs(shares, hp)
    moments = (True,) if hp.start_preconditioning_step == 1 else (False, True)
    return Memory(
        sum(share.statistics for share in shares),
        sum(share.roots for share in shares),
        sum(slab.elements * element_bytes(hp, slab.dtype) for slab in slabs),
        sum(share.buffers(distribution) for share in shares),
        max(_transient(shares, slabs, hp, device, started=started) for started in moments),
    )


def _transient(
    shares: Sequence["_Share"], slabs: Sequence["_Slab"], hp: ShampooHyperParams, device: str, *, started: bool
) -> int:
    """The most that a step before or after the start step has at any moment."""
    held = [slab.held(hp, started=started) for slab in slabs]
    until = list(itertools.accumulate(held))
    taken = [before + slab.taking(hp) for before, slab in zip(until, slabs, strict=True)]
    changed = [
        sum(held) - before + mine + slab.changing(hp, device, started=started)
        for before, mine, slab in zip(until, held, slabs, strict=True)
    ]
    worked = [sum(held) + share.working(device, started=started) for share in shares]
    coming = sum(share.coming for share in shares) if hp.computation.asynchronous else 0
    return coming + max([0, *taken, *changed, *worked])


# ---- elements --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slab:
    """Elements at home here that are updated in one go; ``flat``: where they are stored."""

    elements: int
    dtype: str
    flat: bool

    @property
    def size(self) -> int:
        """Of S, and of each temporary."""
        return self.elements * STATE_BYTES[self.dtype]

    @property
    def stored(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]

    def held(self, hp: ShampooHyperParams, *, started: bool) -> int:
        """S and, where the gradient or its norm will not do, D."""
        adagrad = hp.graft_type is LayerwiseGrafting.ADAGRAD
        keeps_D = adagrad or self.stored != self.size if self.flat else not started
        return self.size * (1 + keeps_D)

    def taking(self, hp: ShampooHyperParams) -> int:
        """Of AdaGrad's root and quotient; a flat slab makes S last."""
        return 2 * self.size if hp.graft_type is LayerwiseGrafting.ADAGRAD and not self.flat else 0

    def changing(self, hp: ShampooHyperParams, device: str, *, started: bool) -> int:
        """The weights in one stack; momenta that are rounded; a D that may be the user's gradient."""
        converted = 1 + (device == "cpu")  # there, operands of other dtypes are copied first
        weights = (not self.flat and hp.weight_decay > 0) * self.size
        gradient = (self.flat and not started) * self.size
        rounded = hp.computation.momentum_storage == "bfloat16"
        advanced = rounded * (converted + (not started)) * self.size
        written = (self.flat and self.stored != self.size) * converted * self.size
        return weights + max(gradient + max(advanced, written), self.stored if weights > self.stored else 0)


def _slabs(shares: Sequence["_Share"], hp: ShampooHyperParams) -> list[_Slab]:
    """Flat slices first, all of one dtype as one; then equal cells, with those that are whole blocks in front."""
    flat: Counter[str] = Counter()
    cells: Counter[Any] = Counter()
    for number, share in enumerate(shares):
        flat.update(share.sharded)
        homes = [leg for leg in share.legs if leg.home == share.rank and not share.storage(leg).sharded]
        for leg in sorted(homes, key=lambda leg: leg.slot not in share.settled):
            cells[number, leg.slot in share.settled, leg.cell.piece.box.shape, share.storage(leg).dtype] += leg.elements
    return [_Slab(elements, dtype, True) for dtype, elements in flat.items()] + [
        _Slab(elements, dtype, False) for (*_, dtype), elements in cells.items()
    ]


# ---- blocks ----------------------------------------------------------------------------------------------------------


class _Share:
    """What a rank has of a team."""

    def __init__(self, plan: Plan, matrices: Sequence[Matrix], rank: int, hp: ShampooHyperParams) -> None:
        self.plan, self.matrices, self.rank, self.hp = plan, matrices, rank, hp
        self.legs = Routes.of(plan, matrices, rank).legs
        self.travels = travels(plan, matrices)
        self.rounds = rounds(plan, BUCKET_ELEMENTS if self.travels else math.inf)

    def storage(self, leg: Leg) -> Any:
        return self.matrices[leg.matrix].storage

    @cached_property
    def kept(self) -> list[PlannedBlock]:
        return [block for block in self.plan.blocks if self.rank in block.keepers]

    @property
    def statistics(self) -> int:
        return sum(statistics_bytes(block.factors, block.dtype) for block in self.plan.owned_by(self.rank))

    @property
    def roots(self) -> int:
        return sum(d * d * bytes_of("P", self.hp, block.dtype) for block in self.kept for d in block.factors)

    @property
    def coming(self) -> int:
        """Roots that are computed beside the main line, all of them at the first refresh."""
        return sum(d * d * STATE_BYTES[b.dtype] for b in self.plan.owned_by(self.rank) for d in b.factors)

    @property
    def sharded(self) -> Counter[str]:
        """Elements of matrices that are stored once, by dtype."""
        found: Counter[str] = Counter()
        for storage in (matrix.storage for matrix in self.matrices if matrix.storage.sharded):
            found[storage.dtype] += sum(h.part.elements for h in storage.holders if h.rank == self.rank)
        return found

    @cached_property
    def settled(self) -> set[int]:
        """The kept blocks of which all elements are at home here: their gradients are a slab's."""
        mine: defaultdict[int, list[Leg]] = defaultdict(list)
        for leg in self.legs:
            if leg.keeper == self.rank and not self.storage(leg).sharded and self.plan.blocks[leg.slot].factors:
                mine[leg.slot].append(leg)
        return {
            slot
            for slot, legs in mine.items()
            if len(legs) == 1 and legs[0].home == self.rank and legs[0].elements == self.plan.blocks[slot].elements
        }

    def working(self, device: str, *, started: bool) -> int:
        """The most that the blocks of a round take, with those of the round before, which are on their way home."""
        most = before = 0
        for slots in self.rounds:
            batches: defaultdict[Any, list[PlannedBlock]] = defaultdict(list)
            for slot in slots:
                block = self.plan.blocks[slot]
                if self.rank in block.keepers:
                    key = block.shape, block.factors, STATE_BYTES[block.dtype], block.owner == self.rank
                    batches[(*key, slot in self.settled)].append(block)
            filled = unit = 0
            for (*kind, settled), blocks in batches.items():
                cached = CACHED_ELEMENTS if device == "cpu" else math.inf
                n = max(map(len, packed(blocks, lambda block: block.elements, cached)))
                unit = max(unit, n * self._block(*kind, device, started))
                filled += (not settled) * sum(block.elements for block in blocks) * kind[2]
            most, before = max(most, before + filled + unit), filled
        return most

    def _block(self, shape: Shape, factors: Shape, size: int, owned: bool, device: str, started: bool) -> int:
        """The most that the products or the new roots of a block allocate beside its gradient."""
        hp, elements = self.hp, math.prod(shape)
        every, start = hp.preconditioning_compute_steps, hp.start_preconditioning_step
        found = [elements * size if owned and len(shape) > 2 else 0]  # unfolding along a middle axis
        if owned and (started or (every < start and start % every)):
            found.append(_refresh(factors, size, hp, device) * (not hp.computation.asynchronous or device == "cpu"))
        if started:
            computed = HALF if hp.computation.products == "bfloat16" else size
            stored = bytes_of("P0", hp, "float32" if size == 4 else "float64")
            P = sum(d * d for d in factors) * computed if stored != computed else 0
            found.append(P + elements * _product_bytes(len(shape), computed, size))
        return max(found)

    # ---- buffers -----------------------------------------------------------------------------------------------------

    def buffers(self, distribution: Distribution) -> int:
        """Two turns of what is sent and of what arrives, and one of weights."""
        largest: dict[Any, int] = {}
        for number, slots in enumerate(self.rounds):
            for key, size in self._travelling(set(slots) - self.settled, distribution):
                place = (*key, number % 2)
                largest[place] = max(largest.get(place, 0), size)
        return sum(largest.values()) + sum(self._copied(distribution))

    def _travelling(self, slots: Collection[int], distribution: Distribution) -> Iterator[tuple[Any, int]]:
        """What is sent and what arrives in a round, and its bytes."""
        found: Counter[Any] = Counter()
        for leg in (leg for leg in self.legs if leg.slot in slots and leg.home != leg.keeper and self.travels):
            storage = self.storage(leg)
            named = storage.model_dtype if distribution.update_precision == "parameter" else storage.state_dtype
            found["updates", leg.home == self.rank] += leg.elements * ITEM_BYTES[named]
            found["gradients", leg.keeper == self.rank] += leg.gathered * leg.elements * ITEM_BYTES[storage.dtype]
        for block in (self.plan.blocks[slot] for slot in slots):
            if self.rank in block.keepers:
                copies = len(block.keepers) - 1 if block.owner == self.rank else 1
                size = sum(d * d for d in block.factors) * STATE_BYTES[block.dtype]
                found["roots", block.owner == self.rank] += size * copies * (len(block.keepers) > 1)
        yield from found.items()

    def _copied(self, distribution: Distribution) -> Iterator[int]:
        """For each class of replicas, the buffers of new weights and, if they are reduced here, of gradients."""
        classes: defaultdict[Any, list[Leg]] = defaultdict(list)
        for leg in self.legs:
            if len(leg.cell.ranks) > 1 and self.rank in leg.cell.ranks:
                classes[leg.cell.ranks, ITEM_BYTES[self.storage(leg).dtype]].append(leg)
        for (ranks, size), legs in classes.items():
            items = [(leg.home, leg.elements) for leg in legs]
            yield size * (1 + len(ranks)) * max(width(bucket, items) for bucket in buckets(ranks, items, BUCKET_ELEMENTS))
            if distribution.reduce_to_owners:
                turns = [0, 0, 0, 0]
                for turn, bucket in enumerate(packed(legs, lambda leg: leg.elements, BUCKET_ELEMENTS)):
                    mine = sum(leg.elements for leg in bucket if leg.home == self.rank)
                    for place, count in enumerate((sum(leg.elements for leg in bucket) - mine, (len(ranks) - 1) * mine)):
                        at = 2 * place + turn % 2
                        turns[at] = max(turns[at], count)
                yield size * sum(turns)


def _product_bytes(axes: int, computed: int, state: int) -> int:
    """Per element: the products in turn, the last one in the gradient's place; a middle axis takes it unfolded, too."""
    if computed != state:
        return 2 * computed + state
    return computed if axes < 3 else 3 * computed


def _root_copies(hp: ShampooHyperParams, d: int, p: int, device: str, *, double: bool) -> int:
    """How many d x d matrices a refresh has at its height for each one, measured: the new root is one of them."""
    method = choose(hp.computation.root_method, p, hp.pseudo_inverse, d=d, device=device, double=double)
    copies = {"eigh": 4, "newton": 13, "newton_db": 10, "minimax": 7 + min(3, max(1, p // 2))}[method]
    return copies + (d >= SMALLEST_SPLIT) + (hp.computation.root_storage == "bfloat16")


def _refresh(factors: Shape, size: int, hp: ShampooHyperParams, device: str) -> int:
    """The new roots of the axes before, and the work on an axis."""
    p = hp.inverse_exponent_override or 2 * len(factors)
    found = before = 0
    for d in factors:
        found = max(found, before + d * d * _root_copies(hp, d, p, device, double=size == 8))
        before += d * d
    return found * size
