"""How many bytes a rank will keep and allocate, stated before anything is. Pure: the same on every rank."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from shampoo3d.blocks import SMALLEST_SPLIT
from shampoo3d.cost import bytes_of, element_bytes, statistics_bytes
from shampoo3d.distribution import Distribution
from shampoo3d.hyperparams import LayerwiseGrafting, ShampooHyperParams
from shampoo3d.layout import ITEM_BYTES, STATE_BYTES, Matrix, Storage
from shampoo3d.plan import Plan, PlannedBlock
from shampoo3d.roots.choice import Method, at_once, choose
from shampoo3d.routes import (
    BUCKET_ELEMENTS,
    CACHED_ELEMENTS,
    Leg,
    Routes,
    buckets,
    packed,
    rounds,
    settled,
    travels,
    width,
)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        statistics, roots, momenta: the state.
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
    """The bytes of the optimizer on a rank; weights and gradients are the model's.

    The owner of a block has ``3/4 d^2`` numbers of statistics (``d^2`` for d < 256) and ``d^2`` of its root for each
    axis, d long; each element has its momenta at its home. A step has the most at one of three moments:

        gradients are taken, slab by slab:  S and D of the slabs so far, and temporaries of this one
        blocks are worked on, by units:     S and D of all; gradients that travelled, of two rounds; and of the unit
                                            a product per element, or the work on roots that are computed at once
        weights are changed, slab by slab:  S and D of this slab and those to come, and temporaries of this one

    S is a number per element at home here, and so is D, where the step needs more of it than its norm and than the
    gradient that is there. New roots of n matrices, d x d, take ``n d^2`` times 4 to 14; with ``asynchronous`` this
    is after the step, and all new roots stay until the next.

    The state is exact but for the padding of an engine's flat slices. Elements that are stored once count as one slab,
    as under ZeRO; under FSDP2, where each parameter is one, temporaries are smaller. Not counted: what libraries work
    in, norms and indices, copies of gradients and weights that are not contiguous, and the comparison of values when
    parameters are bound: 16 bytes for each element of the largest.

    Args:
        teams: the plans that the rank takes part in, each with its matrices.
        hp: its ``weight_decay`` stands for that of every group.
        device: on a "cpu" a unit has CACHED_ELEMENTS, on any other all that is worked on in a round.
    """
    shares = [_Share(plan, matrices, rank, hp) for plan, matrices in teams if rank in plan.ranks]
    slabs = _slabs(shares)
    phases = (True,) if hp.start_preconditioning_step == 1 else (False, True)
    return Memory(
        sum(share.statistics for share in shares),
        sum(share.roots for share in shares),
        sum(slab.elements * element_bytes(hp, slab.dtype) for slab in slabs),
        sum(share.buffers(distribution) for share in shares),
        max(_transient(shares, slabs, hp, device, started=started) for started in phases),
    )


def _transient(
    shares: Sequence["_Share"], slabs: Sequence["_Slab"], hp: ShampooHyperParams, device: str, *, started: bool
) -> int:
    """The most that a step has at any moment, before the start step or from then on."""
    held = [slab.held(hp, started=started) for slab in slabs]
    most = sum(share.beside(device) for share in shares)
    for slab, mine, until in zip(slabs, held, accumulate(held), strict=True):
        taken = until + slab.taking(hp, started=started)
        changed = sum(held) - until + mine + slab.changing(hp, device, started=started)
        most = max(most, taken, changed)
    return max([most, *(sum(held) + share.working(device, started=started) for share in shares)])


# ---- elements --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slab:
    """Elements at home here that are updated in one go.

    Attributes:
        elements, each: of all, and of the matrix that has most of them.
        dtype: of the weights.
        flat: they are updated where they are stored, and not in a stack.
    """

    elements: int
    each: int
    dtype: str
    flat: bool

    @property
    def size(self) -> int:
        """Of S, and of each temporary."""
        return self.elements * STATE_BYTES[self.dtype]

    @property
    def mixed(self) -> bool:
        """Whether weights and state differ in dtype."""
        return ITEM_BYTES[self.dtype] != STATE_BYTES[self.dtype]

    def held(self, hp: ShampooHyperParams, *, started: bool) -> int:
        """S and D."""
        adagrad = hp.graft_type is LayerwiseGrafting.ADAGRAD
        keeps_D = (adagrad or self.mixed) if self.flat else not started
        return self.size * (1 + keeps_D)

    def taking(self, hp: ShampooHyperParams, *, started: bool) -> int:
        """AdaGrad's root and quotient, one of which may become D; a flat slab has no S yet."""
        adagrad = hp.graft_type is LayerwiseGrafting.ADAGRAD
        return self.size * (1 + started) if adagrad and not self.flat else 0

    def changing(self, hp: ShampooHyperParams, device: str, *, started: bool) -> int:
        """Weights in a stack, momenta before they are rounded, a copy of a D that may be the user's gradient."""
        copies = 2 if device == "cpu" else 1  # there, an operand of another dtype is copied first
        W = self.size if hp.weight_decay and not self.flat else 0
        D = self.size if self.flat and not started else 0
        rounded = hp.computation.momentum_storage == "bfloat16"
        momenta = self.size * (copies + (not started)) if rounded else 0
        weights = self.each * STATE_BYTES[self.dtype] * copies if self.mixed else 0
        u = self.size if rounded and not hp.nesterov else 0
        return W + D + max(momenta, u + weights)


def _slabs(shares: Sequence["_Share"]) -> list[_Slab]:
    """In the order of a step: flat slices, all of one dtype as one; whole blocks that are equal; other equal cells."""
    flat: Counter[str] = Counter()
    cells: defaultdict[Any, Counter[int]] = defaultdict(Counter)
    for number, share in enumerate(shares):
        flat.update(share.sharded)
        homes = [leg for leg in share.legs if leg.home == share.rank and not share.storage(leg).sharded]
        for leg in sorted(homes, key=share.turn):
            kind = number, *share.turn(leg)[:2], leg.cell.piece.box.shape, share.storage(leg).dtype
            cells[kind][leg.matrix] += leg.elements
    return [_Slab(elements, elements, dtype, True) for dtype, elements in flat.items()] + [
        _Slab(sum(counts.values()), max(counts.values()), dtype, False) for (*_, dtype), counts in cells.items()
    ]


# ---- blocks ----------------------------------------------------------------------------------------------------------


class _Share:
    """What a rank has to do with the plan of a team."""

    def __init__(self, plan: Plan, matrices: Sequence[Matrix], rank: int, hp: ShampooHyperParams) -> None:
        self.plan, self.matrices, self.rank, self.hp = plan, matrices, rank, hp
        self.legs = Routes.of(plan, matrices, rank).legs
        self.settled = settled(plan, matrices, self.legs, rank)
        self.travels = travels(plan, matrices)
        self.rounds = rounds(plan, BUCKET_ELEMENTS if self.travels else math.inf)

    def storage(self, leg: Leg) -> Storage:
        return self.matrices[leg.matrix].storage

    @property
    def statistics(self) -> int:
        return sum(statistics_bytes(block.factors, block.dtype) for block in self.plan.owned_by(self.rank))

    @property
    def roots(self) -> int:
        kept = [block for block in self.plan.blocks if self.rank in block.keepers]
        return sum(d * d * bytes_of("P", self.hp, block.dtype) for block in kept for d in block.factors)

    @property
    def sharded(self) -> Counter[str]:
        """Elements that are stored once, by dtype."""
        found: Counter[str] = Counter()
        for storage in (matrix.storage for matrix in self.matrices if matrix.storage.sharded):
            found[storage.dtype] += sum(h.part.elements for h in storage.holders if h.rank == self.rank)
        return found

    def turn(self, leg: Leg) -> tuple[bool, bool, int]:
        """The order of elements at home: those of blocks that are worked on here come first."""
        return leg.slot not in self.settled, self.plan.blocks[leg.slot].owner != self.rank, leg.slot

    def working(self, device: str, *, started: bool) -> int:
        """What the blocks of a round take at most, with those of the round before that are on their way home."""
        most = before = 0
        for slots in self.rounds:
            filled = unit = 0
            for at_home, blocks in self._batches(slots):
                unit = max(unit, _together(blocks, device) * self._products(blocks[0], started=started))
                if blocks[0].owner == self.rank and not self.hp.computation.asynchronous:
                    unit = max(unit, _refresh(blocks, self.hp, device, started=started))
                if not at_home:
                    filled += sum(block.elements for block in blocks) * STATE_BYTES[blocks[0].dtype]
            most, before = max(most, before + filled + unit), filled
        return most

    def beside(self, device: str) -> int:
        """Roots that are computed after a step, all at the first refresh: those so far, and the work on some."""
        if not self.hp.computation.asynchronous:
            return 0
        most = before = 0
        for _, blocks in (batch for slots in self.rounds for batch in self._batches(slots)):
            if blocks[0].owner == self.rank:
                before += sum(map(_squares, blocks))
                work = max(_refresh(blocks, self.hp, device, started=started) for started in (False, True))
                most = max(most, before + work)
        return most

    def _batches(self, slots: Iterable[int]) -> Iterator[tuple[bool, list[PlannedBlock]]]:
        """The kept blocks of a round that are worked on together, and whether they are settled."""
        batches: defaultdict[Any, list[PlannedBlock]] = defaultdict(list)
        for slot in sorted(slots):
            block = self.plan.blocks[slot]
            if self.rank in block.keepers:
                batches[slot in self.settled, block.owner == self.rank, block.shape, block.dtype].append(block)
        yield from ((at_home, blocks) for (at_home, *_), blocks in batches.items())

    def _products(self, block: PlannedBlock, *, started: bool) -> int:
        """What the products of a block take at most, beside its gradient."""
        hp, axes, state = self.hp, len(block.shape), STATE_BYTES[block.dtype]
        unfolded = block.elements * state if axes > 2 and block.owner == self.rank else 0  # along a middle axis
        products = 0
        if started:
            computed = ITEM_BYTES["bfloat16"] if hp.computation.products == "bfloat16" else state
            converted = bytes_of("P", hp, block.dtype) != computed
            P = _squares(block) // state * computed if converted else 0
            # One after the other, the last in the gradient's place; with one of a middle axis, its unfolded operand.
            each = 2 * computed + state if computed != state else computed * (1 if axes < 3 else 3)
            products = P + block.elements * each
        return max(unfolded, products)

    # ---- buffers -----------------------------------------------------------------------------------------------------

    def buffers(self, distribution: Distribution) -> int:
        """In two turns what is sent and what arrives in a round; the weights that replicas give each other."""
        largest: Counter[Any] = Counter()
        for number, slots in enumerate(self.rounds):
            for what, size in self._travelling(set(slots), distribution).items():
                largest[what, number % 2] = max(largest[what, number % 2], size)
        return sum(largest.values()) + sum(self._copied(distribution))

    def _travelling(self, slots: set[int], distribution: Distribution) -> Counter[Any]:
        """Bytes by what they are, and whether they arrive here."""
        found: Counter[Any] = Counter()
        for leg in self.legs:
            here = self.rank in (leg.home, leg.keeper) and leg.home != leg.keeper
            if here and leg.slot in slots and self.travels:
                storage = self.storage(leg)
                named = storage.model_dtype if distribution.update_precision == "parameter" else storage.state_dtype
                found["updates", leg.home == self.rank] += leg.elements * ITEM_BYTES[named]
                if leg.gathered:
                    found["gradients", leg.keeper == self.rank] += leg.elements * ITEM_BYTES[storage.dtype]
        for block in (self.plan.blocks[slot] for slot in slots):
            if self.rank in block.keepers and len(block.keepers) > 1:
                owned = block.owner == self.rank
                found["roots", not owned] += _squares(block) * (len(block.keepers) - 1 if owned else 1)
        return found

    def _copied(self, distribution: Distribution) -> Iterator[int]:
        """Bytes for each class of replicas: of new weights and, if they are reduced here, of gradients."""
        classes: defaultdict[Any, list[Leg]] = defaultdict(list)
        for leg in self.legs:
            if len(leg.cell.ranks) > 1 and self.rank in leg.cell.ranks:
                classes[leg.cell.ranks, self.storage(leg).dtype].append(leg)
        for (ranks, dtype), legs in classes.items():
            items = [(leg.home, leg.elements) for leg in legs]
            widest = max(width(bucket, items) for bucket in buckets(ranks, items, BUCKET_ELEMENTS))
            yield ITEM_BYTES[dtype] * widest * (1 + len(ranks))
            if distribution.reduce_to_owners:
                largest: Counter[Any] = Counter()
                for number, bucket in enumerate(packed(items, lambda item: item[1], BUCKET_ELEMENTS)):
                    mine = sum(elements for home, elements in bucket if home == self.rank)
                    others = sum(elements for _, elements in bucket) - mine
                    for place, count in (("out", others), ("in", mine * (len(ranks) - 1))):
                        largest[place, number % 2] = max(largest[place, number % 2], count)
                yield ITEM_BYTES[dtype] * sum(largest.values())


def _together(blocks: Sequence[PlannedBlock], device: str) -> int:
    """How many of a batch are worked on at once."""
    most = CACHED_ELEMENTS if device == "cpu" else math.inf
    return max(map(len, packed(blocks, lambda block: block.elements, most)))


def _squares(block: PlannedBlock) -> int:
    """Bytes of one square matrix per factor, in the state's dtype."""
    return sum(d * d for d in block.factors) * STATE_BYTES[block.dtype]


def _root_copies(method: Method, p: int) -> int:
    """The d x d matrices that a method has at its height for each one, the new root among them; measured, d >= 32."""
    if method == "minimax":
        half = p // 2
        return 7 + (half > 0) + (half > 1) + (half & (half - 1) > 0)  # q^half, by squaring
    if method == "newton":
        return 12 + (p > 1) + (p > 1) * (p % 2)  # T^p, in two halves
    return {"eigh": 4, "newton_db": 10}[method]


def _due(blocks: Sequence[PlannedBlock], hp: ShampooHyperParams, *, started: bool) -> Iterator[tuple[int, bool]]:
    """How many are refreshed at once before the start step or from then on, and whether they are picked out of a stack.

    The first time and "together" all are, else those of a turn.
    """
    k, start = hp.preconditioning_compute_steps, hp.start_preconditioning_step
    early = k < start and start % k != 0  # the first time is before the start step
    in_turns = hp.computation.refresh == "staggered"
    if started != early or (started and not in_turns):
        yield len(blocks), False
    turns: defaultdict[int, list[int]] = defaultdict(list)
    for row, block in enumerate(blocks):
        turn = block.offset % k
        if in_turns and (started or (early and 0 < turn < start % k)):
            turns[turn].append(row)
    for rows in turns.values():
        yield len(rows), rows[-1] - rows[0] >= len(rows)


def _refresh(blocks: Sequence[PlannedBlock], hp: ShampooHyperParams, device: str, *, started: bool) -> int:
    """What new roots of equal blocks take at most; with ``asynchronous`` without themselves, since all of them stay."""
    block = blocks[0]
    p, asynchronous = hp.exponent(len(block.factors)), hp.computation.asynchronous
    double = STATE_BYTES[block.dtype] == 8
    found = 0
    for d in block.factors:
        method = choose(hp.computation.root_method, p, hp.pseudo_inverse, d=d, device=device, double=double)
        whole, converted = d >= SMALLEST_SPLIT, bytes_of("P", hp, block.dtype) != STATE_BYTES[block.dtype]
        for count, picked in _due(blocks, hp, started=started):
            # Beside the work statistics that are made whole and previous roots that are converted, or both picked.
            copies = _root_copies(method, p) + (whole or picked) + (converted or picked)
            found = max(found, (copies - asynchronous) * d * d * min(count, at_once(d, device)))
    return found * STATE_BYTES[block.dtype]
