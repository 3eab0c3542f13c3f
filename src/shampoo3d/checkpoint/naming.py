"""Names of matrices in a folder: those of the model, except where ranks mean different matrices by one name.

Replicas that do not know of each other (FSDP beside tensor parallelism) and experts both have the same names in several
teams. The former have the same values, and one of them is saved for all; the latter are distinguished by a number.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from shampoo3d.distributed.collectives import all_gather_object
from shampoo3d.distributed.topology import ParallelGroups
from shampoo3d.planning.shards import Ranks, Shard
from shampoo3d.runtime.bindings import Binding
from shampoo3d.runtime.records import checksum
from shampoo3d.runtime.team import Team

Sums = tuple[float, float]


@dataclass(frozen=True)
class Names:
    """Names of the matrices on this rank, and of those of them that their team writes."""

    called: Mapping[Binding, str]
    written: Mapping[Binding, str]


def for_saving(parallel: ParallelGroups, teams: Sequence[Team]) -> Names:
    """Name matrices as they are saved. Collective."""
    shared = _shared(parallel, teams)
    different = _different(parallel, teams, shared)
    numbered = _numbered(teams, {name: ranks for name, ranks in shared.items() if name in different})
    written = {
        binding: name
        for team in teams
        for binding in team.bindings
        if (name := numbered[binding]) not in shared or shared[name][0] == team.plan.ranks
    }
    return Names(numbered, written)


def for_loading(parallel: ParallelGroups, teams: Sequence[Team], saved: Collection[str]) -> dict[Binding, str]:
    """Name matrices as they were saved. Collective."""
    shared = _shared(parallel, teams)
    return _numbered(teams, {name: ranks for name, ranks in shared.items() if name not in saved})


def _shared(parallel: ParallelGroups, teams: Sequence[Team]) -> dict[str, list[Ranks]]:
    """Return the teams, in order, of each name that several teams have. Collective."""
    teams_of: dict[str, set[Ranks]] = {}
    mine = {(binding.matrix.name, team.plan.ranks) for team in teams for binding in team.bindings}
    for name, ranks in (item for items in all_gather_object(parallel.world, mine) for item in items):
        teams_of.setdefault(name, set()).add(ranks)
    return {name: sorted(ranks) for name, ranks in teams_of.items() if len(ranks) > 1}


def _numbered(teams: Sequence[Team], shared: Mapping[str, list[Ranks]]) -> dict[Binding, str]:
    """Name matrices, with the index of their team where the name is not enough."""
    names = {}
    for team in teams:
        for binding in team.bindings:
            name = binding.matrix.name
            names[binding] = f"{name}@{shared[name].index(team.plan.ranks)}" if name in shared else name
    return names


def _different(parallel: ParallelGroups, teams: Sequence[Team], shared: Mapping[str, list[Ranks]]) -> set[str]:
    """Return the names by which teams mean matrices of different values. Collective if there are shared names."""
    if not shared:
        return set()
    mine: dict[tuple[str, Ranks], dict[Shard, Sums]] = {}
    for team in teams:
        for binding in team.bindings:
            if binding.matrix.name in shared:
                here = binding.group_tensor.flat[binding.offset : binding.offset + binding.elements]
                part = binding.shard
                mine[binding.matrix.name, team.plan.ranks] = {part: checksum(here)}
    everywhere: dict[tuple[str, Ranks], dict[Shard, Sums]] = {}
    for on_rank in all_gather_object(parallel.world, mine):
        for key, sums in on_rank.items():
            everywhere.setdefault(key, {}).update(sums)
    totals = {key: torch.tensor(list(sums.values()), dtype=torch.float64).sum(0) for key, sums in everywhere.items()}
    return {
        name
        for name, ranks in shared.items()
        if any(not torch.allclose(totals[name, other], totals[name, ranks[0]], rtol=1e-9, atol=0.0) for other in ranks)
    }
