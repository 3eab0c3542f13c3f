"""Share of one rank in the plan of a team: computed once, for the step and for the forecasts. Pure."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from shampoo3d.numerics.state_names import copied_names
from shampoo3d.planning.cost import bytes_of
from shampoo3d.planning.layout import ITEM_BYTES, Matrix, Sharding
from shampoo3d.planning.plan import Plan
from shampoo3d.planning.routes import (
    Rounds,
    Transfer,
    bucket_elements,
    buckets,
    local_blocks,
    transfers_of,
    travels,
    width,
)
from shampoo3d.planning.shards import Ranks
from shampoo3d.settings.distribution import Distribution
from shampoo3d.settings.hyperparams import ShampooHyperParams


@dataclass(frozen=True, eq=False)
class RankShare:
    """The share of one rank in the plan of a team.

    Attributes:
        matrices: those of the team, in the order of the plan.
        device_type: that of the device with the parameters.
    """

    plan: Plan
    matrices: Sequence[Matrix]
    rank: int
    device_type: str = "cpu"

    @cached_property
    def transfers(self) -> tuple[Transfer, ...]:
        """All fragments that the rank stores, and those of the blocks whose roots it keeps."""
        return transfers_of(self.plan, self.matrices, self.rank)

    @cached_property
    def travels(self) -> bool:
        """True if gradients may have to travel to owners."""
        return travels(self.plan, self.matrices)

    @cached_property
    def local_blocks(self) -> dict[int, Transfer]:
        """Blocks, by slot, that the rank both preconditions and stores completely."""
        return local_blocks(self.matrices, self.transfers, self.rank)

    @cached_property
    def all_rounds(self) -> Rounds:
        """The rounds of a step of the team."""
        return Rounds(self.plan, bucket_elements(self.device_type) if self.travels else math.inf)

    @cached_property
    def rounds(self) -> list[list[int]]:
        """Slots of the blocks of each round that the rank preconditions, in their order."""
        found: list[list[int]] = [[] for _ in self.all_rounds.dtypes]
        kept = self.plan.of_rank(self.rank, kept=True)
        for slot in sorted(itertools.chain(*(slots for run, slots in kept if run.kind.axes))):
            found[self.round_of(slot)].append(slot)
        return found

    def round_of(self, slot: int) -> int:
        """Return the round of a block with factors."""
        return self.all_rounds.of(self.plan.owner(*self.plan.place(slot)))[slot]

    @property
    def replica_groups(self) -> set[tuple[Ranks, str]]:
        """The replica groups that the rank is in, each with the dtype of what it stores."""
        kinds = {(matrix.holders, matrix.sharding.dtype) for matrix in self.matrices}
        return {
            (ranks, dtype)
            for holders, dtype in kinds
            for ranks in holders.replica_groups.values()
            if len(ranks) > 1 and self.rank in ranks
        }

    @cached_property
    def replica_copies(self) -> dict[tuple[tuple[int, ...], str], list[Transfer]]:
        """Fragments whose new weights go to replicas, by replica group and dtype, in the same order on all ranks."""
        copies: defaultdict[tuple[tuple[int, ...], str], list[Transfer]] = defaultdict(list)
        for transfer in self.transfers:
            if len(transfer.ranks) > 1 and self.rank in transfer.ranks:
                copies[transfer.ranks, self.sharding(transfer).dtype].append(transfer)
        return {key: copies[key] for key in sorted(copies)}

    def sharding_of(self, number: int) -> Sharding:
        """Return the sharding of a matrix of a round; all of them have one dtype."""
        shardings = (matrix.sharding for matrix in self.matrices if matrix.axes)
        dtypes = self.all_rounds.dtypes[number]
        return next(sharding for sharding in shardings if (sharding.dtype, sharding.model_dtype) == dtypes)

    def sharding(self, transfer: Transfer) -> Sharding:
        """Return the sharding of the matrix that a fragment belongs to."""
        return self.matrices[transfer.matrix].sharding


def traffic(
    share: RankShare,
    hp: ShampooHyperParams,
    distribution: Distribution,
    known: dict[tuple[Ranks, str], int] | None = None,
) -> dict[str, int]:
    """Count the bytes that a rank receives from others in a step with gradients for all parameters, by their kind.

    These are "gradients" for the keepers of roots, "updates" on their way home, "weights" for replicas and "roots", the
    last only in steps that refresh.

    Args:
        known: what was counted for other ranks of the team: the weights of each replica group, to which more are added.
    """
    plan, rank = share.plan, share.rank
    known = {} if known is None else known
    received: Counter[str] = Counter({"gradients": 0, "updates": 0, "weights": 0, "roots": 0})
    # Of what all ranks store completely keepers are at home.
    moving = any(matrix.axes and (matrix.sharded or not matrix.holders.replicated) for matrix in share.matrices)
    for transfer in share.transfers if moving else ():
        if transfer.home != transfer.keeper and share.matrices[transfer.matrix].axes:
            sharding = share.sharding(transfer)
            if transfer.gathered and transfer.keeper == rank:
                received["gradients"] += transfer.elements * ITEM_BYTES[sharding.dtype]
            if transfer.home == rank:
                dtype = sharding.update_dtype(distribution.update_precision)
                received["updates"] += transfer.elements * ITEM_BYTES[dtype]
    for ranks, dtype in share.replica_groups:
        if (ranks, dtype) not in known:
            items = [(transfer.home, transfer.elements) for transfer in share.replica_copies.get((ranks, dtype), ())]
            padded = sum(width(bucket, items) for bucket in buckets(ranks, items, bucket_elements(share.device_type)))
            known[ranks, dtype] = padded * (len(ranks) - 1) * ITEM_BYTES[dtype]
        received["weights"] += known[ranks, dtype]
    copied = any(run.copies for run in plan.runs)
    for slot in (slot for slots in share.rounds for slot in slots) if copied else ():
        block = plan.blocks[slot]
        if rank != block.owner:
            V = block.elements if hp.variant.direction == "adam" else 0
            size = max(bytes_of(name, hp, block.dtype) for name in copied_names(hp))
            received["roots"] += (block.root_numbers + V) * size
    return dict(received)
