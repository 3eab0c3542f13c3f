"""How many bytes a rank will keep and allocate, stated before anything is. Pure: the same on every rank."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from shampoo3d.planning.cost import bytes_of, element_bytes, owned_bytes, statistics_bytes
from shampoo3d.planning.layout import ITEM_BYTES, STATE_BYTES, Matrix, Sharding
from shampoo3d.planning.plan import Plan, PlannedBlock
from shampoo3d.planning.routes import (
    BUCKET_ELEMENTS,
    CACHED_ELEMENTS,
    Transfer,
    buckets,
    local_blocks,
    packed,
    rounds,
    transfers_of,
    travels,
    width,
)
from shampoo3d.planning.transients import Slab, accumulating, preconditioning, refreshing, roots
from shampoo3d.settings.distribution import Distribution
from shampoo3d.settings.hyperparams import ShampooHyperParams


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
                                            one or two products per element, the whiteners of "kl" and what they
                                            multiply, or the work on roots that are computed at once
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
    buckets = _slabs(shares)
    phases = (True,) if hp.start_preconditioning_step == 1 and hp.moves_at_once else (False, True)
    return Memory(
        sum(share.statistics for share in shares),
        sum(share.roots for share in shares),
        sum(bucket.elements * element_bytes(hp, bucket.dtype, factored=bucket.factored) for bucket in buckets)
        + sum(share.elements for share in shares),
        sum(share.buffers(distribution) for share in shares),
        max(_transient(shares, buckets, hp, device, started=started) for started in phases),
    )


def _transient(
    shares: Sequence["_Share"], buckets: Sequence[Slab], hp: ShampooHyperParams, device: str, *, started: bool
) -> int:
    """The most that a step has at any moment, before the start step or from then on."""
    held = [bucket.held(hp, started=started) for bucket in buckets]
    most = sum(share.beside(device) for share in shares)
    for bucket, mine, until in zip(buckets, held, accumulate(held), strict=True):
        taken = until + bucket.taking(hp, device, started=started)
        changed = sum(held) - until + mine + bucket.changing(hp, device, started=started)
        most = max(most, taken, changed)
    return max([most, *(sum(held) + share.working(device, started=started) for share in shares)])


# ---- elements --------------------------------------------------------------------------------------------------------


def _slabs(shares: Sequence["_Share"]) -> list[Slab]:
    """In the order of a step: flat slices, all of one dtype as one; whole blocks that are equal; other equal cells."""
    flat: Counter[str] = Counter()
    cells: defaultdict[Any, Counter[int]] = defaultdict(Counter)
    for number, share in enumerate(shares):
        flat.update(share.sharded)
        homes = [
            transfer
            for transfer in share.transfers
            if transfer.home == share.rank and not share.sharding(transfer).sharded
        ]
        for transfer in sorted(homes, key=share.turn):
            axes = (
                share.block(transfer).kind[1:] if transfer.slot in share.local_blocks else ()
            )  # stacks are of one kind
            shape, dtype, factored = (
                transfer.box.shape,
                share.sharding(transfer).dtype,
                bool(share.block(transfer).axes),
            )
            kind = number, *share.turn(transfer)[:2], axes, shape, dtype, factored
            cells[kind][transfer.matrix] += transfer.elements
    return [Slab(elements, elements, dtype, False, True) for dtype, elements in flat.items()] + [
        Slab(sum(counts.values()), max(counts.values()), dtype, factored, False)
        for (*_, dtype, factored), counts in cells.items()
    ]


# ---- blocks ----------------------------------------------------------------------------------------------------------


class _Share:
    """What a rank has to do with the plan of a team."""

    def __init__(self, plan: Plan, matrices: Sequence[Matrix], rank: int, hp: ShampooHyperParams) -> None:
        self.plan, self.matrices, self.rank, self.hp = plan, matrices, rank, hp
        self.transfers = transfers_of(plan, matrices, rank)
        self.local_blocks = local_blocks(plan, matrices, self.transfers, rank)
        self.travels = travels(plan, matrices)
        self.rounds = rounds(plan, BUCKET_ELEMENTS if self.travels else math.inf)

    def sharding(self, transfer: Transfer) -> Sharding:
        return self.matrices[transfer.matrix].sharding

    def block(self, transfer: Transfer) -> PlannedBlock:
        return self.plan.blocks[transfer.slot]

    @property
    def elements(self) -> int:
        """What is kept of the elements of blocks with factors by whoever keeps their roots."""
        kept = (block for block in self.plan.blocks if block.axes and self.rank in block.keepers)
        return sum(block.elements * owned_bytes(self.hp, block.dtype) for block in kept)

    @property
    def statistics(self) -> int:
        owned = self.plan.owned_by(self.rank)
        return sum(statistics_bytes(block.factors, block.dtype, block.diagonals) for block in owned)

    @property
    def roots(self) -> int:
        kept = [block for block in self.plan.blocks if self.rank in block.keepers]
        return sum(block.root_numbers * bytes_of("P", self.hp, block.dtype) for block in kept)

    @property
    def sharded(self) -> Counter[str]:
        """Elements that are stored once, by dtype."""
        found: Counter[str] = Counter()
        for sharding in (matrix.sharding for matrix in self.matrices if matrix.sharding.sharded):
            found[sharding.dtype] += sum(h.shard.elements for h in sharding.holders if h.rank == self.rank)
        return found

    def turn(self, transfer: Transfer) -> tuple[bool, bool, int]:
        """The order of elements at home: those of blocks that are worked on here come first."""
        return transfer.slot not in self.local_blocks, self.plan.blocks[transfer.slot].owner != self.rank, transfer.slot

    def working(self, device: str, *, started: bool) -> int:
        """What the blocks of a round take at most, with those of the round before that are on their way home."""
        most = before = 0
        for slots in self.rounds:
            filled = unit = 0
            for at_home, blocks in self._batches(slots):
                unit = max(unit, _together(blocks, device) * self._products(blocks[0], device, started=started))
                if blocks[0].owner == self.rank and not self.hp.computation.asynchronous:
                    unit = max(unit, refreshing(blocks, self.hp, device, started=started))
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
                before += sum(map(roots, blocks))
                work = max(refreshing(blocks, self.hp, device, started=started) for started in (False, True))
                most = max(most, before + work)
        return most

    def _batches(self, slots: Iterable[int]) -> Iterator[tuple[bool, list[PlannedBlock]]]:
        """The kept blocks of a round that are worked on together, and whether they are settled."""
        batches: defaultdict[Any, list[PlannedBlock]] = defaultdict(list)
        for slot in sorted(slots):
            block = self.plan.blocks[slot]
            if self.rank in block.keepers:
                batches[slot in self.local_blocks, block.owner == self.rank, block.kind, block.dtype].append(block)
        yield from ((at_home, blocks) for (at_home, *_), blocks in batches.items())

    def _products(self, block: PlannedBlock, device: str, *, started: bool) -> int:
        """What the products of a block take at most, beside its gradient."""
        direction = preconditioning(block, self.hp, device, started=started)
        return max(direction, accumulating(block, self.hp) if block.owner == self.rank else 0)

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
        for transfer in self.transfers:
            here = self.rank in (transfer.home, transfer.keeper) and transfer.home != transfer.keeper
            if here and transfer.slot in slots and self.travels:
                sharding = self.sharding(transfer)
                named = sharding.model_dtype if distribution.update_precision == "parameter" else sharding.state_dtype
                found["updates", transfer.home == self.rank] += transfer.elements * ITEM_BYTES[named]
                if transfer.gathered:
                    found["gradients", transfer.keeper == self.rank] += transfer.elements * ITEM_BYTES[sharding.dtype]
        for block in (self.plan.blocks[slot] for slot in slots):
            if self.rank in block.keepers and len(block.keepers) > 1:
                owned = block.owner == self.rank
                moments = block.elements * STATE_BYTES[block.dtype] if self.hp.variant.direction == "adam" else 0
                each = roots(block) + moments
                found["roots", not owned] += each * (len(block.keepers) - 1 if owned else 1)
        return found

    def _copied(self, distribution: Distribution) -> Iterator[int]:
        """Bytes of new weights for each class of replicas."""
        replica_groups: defaultdict[Any, list[Transfer]] = defaultdict(list)
        for transfer in self.transfers:
            if len(transfer.ranks) > 1 and self.rank in transfer.ranks:
                replica_groups[transfer.ranks, self.sharding(transfer).dtype].append(transfer)
        for (ranks, dtype), transfers in replica_groups.items():
            items = [(transfer.home, transfer.elements) for transfer in transfers]
            widest = max(width(bucket, items) for bucket in buckets(ranks, items, BUCKET_ELEMENTS))
            yield ITEM_BYTES[dtype] * widest * (1 + len(ranks))


def _together(blocks: Sequence[PlannedBlock], device: str) -> int:
    """How many of a batch are worked on at once."""
    most = CACHED_ELEMENTS if device == "cpu" else math.inf
    return max(map(len, packed(blocks, lambda block: block.elements, most)))
