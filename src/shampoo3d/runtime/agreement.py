"""Agreement of all ranks before anything changes, so that they step, skip, bind or raise together."""

import enum
import hashlib
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo3d.distributed.collectives import all_gather, communicating_device, first_error
from shampoo3d.distributed.errors import awaiting
from shampoo3d.distributed.topology import ParallelGroups
from shampoo3d.runtime.bindings import GroupTensor, state_dtype
from shampoo3d.runtime.team import Team
from shampoo3d.settings.hyperparams import ShampooHyperParams


class StepRefusedError(RuntimeError):
    """Error in the input of this or another rank; raised on all ranks, and nothing was changed."""


class Verdict(enum.Enum):
    """The next action of all ranks."""

    STEP = enum.auto()
    SKIP = enum.auto()
    BIND = enum.auto()


def agree(
    parallel: ParallelGroups,
    teams: Sequence[Team],
    present: Collection[GroupTensor],
    hp: ShampooHyperParams,
    groups: Sequence[Mapping[str, Any]],
    error: str,
    unbound: bool,
) -> Verdict:
    """Decide on all ranks together: this step, not this step, or bind parameters first.

    One all-gather of four numbers in each team and, where there are other ranks too, one all-reduce of three in the
    world, so that all ranks step, skip, bind or raise together.

    Args:
        present: the group tensors that this call of ``step()`` is about.
        groups: the parameter groups, whose settings must be the same in a team.
        error: the error in the input of this rank; empty if none.
        unbound: whether this rank has parameters that are not bound yet.

    Raises:
        StepRefusedError: on every rank, if one has an error, or if ranks of a team differ in their settings, in
            which parameters have gradients or, if they are exact replicas, in the size of these; with
            ``nonfinite_gradient="raise"``, if a gradient is not finite. With "ignore" no gradient is read.
    """
    finite, differences = True, ""
    for team in teams:
        names = {tensor: names for tensor, names in team.names.items() if tensor in present}
        largest, too_large = _gradient_health(team, names, hp)
        finite = finite and not too_large
        if hp.nonfinite_gradient == "raise":
            error = error or too_large
        if team.group.size > 1 and names:
            differences = _compare(team, names, groups, largest) or differences
    nonfinite, refused, unbound = _vote(parallel, teams, [not finite, bool(error or differences), unbound])
    if refused:
        # An error of one rank often explains why it differs from others.
        why = first_error(parallel, error) or first_error(parallel, differences)
        raise StepRefusedError(f"{why}; no parameter and no state was changed")
    if unbound:
        return Verdict.BIND
    return Verdict.SKIP if nonfinite else Verdict.STEP


def _gradient_health(team: Team, names: Mapping[GroupTensor, list[str]], hp: ShampooHyperParams) -> tuple[float, str]:
    """Return the largest norm of a gradient, which replicas compare, and the error if one is too large."""
    norms = {} if hp.nonfinite_gradient == "ignore" else gradient_norms(list(names))
    for tensor, norm in norms.items():
        most = largest_norm(state_dtype(tensor.tensor.dtype), hp)
        if not norm <= most:  # NaN is not
            # Perhaps on this replica only: NaN compares with nothing, and the vote of the world decides.
            return math.nan, (
                f"the gradient of {names[tensor][0]!r} has a norm of {norm:.3g}: it must be finite and at most "
                f"{most:.3g}, so that no sum of its squares can overflow"
            )
    # Each stage may clip a tied weight by its own norm, so that copies on two stages differ by a factor.
    return 0.0 if team.tied else max(norms.values(), default=0.0), ""


def _vote(parallel: ParallelGroups, teams: Sequence[Team], flags: list[bool]) -> list[bool]:
    """Return for each flag whether any rank of the world has it set."""
    if parallel.world.size == 1:
        return flags
    here = teams[0].device if teams else torch.device("cpu")  # a rank may have no parameters
    votes = torch.tensor(flags, dtype=torch.int32, device=communicating_device(parallel.world, here))
    with awaiting("the agreement", parallel.world.ranks):
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=parallel.world.handle)
    return [bool(vote) for vote in votes.tolist()]


def largest_norm(dtype: torch.dtype, hp: ShampooHyperParams) -> float:
    """Return the largest norm of a gradient for which a sum of squares of any length is finite in this state dtype.

    A sum that is 4 / eps times as large as the next term no longer grows. The factor 512 leaves room for as many ranks
    that store a shard of one matrix each.
    """
    c = hp.computation
    if "bfloat16" in (c.products, c.root_storage, c.momentum_storage):
        dtype = torch.float32  # which has the same range
    kind = torch.finfo(dtype)
    return math.sqrt(kind.max * kind.eps / 4 / 512)


def gradient_norms(group_tensors: Sequence[GroupTensor]) -> dict[GroupTensor, float]:
    """Compute the norm of each gradient, not finite if its squares are not; one synchronisation per device."""
    gradients = {
        group_tensor: group_tensor.gradient for group_tensor in group_tensors if group_tensor.has_dense_gradient
    }
    kinds: defaultdict[tuple[torch.device, torch.dtype], dict[GroupTensor, Tensor]] = defaultdict(dict)
    for group_tensor, gradient in gradients.items():
        if gradient is not None and gradient.numel():
            kinds[gradient.device, state_dtype(gradient.dtype)][group_tensor] = gradient
    norms: dict[GroupTensor, float] = {}
    for (_, dtype), alike in kinds.items():
        roots = torch._foreach_norm(list(alike.values()), 2, dtype=dtype)
        norms |= zip(alike, torch.stack(roots).double().tolist(), strict=True)
    return norms


def _compare(
    team: Team, names: Mapping[GroupTensor, list[str]], groups: Sequence[Mapping[str, Any]], largest: float
) -> str:
    """Describe how ranks differ in settings, in which group tensors have gradients, or in the largest norm, if so."""
    present = [
        name for group_tensor, matrices in names.items() if group_tensor.tensor.grad is not None for name in matrices
    ]
    absent = [name for group_tensor, matrices in names.items() if group_tensor.tensor.grad is None for name in matrices]
    options = ("lr", "momentum", "weight_decay", "maximize")
    settings = sorted({_shown({name: groups[of.group].get(name) for name in options}) for of in names})
    numbers = [len(present), _fingerprint(present), largest, _fingerprint(settings)]
    ranks, device = team.group.ranks, communicating_device(team.group, team.device)
    mine = torch.tensor(numbers, dtype=torch.float64, device=device)
    table = torch.empty(len(ranks) * len(numbers), dtype=torch.float64, device=device)
    with awaiting("the agreement", ranks):
        all_gather(table, mine, group=team.group.handle)
    rows = dict(zip(ranks, table.view(len(ranks), -1).tolist(), strict=True))
    first = rows[ranks[0]]
    for other, (count, fingerprint, norm, options_) in rows.items():
        if options_ != first[3]:
            return (
                f"ranks {ranks[0]} and {other} differ in lr, momentum, weight_decay or maximize (rank {team.rank} has "
                f"{', '.join(settings)}); schedulers must do the same on all ranks"
            )
        if fingerprint != first[1]:
            return (
                f"rank {ranks[0]} has gradients for {first[0]:.0f} and rank {other} for {count:.0f} of "
                f"{len(present) + len(absent)} parameters, not the same ones; ranks of one group must have gradients "
                f"for the same parameters (on rank {team.rank} these have none: {absent[:5]})"
            )
        if other in team.exact_replicas and abs(norm - largest) > 1e-3 * abs(largest):
            return (
                f"the largest norm of a gradient is {largest:.6g} on rank {team.rank} and {norm:.6g} on rank {other}; "
                "replicas must have the same, averaged gradients (DeepSpeed and DistributedDataParallel "
                "average them in backward)"
            )
    return ""


def _shown(settings: Mapping[str, Any]) -> str:
    """Describe settings; a learning rate on an accelerator is not read."""
    return str({name: "a tensor" if isinstance(value, Tensor) else value for name, value in settings.items()})


def _fingerprint(texts: Sequence[str]) -> int:
    """Hash the texts to a number of 48 bits, exact in float64."""
    return int.from_bytes(hashlib.sha256("\n".join(texts).encode()).digest()[:6], "big")
