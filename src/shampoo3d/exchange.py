"""The only communication of a step: agreement, norms, and updated blocks on their way home."""

import enum
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo3d.blocks import Block
from shampoo3d.holdings import Binding, Replicas, state_dtype
from shampoo3d.hyperparams import ShampooHyperParams
from shampoo3d.topology import Group, Mesh

# Its newer name, where torch has it.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

BUCKET_ELEMENTS = 2**22
"""Elements that one collective brings home, over all ranks: bounds the buffer, whatever the model's size."""


class StepRefusedError(RuntimeError):
    """What this or another rank was given cannot be used; raised on all ranks, and nothing was changed."""


class Verdict(enum.Enum):
    """What all ranks do next."""

    STEP = enum.auto()
    SKIP = enum.auto()
    BIND = enum.auto()


def agree(
    mesh: Mesh,
    replicas: Sequence[Replicas],
    hp: ShampooHyperParams,
    groups: Sequence[Mapping[str, Any]],
    complaint: str,
    unbound: bool,
) -> Verdict:
    """What all ranks do next: this step, not this step, or bind parameters first.

    One all-gather of four numbers among replicas and, where there are other ranks too, one all-reduce of three among
    everyone, so that all ranks step, skip, bind or raise together.

    Args:
        groups: the parameter groups, whose settings must be the same on replicas.
        complaint: what this rank was given that it cannot use.
        unbound: whether this rank has parameters that are not bound yet.

    Raises:
        StepRefusedError: on every rank, if one has a complaint, or if replicas differ in their settings, in which
            parameters have gradients or in the size of these; with ``nonfinite_gradient="raise"``, if a gradient is not
            finite.
    """
    finite = True
    for shared in replicas:
        entries = _largest_entries(shared.bindings)
        if bad := [binding for binding, entry in entries.items() if not _can_be_squared(binding, entry)]:
            finite = False
            if hp.nonfinite_gradient == "raise" and not complaint:
                complaint = f"the gradient of {bad[0].matrix.name!r} is NaN or infinite, or its squares are"
        # A shared weight may be clipped by its own stage's norm, so that copies on two stages differ by a factor.
        largest = 0.0 if shared.tied else max(entries.values(), default=0.0)
        for group, bindings, size in (
            (shared.group, shared.bindings, largest),
            (mesh.model, [b for b in shared.bindings if b.matrix.storage.shard is not None], 0.0),
        ):
            if group.size > 1 and bindings:
                differences = _compare(mesh.rank, group, bindings, groups, size)
                complaint = complaint or differences
    verdict = [not finite, bool(complaint), unbound]
    if mesh.everyone.size > 1:
        votes = torch.tensor(verdict, dtype=torch.int32, device=_device(mesh, replicas))
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=mesh.everyone.handle)
        verdict = votes.bool().tolist()
    nonfinite, refused, unbound = verdict
    if refused:
        raise StepRefusedError(f"{_first(mesh, complaint)}; no parameter and no state was changed")
    if unbound:
        return Verdict.BIND
    return Verdict.SKIP if nonfinite else Verdict.STEP


def _first(mesh: Mesh, complaint: str) -> str:
    """The complaint of the first rank that has one, told to all."""
    complaints: list[str] = [complaint] * mesh.everyone.size
    if mesh.everyone.size > 1:
        dist.all_gather_object(complaints, complaint, group=mesh.everyone.handle)
    return next(filter(None, complaints))


def _largest_entries(bindings: Sequence[Binding]) -> dict[Binding, float]:
    """The largest magnitude in each gradient, NaN if it has a NaN; one synchronisation per device."""
    gradients = {b: b.param.grad for b in bindings if b.param.grad is not None and b.param.grad.layout == torch.strided}
    if not gradients:
        return {}
    by_device: defaultdict[torch.device, dict[Binding, Tensor]] = defaultdict(dict)
    for binding, norm in zip(gradients, torch._foreach_norm(list(gradients.values()), math.inf), strict=True):
        by_device[norm.device][binding] = norm.double()
    entries: dict[Binding, float] = {}
    for norms in by_device.values():
        entries |= zip(norms, torch.stack(list(norms.values())).tolist(), strict=True)
    return entries


def _can_be_squared(binding: Binding, largest: float) -> bool:
    """Whether the sum of the gradient's squares is finite in the dtype of the state."""
    limit = torch.finfo(state_dtype(binding.param.dtype)).max / binding.param.numel()
    return largest * largest < limit  # False for NaN


def _compare(
    rank: int, group: Group, bindings: Sequence[Binding], groups: Sequence[Mapping[str, Any]], largest: float
) -> str:
    """How ranks differ in which of these parameters have gradients, the largest entry, or settings; empty if not."""
    present = [binding.matrix.name for binding in bindings if binding.param.grad is not None]
    options = ("lr", "momentum", "weight_decay", "maximize")
    settings = sorted({str({name: groups[binding.group][name] for name in options}) for binding in bindings})
    numbers = [len(present), _fingerprint(present), largest, _fingerprint(settings)]
    mine = torch.tensor(numbers, dtype=torch.float64, device=bindings[0].param.device)
    table = torch.empty(group.size * len(numbers), dtype=torch.float64, device=mine.device)
    all_gather(table, mine, group=group.handle)
    rows = table.view(group.size, -1).tolist()
    for other, (count, names, entry, options_) in zip(group.ranks, rows, strict=True):
        if options_ != rows[0][3]:
            return (
                f"ranks {group.ranks[0]} and {other} differ in lr, momentum, weight_decay or maximize (rank {rank} has "
                f"{', '.join(settings)}); schedulers must do the same on all ranks"
            )
        if names != rows[0][1]:
            absent = [binding.matrix.name for binding in bindings if binding.param.grad is None]
            return (
                f"rank {group.ranks[0]} has gradients for {rows[0][0]:.0f} and rank {other} for {count:.0f} of "
                f"{len(bindings)} parameters, not the same ones; ranks of one group must have gradients for the same "
                f"parameters (on rank {rank} these have none: {absent[:5]})"
            )
        if abs(entry - rows[0][2]) > 1e-3 * abs(rows[0][2]):
            return (
                f"the largest gradient entry is {rows[0][2]:.6g} on rank {group.ranks[0]} and {entry:.6g} on rank "
                f"{other}; replicas must have the same, averaged gradients (DeepSpeed and DistributedDataParallel "
                "average them in backward)"
            )
    return ""


def _fingerprint(texts: Sequence[str]) -> int:
    """A number of 48 bits, exact in float64."""
    return int.from_bytes(hashlib.sha256("\n".join(texts).encode()).digest()[:6], "big")


def graft_norms(mesh: Mesh, shared: Replicas, norms: Tensor, bindings: Sequence[Binding]) -> Tensor:
    """Squared norms of each whole parameter from those of its blocks.

    Each block has one owner, so the sum over ranks adds zeros only: it is exact, and the same whoever owns what.

    Args:
        norms: float64, (blocks of the plan, k), zero for blocks of other owners.
        bindings: whose norms are wanted, in the order in which they are bound.

    Returns:
        float64, (len(bindings), k); of the logical matrix for those that are sharded over the model group.
    """
    if shared.group.size > 1:
        dist.all_reduce(norms, group=shared.group.handle)
    counts = torch.tensor([len(binding.matrix.blocks) for binding in shared.bindings], device=norms.device)
    whole = torch.segment_reduce(norms, "sum", lengths=counts, axis=0, unsafe=True)  # unsafe: without a synchronisation
    chosen = set(bindings)
    whole = whole[[i for i, binding in enumerate(shared.bindings) if binding in chosen]]
    sharded = [i for i, binding in enumerate(bindings) if binding.matrix.storage.shard is not None]
    if sharded and mesh.model.size > 1:
        parts = whole[sharded]
        dist.all_reduce(parts, group=mesh.model.handle)
        whole[sharded] = parts
    return whole


def deliver(rank: int, shared: Replicas, updated: Mapping[int, Tensor], active: set[Binding]) -> None:
    """Bring every updated block from its owner to all replicas.

    Args:
        rank: this process.
        updated: new weights of the blocks that this rank owns, by their slot in the plan.
        active: the bindings that are updated at this step, the same on all replicas.
    """
    wanted = [slot for slot, (binding, _) in enumerate(shared.local) if binding in active]
    sizes = {slot: shared.plan.blocks[slot].elements for slot in wanted}
    for dtype in dict.fromkeys(shared.local[slot][0].param.dtype for slot in wanted):
        chosen = {slot: size for slot, size in sizes.items() if shared.local[slot][0].param.dtype == dtype}
        for arrived in share(rank, shared, chosen, lambda slot: updated[slot], dtype):
            _write(shared, arrived)


def share(
    rank: int, shared: Replicas, sizes: Mapping[int, int], flat: Callable[[int], Tensor], dtype: torch.dtype
) -> Iterator[dict[int, Tensor]]:
    """Give every replica what each owner has for its blocks, one bucket (one collective) at a time.

    Args:
        sizes: how many numbers travel for each slot of the plan.
        flat: those numbers, for a slot that this rank owns; of any shape.

    Yields:
        The flat tensors that arrived, by slot.
    """
    group, planned = shared.group, shared.plan.blocks
    if group.size == 1:
        yield {slot: flat(slot).reshape(-1) for slot in sizes}
        return
    device = shared.bindings[0].param.device
    for bucket in _buckets(group, {slot: (planned[slot].owner, size) for slot, size in sizes.items()}):
        width = max(sum(sizes[slot] for slot in slots) for slots in bucket.values())
        send = torch.zeros(width, dtype=dtype, device=device)
        for slot, piece in zip(bucket[rank], send.split_with_sizes(_fill(sizes, bucket[rank], width)), strict=False):
            piece.copy_(flat(slot).reshape(-1))
        received = torch.empty(group.size * width, dtype=dtype, device=device)
        # As bytes, since not every backend carries every dtype.
        all_gather(received.view(torch.uint8), send.view(torch.uint8), group=group.handle)
        arrived: dict[int, Tensor] = {}
        for owner, row in zip(group.ranks, received.view(group.size, width), strict=True):
            pieces = row.split_with_sizes(_fill(sizes, bucket[owner], width))
            arrived |= dict(zip(bucket[owner], pieces, strict=False))
        yield arrived


def _fill(sizes: Mapping[int, int], slots: Sequence[int], width: int) -> list[int]:
    """The pieces' sizes and, last, the padding up to ``width``."""
    used = [sizes[slot] for slot in slots]
    return [*used, width - sum(used)]


def _buckets(group: Group, blocks: Mapping[int, tuple[int, int]]) -> Iterator[dict[int, list[int]]]:
    """Per owner, rounds of slots of about ``BUCKET_ELEMENTS`` elements over all ranks; ``blocks``: (owner, size)."""
    quota = max(1, BUCKET_ELEMENTS // group.size)
    queues: dict[int, list[int]] = {owner: [] for owner in group.ranks}
    for slot in reversed(list(blocks)):
        queues[blocks[slot][0]].append(slot)
    while any(queues.values()):
        bucket: dict[int, list[int]] = {}
        for owner, queue in queues.items():
            bucket[owner], filled = [], 0
            while queue and (not filled or filled + blocks[queue[-1]][1] <= quota):
                filled += blocks[queue[-1]][1]
                bucket[owner].append(queue.pop())
        yield bucket


def _write(shared: Replicas, values: Mapping[int, Tensor]) -> None:
    by_binding: dict[Binding, tuple[list[Block], list[Tensor]]] = {}
    for slot, value in values.items():
        binding, block = shared.local[slot]
        blocks, tensors = by_binding.setdefault(binding, ([], []))
        blocks.append(block)
        tensors.append(value.view(block.shape))
    for binding, (blocks, tensors) in by_binding.items():
        binding.write(blocks, tensors)


def _device(mesh: Mesh, replicas: Sequence[Replicas]) -> torch.device:
    """Where everyone's collectives take their tensors: with the parameters; a rank may have none of these."""
    if replicas:
        return replicas[0].bindings[0].param.device
    nccl = dist.get_backend(mesh.everyone.handle) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
