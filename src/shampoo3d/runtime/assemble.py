"""Teams from parameter groups: read how parameters are stored, agree on it with the other ranks, plan, bind."""

import math
from collections import ChainMap, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from shampoo3d.distributed.collectives import all_gather_distinct, all_gather_object, first_error
from shampoo3d.distributed.errors import during
from shampoo3d.distributed.topology import ParallelGroups
from shampoo3d.engines.engine import LocalShard
from shampoo3d.engines.parameters import ParameterRegistry, check_supported, sharing_memory
from shampoo3d.engines.reading import engine, read
from shampoo3d.engines.roles import Facts
from shampoo3d.planning.assignment import in_order, make_plans
from shampoo3d.planning.grid import describe
from shampoo3d.planning.layout import Matrix
from shampoo3d.planning.plan import Plan
from shampoo3d.planning.shards import Ranks
from shampoo3d.planning.stagger import factored_blocks, refresh_turns
from shampoo3d.runtime.bindings import Binding, GroupTensor
from shampoo3d.runtime.exchange import Exchange
from shampoo3d.runtime.records import Record, exchanged
from shampoo3d.runtime.shards import shard_buckets
from shampoo3d.runtime.team import Team
from shampoo3d.settings.distribution import Distribution
from shampoo3d.settings.hyperparams import ShampooHyperParams
from shampoo3d.settings.validation import short


def is_trainable(param: Tensor) -> bool:
    """Return whether the parameter takes part in steps: it may get a gradient, or has one, and is not empty."""
    return not is_lazy(param) and param.numel() > 0 and (param.requires_grad or param.grad is not None)


class DisagreementError(ValueError):
    """Difference between the parameters or settings of the ranks of a team; raised on all of them."""


@during("about the plan")
def assemble(
    groups: Sequence[Mapping[str, Any]],
    registry: ParameterRegistry,
    parallel: ParallelGroups,
    distribution: Distribution,
    known: Mapping[Tensor, int],
    fixed: Mapping[str, Sequence[int]],
) -> list[Team]:
    """Bind the trainable parameters and those that are ``known`` already, and plan in each team.

    Collective: each error is raised on all ranks.

    Args:
        known: the steps that they have taken.
        fixed: the owners of all blocks of matrices that were planned before, which stay.

    Raises:
        DisagreementError: naming the parameter whose storage can't be explained, or in which ranks differ, and how.
    """
    stored, tied = _read(groups, registry, parallel, distribution, known)
    if registry.roles.ignored:  # of a pipeline one rank has the embedding, another one the output layer
        facts = registry.roles.facts({s.original: s.shape for s in stored})
        registry.roles.find(Facts.joined(all_gather_distinct(parallel.world, facts)))
    by_team = _teams(stored, registry, parallel)
    matrices: dict[Ranks, list[Matrix]] = {}
    error = ""
    for ranks in in_order(by_team):
        # Also after an error, since others may wait for this rank in another team.
        matrices[ranks], differences = _matrices(ranks, by_team[ranks], groups, registry, parallel, distribution, known)
        error = error or differences
    _refuse(parallel, error)
    plans, hp = _planned(matrices, registry.roles.hp, fixed, distribution.memory_bound, parallel), registry.roles.hp
    group_tensors = {s.tensor: GroupTensor(s.tensor, s.group, groups[s.group]["precondition"]) for s in stored}
    bindings = [
        [
            Binding(i, matrix, group_tensors[s.tensor], s.offset, s.shard)
            for i, (matrix, (s, _)) in enumerate(zip(matrices[plan.ranks], by_team[plan.ranks], strict=True))
        ]
        for plan in plans
    ]
    flat, teams = shard_buckets(chain.from_iterable(bindings), hp), []
    for plan, bound in zip(plans, bindings, strict=True):
        beyond = set(plan.ranks) - set(parallel.data.ranks)
        across = bool(beyond) and any(s.original in tied for s, _ in by_team[plan.ranks])
        teams.append(Team(parallel.group(plan.ranks), parallel.rank, plan, bound, hp, across, flat))
    return teams


@dataclass(frozen=True, eq=False)
class Bound:
    """All that is made of the ranks and parameters: groups of ranks, teams, exchanges, group tensors."""

    parallel: ParallelGroups
    teams: list[Team]
    exchanges: list[Exchange]
    group_tensors: dict[Tensor, GroupTensor]

    @classmethod
    def of(cls, parallel: ParallelGroups, teams: list[Team], distribution: Distribution) -> "Bound":
        exchanges = [Exchange(team, parallel, distribution.update_precision) for team in teams]
        group_tensors = {tensor.tensor: tensor for team in teams for tensor in team.group_tensors}
        return cls(parallel, teams, exchanges, group_tensors)


def _refuse(parallel: ParallelGroups, error: str) -> None:
    """Raise on all ranks if one of them has an error."""
    if first := first_error(parallel, error):
        raise DisagreementError(first)


def _read(
    groups: Sequence[Mapping[str, Any]],
    registry: ParameterRegistry,
    parallel: ParallelGroups,
    distribution: Distribution,
    known: Mapping[Tensor, int],
) -> tuple[list[LocalShard], dict[Tensor, Ranks]]:
    """Read this rank's shards of the parameters that take part, and the ranks of those that are tied across stages."""
    stored: list[LocalShard] = []
    tied: dict[Tensor, Ranks] = {}
    try:
        registry.learn_replaced()
        registry.count_experts()
        for model in registry.models:
            tied |= engine().tied_holders(model)
        exact = distribution.tensor_parallel == "exact"
        contents = registry.contents
        shards = read(contents, parallel, tied, exact=exact)
        flat = {group.number for group in contents if engine().is_flat(group)}
        taking_part = (s for s in shards if s.group in flat or is_trainable(s.tensor) or s.tensor in known)
        stored = [s for s in taking_part if math.prod(s.shape) > 0]
        for s in stored:
            check_supported(s.original, registry.names[s.original])
        error = _unknown_ties(stored, registry, tied) or _shared_memory(stored, registry, parallel)
    except (ValueError, RuntimeError) as raised:  # perhaps on this rank only; _refuse raises it on all
        error = str(raised)
    _refuse(parallel, error)
    return stored, tied


def _planned(
    matrices: Mapping[Ranks, Sequence[Matrix]],
    hp: ShampooHyperParams,
    fixed: Mapping[str, Sequence[int]],
    memory_bound: int | None,
    parallel: ParallelGroups,
) -> list[Plan]:
    """Make a plan for each team, the same on all its ranks."""
    plans: list[Plan] = []
    error = ""
    # Refreshes are staggered over the blocks of all teams; the first rank of each team sends their numbers.
    blocks: dict[str, Sequence[tuple[int, float]]] = {
        name: counts
        for ranks, team_matrices in matrices.items()
        if ranks[0] == parallel.rank
        for name, counts in factored_blocks(team_matrices).items()
    }
    turns = refresh_turns(dict(ChainMap(*all_gather_object(parallel.world, blocks))), hp)
    try:
        plans = make_plans(matrices, hp, fixed, memory_bound, turns)
    except ValueError as raised:
        error = str(raised)
    _refuse(parallel, error)
    _refuse(parallel, _different_plans(plans, parallel))
    return plans


def _unknown_ties(stored: Sequence[LocalShard], registry: ParameterRegistry, tied: Mapping[Tensor, Ranks]) -> str:
    for s in stored:
        if engine().untold_tie(s.original) and s.original not in tied:
            return (
                f"{registry.names[s.original]!r} is tied to other pipeline stages, and only the model knows to "
                "which: pass model.parameters() itself, or model="
            )
    return ""


def _shared_memory(stored: Sequence[LocalShard], registry: ParameterRegistry, parallel: ParallelGroups) -> str:
    """Return an error about parameters with elements in common: other ranks' updates of one overwrite the other's."""
    names = {s.tensor: registry.names[s.original] for s in stored}
    if parallel.world.size == 1 or not (shared := sharing_memory(names)):
        return ""
    return (
        f"parameters {shared[0]!r} and {shared[1]!r} share memory, so that ranks that update one each overwrite the "
        "other's update: tie them by assigning the parameter itself (b.weight = a.weight), or clone one"
    )


def _teams(
    stored: Sequence[LocalShard], registry: ParameterRegistry, parallel: ParallelGroups
) -> dict[Ranks, list[tuple[LocalShard, int]]]:
    """Group local shards by team, with their shard groups, in one order on all ranks. Collective in the model group."""
    ends = {registry.names[s.original]: (s.holders, s.team) for s in stored if s.meets_shards}
    table: list[dict[str, tuple[Ranks, Ranks]]] = all_gather_object(parallel.model, ends)
    by_team: defaultdict[Ranks, list[tuple[LocalShard, int]]] = defaultdict(list)
    for s in stored:
        peers = [theirs.get(registry.names[s.original], ((), ())) for theirs in table] if s.meets_shards else []
        team = tuple(sorted({*s.team, *(rank for _, ranks in peers for rank in ranks)}))
        # Only all tensor-parallel shards together make a divided matrix; holders have all of an undivided one.
        shards = {rank for ranks, _ in peers for rank in ranks} if s.divided is not None else set()
        by_team[team].append((s, min({*s.holders, *shards}) if s.sharded else 0))
    for ranks, members in by_team.items():
        if ranks != parallel.data.ranks:  # perhaps from several stages, whose parameters differ in order
            members.sort(key=lambda member: registry.names[member[0].original])
    return dict(by_team)


def _matrices(
    ranks: Ranks,
    members: Sequence[tuple[LocalShard, int]],
    groups: Sequence[Mapping[str, Any]],
    registry: ParameterRegistry,
    parallel: ParallelGroups,
    distribution: Distribution,
    known: Mapping[Tensor, int],
) -> tuple[list[Matrix], str]:
    """Describe the matrices of a team by the shards on its ranks, or return how the ranks differ. Collective."""
    record = Record(members, groups, registry, distribution, known)
    stored, error = exchanged(parallel.group(ranks), record)
    matrices: list[Matrix] = []
    for sharding, holders in zip(record.common.shardings, stored, strict=not error):
        try:
            sharding = replace(sharding, holders=holders).with_shard_groups(distribution.root_copies)
            matrix = describe(sharding, registry.roles.hp, parallel.world.size)
        except ValueError as raised:
            return matrices, str(raised)
        if gaps := matrix.gaps():
            return matrices, f"the storage of {matrix.name!r} of shape {matrix.shape} can't be explained: {gaps}"
        matrices.append(matrix)
    return matrices, error


def _different_plans(plans: Sequence[Plan], parallel: ParallelGroups) -> str:
    """Describe which rank's plan differs from that of the first of its team, and in which block. Collective."""
    error = ""
    for plan in plans:
        digests = all_gather_object(parallel.group(plan.ranks), plan.digest())
        if len(set(digests)) == 1:
            continue
        everyones_plans = all_gather_object(parallel.group(plan.ranks), plan)
        for rank, other in zip(plan.ranks, everyones_plans, strict=True):
            pairs = zip(everyones_plans[0].blocks, other.blocks, strict=False)
            differing = next((f"{a} and {b}" for a, b in pairs if a != b), f"{len(other.blocks)} blocks")
            if other != everyones_plans[0] and not error:
                error = f"the plans of ranks {plan.ranks[0]} and {rank} differ: {differing}"
    return error


def check_shapes(shapes: Sequence[Sequence[int]] | None, params: Sequence[Tensor]) -> None:
    """Raise ValueError unless these are the shapes of the trainable parameters, as the model has them."""
    if shapes is None:
        return
    if not isinstance(shapes, Sequence) or not all(isinstance(shape, Sequence) for shape in shapes):
        raise TypeError(f"shapes must be the shapes of the trainable parameters, got {short(shapes)}")
    actual = [engine().shape_of(param) for param in params if param.requires_grad]
    claimed = [tuple(shape) for shape in shapes]
    if claimed != actual:
        index = next((i for i, (a, b) in enumerate(zip(claimed, actual, strict=False)) if a != b), None)
        detail = "" if index is None else f": number {index} is {claimed[index]}, the parameter's is {actual[index]}"
        raise ValueError(f"shapes has {len(claimed)} entries for {len(actual)} trainable parameters{detail}")
