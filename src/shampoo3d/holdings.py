"""What this rank holds and owns: parameters bound to their matrices, owned blocks gathered into stacks."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shampoo3d.blocks import Block
from shampoo3d.hyperparams import ShampooHyperParams
from shampoo3d.layout import Matrix
from shampoo3d.plan import Plan
from shampoo3d.preconditioner import Rows, Stack
from shampoo3d.schedule import Phase, phase
from shampoo3d.topology import Group


@dataclass(eq=False)
class Binding:
    """A tensor of a parameter group, the matrix that it stores, and whether the group wanted it preconditioned."""

    matrix: Matrix
    param: Tensor
    group: int
    precondition: bool

    def write(self, blocks: Sequence[Block], values: Sequence[Tensor]) -> None:
        """Put new values into rectangles of the parameter."""
        whole = self.param.detach().reshape(self.matrix.view)
        torch._foreach_copy_([whole[block.slices] for block in blocks], list(values))
        if whole.data_ptr() != self.param.data_ptr():  # the strides of the parameter allowed no view of it
            self.param.copy_(whole.view(self.param.shape))


@dataclass(frozen=True, eq=False)
class Owned:
    """A block that this rank owns: its place in the plan, in the parameter and in its stack."""

    slot: int
    binding: Binding
    block: Block
    row: int


@dataclass(eq=False)
class Batch:
    """The owned blocks of one shape and parameter group, with their stack."""

    stack: Stack
    group: int
    members: list[Owned]

    def gather(self, members: Sequence[Owned], *, gradient: bool) -> Tensor:
        """The members' blocks of the gradient or of the weights, (len(members), *shape) in the stack's dtype."""
        wholes: dict[Binding, Tensor] = {}  # once per parameter: a reshape copies where its strides allow no view
        for binding in dict.fromkeys(member.binding for member in members):
            source = binding.param.grad if gradient else binding.param.detach()
            assert source is not None
            wholes[binding] = source.reshape(binding.matrix.view)
        return torch.stack([wholes[member.binding][member.block.slices] for member in members]).to(self.stack.dtype)


@dataclass
class Unit:
    """Members of a batch that are in the same phase at this step, and their directions once computed."""

    batch: Batch
    members: list[Owned]
    phase: Phase
    S: Tensor = field(init=False)
    D: Tensor = field(init=False)

    @property
    def rows(self) -> Rows:
        if len(self.members) == self.batch.stack.n:
            return slice(None)
        return torch.tensor([member.row for member in self.members], device=self.batch.stack.device)

    @property
    def slots(self) -> list[int]:
        return [member.slot for member in self.members]


@dataclass(eq=False)
class Replicas:
    """Ranks that store the same parameters, the plan by which they share the work, and this rank's part of it.

    ``local`` are the blocks in coordinates of the parameters, in the order of the plan.
    """

    group: Group
    plan: Plan
    bindings: list[Binding]
    local: list[tuple[Binding, Block]]
    batches: list[Batch]
    tied: bool

    @classmethod
    def bind(
        cls, group: Group, plan: Plan, bindings: list[Binding], rank: int, hp: ShampooHyperParams, *, tied: bool
    ) -> "Replicas":
        """Allocate the stacks of the blocks that ``rank`` owns."""
        local = [(binding, block) for binding in bindings for block in binding.matrix.local_blocks]
        return cls(group, plan, bindings, local, _make_batches(plan, local, rank, hp), tied)

    def units(self, steps: dict[Tensor, int], hp: ShampooHyperParams) -> Iterator[Unit]:
        """The owned blocks of the parameters in ``steps`` (each with its t), batched by phase."""
        for batch in self.batches:
            by_phase: defaultdict[Phase, list[Owned]] = defaultdict(list)
            for member in batch.members:
                t = steps.get(member.binding.param)
                if t is not None:
                    by_phase[phase(t, hp)].append(member)
            for now, members in by_phase.items():
                yield Unit(batch, members, now)


def _make_batches(plan: Plan, local: Sequence[tuple[Binding, Block]], rank: int, hp: ShampooHyperParams) -> list[Batch]:
    kinds: defaultdict[Any, list[tuple[int, Binding, Block]]] = defaultdict(list)
    for slot, (planned, (binding, block)) in enumerate(zip(plan.blocks, local, strict=True)):
        if planned.owner == rank:
            device, dtype = binding.param.device, state_dtype(binding.param.dtype)
            kinds[block.shape, binding.matrix.rank, binding.group, dtype, device].append((slot, binding, block))
    batches = []
    for (shape, axes, group, dtype, device), found in kinds.items():
        stack = Stack(shape, len(found), axes, hp, dtype, device)
        members = [Owned(slot, binding, block, row) for row, (slot, binding, block) in enumerate(found)]
        batches.append(Batch(stack, group, members))
    return batches


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """State and arithmetic are float64 for float64 parameters, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def state_bytes(batches: Iterable[Batch]) -> int:
    """Bytes of all stacks' state."""
    return sum(tensor.nbytes for batch in batches for tensor in batch.stack.tensors().values())
