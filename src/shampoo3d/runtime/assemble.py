"""From parameter groups to teams: reads how parameters are stored, agrees on it with the other ranks, plans, binds."""

import math
from collections import ChainMap, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from shampoo3d.distributed.collectives import everyones, first_complaint
from shampoo3d.distributed.errors import during
from shampoo3d.distributed.topology import Mesh
from shampoo3d.engines import deepspeed, dtensor, native, zero
from shampoo3d.engines.parameters import Facts
from shampoo3d.engines.reading import Stored, is_flat, read
from shampoo3d.numerics.schedule import BlockId
from shampoo3d.planning.layout import Holder, Matrix, Storage, describe
from shampoo3d.planning.plan import Plan, in_order, make_plans
from shampoo3d.planning.stagger import factored_blocks, refresh_offsets
from shampoo3d.runtime.bindings import Binding, Place
from shampoo3d.runtime.buckets import FlatSlab
from shampoo3d.runtime.team import Team
from shampoo3d.settings.distribution import Distribution
from shampoo3d.settings.hyperparams import ShampooHyperParams

Ranks = tuple[int, ...]
Checksum = tuple[float, float]


def is_trainable(param: Tensor) -> bool:
    """Whether it takes part in steps: it may get a gradient, or has one, and is not empty."""
    return param.numel() > 0 and (param.requires_grad or param.grad is not None)


class DisagreementError(ValueError):
    """Ranks of one team differ in what they hold, and all of them know it."""


@during("about the plan")
def assemble(
    groups: Sequence[Mapping[str, Any]],
    facts: Facts,
    mesh: Mesh,
    distribution: Distribution,
    known: Collection[Tensor],
    fixed: Mapping[BlockId, int],
) -> list[Team]:
    """Bind the trainable parameters, and those that are ``known`` already, and plan in each team.

    Collective: each error is raised on all ranks.

    Args:
        fixed: the owners of blocks that were planned before, which stay.

    Raises:
        DisagreementError: naming the parameter that can't be explained, or in which ranks differ, and how.
    """
    stored, tied = _read(groups, facts, mesh, distribution, known)
    by_team = _teams(stored, facts, mesh)
    matrices: dict[Ranks, list[Matrix]] = {}
    complaint = ""
    for ranks in in_order(by_team):
        # Also after a complaint, since others may wait for this rank in another team.
        matrices[ranks], differences = _matrices(ranks, by_team[ranks], groups, facts, mesh, distribution)
        complaint = complaint or differences
    _refuse(mesh, complaint)
    plans, hp = _planned(matrices, facts.hp, fixed, distribution.memory_bound, mesh), facts.hp
    places: dict[Tensor, Place] = {}
    slabs: dict[Place, FlatSlab] = {}
    for s in stored:
        place = places.setdefault(s.tensor, Place(s.tensor, s.group, groups[s.group]["precondition"]))
        if s.sharded and place not in slabs:
            slabs[place] = FlatSlab(place, hp)
    teams = []
    for plan in plans:
        members = [s for s, _ in by_team[plan.ranks]]
        bindings = [
            Binding(i, matrix, places[s.tensor], s.offset, s.part.elements)
            for i, (matrix, s) in enumerate(zip(matrices[plan.ranks], members, strict=True))
        ]
        beyond = bool(set(plan.ranks) - set(mesh.data.ranks)) and any(s.original in tied for s in members)
        flat = {b.place: slabs[b.place] for b in bindings if b.matrix.storage.sharded}
        for b in bindings:
            if b.place in flat and b.elements and not b.matrix.factored:
                flat[b.place].unfactored.append(b)
        teams.append(Team(mesh.group(plan.ranks), mesh.rank, plan, bindings, hp, beyond, flat))
    return teams


def _refuse(mesh: Mesh, complaint: str) -> None:
    """Raise on all ranks what one of them has to complain of."""
    if told := first_complaint(mesh, complaint):
        raise DisagreementError(told)


def _read(
    groups: Sequence[Mapping[str, Any]],
    facts: Facts,
    mesh: Mesh,
    distribution: Distribution,
    known: Collection[Tensor],
) -> tuple[list[Stored], dict[Tensor, Ranks]]:
    """What this rank stores of the parameters that take part, and the ranks of those that are tied across stages."""
    stored: list[Stored] = []
    tied: dict[Tensor, Ranks] = {}
    try:
        facts.learn_replaced()
        facts.count_experts()
        for model in facts.models:
            tied |= deepspeed.tied_holders(model)
        exact = distribution.tensor_parallel == "exact"
        found = read(groups, facts.originals, facts.names, mesh, tied, exact=exact)
        taking_part = (s for s in found if is_flat([s.original]) or is_trainable(s.tensor) or s.tensor in known)
        stored = [s for s in taking_part if math.prod(s.shape) > 0]
        complaint = _unknown_ties(stored, facts, tied)
    except (ValueError, RuntimeError) as error:  # perhaps on this rank only: all are told of it
        complaint = str(error)
    _refuse(mesh, complaint)
    return stored, tied


def _planned(
    matrices: Mapping[Ranks, Sequence[Matrix]],
    hp: ShampooHyperParams,
    fixed: Mapping[BlockId, int],
    memory_bound: int | None,
    mesh: Mesh,
) -> list[Plan]:
    """A plan for each team, the same on all its ranks."""
    plans: list[Plan] = []
    complaint = ""
    # Turns are dealt out over the whole run; the first rank of each team speaks for it.
    told = {
        id_: block
        for ranks, held in matrices.items()
        if ranks[0] == mesh.rank
        for id_, block in factored_blocks(held).items()
    }
    offsets = refresh_offsets(dict(ChainMap(*everyones(mesh.everyone, told))), hp)
    try:
        plans = make_plans(matrices, hp, fixed, memory_bound, offsets)
    except ValueError as error:
        complaint = str(error)
    _refuse(mesh, complaint)
    _refuse(mesh, _different_plans(plans, mesh))
    return plans


def _unknown_ties(stored: Sequence[Stored], facts: Facts, tied: Mapping[Tensor, Ranks]) -> str:
    for s in stored:
        if deepspeed.is_tied_copy(s.original) and s.original not in tied:
            return (
                f"{facts.names[s.original]!r} is tied to other pipeline stages, and only the model tells to "
                "which: pass model.parameters() itself, or model="
            )
    return ""


def _teams(stored: Sequence[Stored], facts: Facts, mesh: Mesh) -> dict[Ranks, list[tuple[Stored, int]]]:
    """What is stored by team, each with its cover, in the order of all members. Collective in the model group."""
    ends = {facts.names[s.original]: (s.holders, s.team) for s in stored if s.meets_shards}
    table: list[dict[str, tuple[Ranks, Ranks]]] = everyones(mesh.model, ends)
    found: defaultdict[Ranks, list[tuple[Stored, int]]] = defaultdict(list)
    for s in stored:
        peers = [theirs.get(facts.names[s.original], ((), ())) for theirs in table] if s.meets_shards else []
        team = tuple(sorted({*s.team, *(rank for _, ranks in peers for rank in ranks)}))
        # The shards of a divided matrix make it whole together; each holder group of an undivided one has all of it.
        shards = {rank for ranks, _ in peers for rank in ranks} if s.divided is not None else set()
        found[team].append((s, min({*s.holders, *shards}) if s.sharded else 0))
    for ranks, members in found.items():
        if ranks != mesh.data.ranks:  # these may meet from stages whose parameters come in another order
            members.sort(key=lambda member: facts.names[member[0].original])
    return dict(found)


def _matrices(
    ranks: Ranks,
    members: Sequence[tuple[Stored, int]],
    groups: Sequence[Mapping[str, Any]],
    facts: Facts,
    mesh: Mesh,
    distribution: Distribution,
) -> tuple[list[Matrix], str]:
    """The matrices of a team from what each of its ranks stores of them, or in what the ranks differ. Collective."""
    storages, parts, values = [], [], []
    for s, cover in members:
        excluded = "embedding" if s.original in facts.embeddings else ""
        if not groups[s.group]["precondition"]:
            excluded = "its parameter group has precondition=False"
        dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in (s.tensor, s.original)]
        name = facts.names[s.original]
        split = facts.split.get(s.original, ())
        storages.append(Storage(name, s.shape, dtypes[0], (), s.sharded, s.divided, excluded, dtypes[1], split))
        parts.append((cover, s.part))
        flat = dtensor.local(s.tensor).reshape(-1)
        values.append(native.checksum(flat[s.offset : s.offset + s.part.elements]))
    settings = {field.name: getattr(of, field.name) for of in (facts.hp, distribution) for field in fields(of)}
    table = everyones(mesh.group(ranks), (settings, storages, parts, values))
    matrices: list[Matrix] = []
    complaint = _differences(ranks, table)
    if complaint:
        return matrices, complaint
    for number, storage in enumerate(storages):
        holders = tuple(
            Holder(rank, row[2][number][1], row[2][number][0]) for rank, row in zip(ranks, table, strict=True)
        )
        try:
            stored = replace(storage, holders=holders).with_covers(distribution.root_copies)
            matrix = describe(stored, facts.hp, mesh.everyone.size)
        except ValueError as error:
            return matrices, str(error)
        if gaps := matrix.gaps():
            return matrices, f"the storage of {matrix.name!r} of shape {matrix.shape} can't be explained: {gaps}"
        matrices.append(matrix)
    return matrices, ""


def _differences(ranks: Ranks, table: Sequence[tuple[dict[str, Any], list[Storage], list[Any], list[Any]]]) -> str:
    """In what ranks of a team differ: settings, parameters, or the values of what they store alike."""
    settings, storages, _, _ = table[0]
    for rank, (settings_, storages_, _, _) in zip(ranks, table, strict=True):
        pairs: list[tuple[str, Any, Any]] = [(name, settings[name], settings_[name]) for name in settings]
        pairs += ((f"parameter {i}", a, b) for i, (a, b) in enumerate(zip(storages, storages_, strict=False)))
        pairs.append(("number of parameters", len(storages), len(storages_)))
        for what, first, other in pairs:
            if first != other:
                return _differ(what, ranks[0], first, rank, other)
    for number, storage in enumerate(storages):
        what = f"sum and magnitude of {storage.name}"
        first_of: dict[Any, tuple[int, Checksum]] = {}
        totals: dict[int, tuple[int, Checksum]] = {}
        for rank, (_, _, parts, values) in zip(ranks, table, strict=True):
            found = values[number]
            first_rank, first = first_of.setdefault(parts[number], (rank, found))
            if repr(found) != repr(first):  # also where they are NaN
                return _differ(what, first_rank, first, rank, found)
            cover = parts[number][0]
            start, (total, magnitude) = totals.get(cover, (rank, (0.0, 0.0)))
            totals[cover] = start, (total + found[0], magnitude + found[1])
        # Of a sharded matrix every cover has all; sums in another order differ by rounding.
        first_rank, first = next(iter(totals.values()))
        for rank, total_ in totals.values():
            if storage.sharded and abs(total_[1] - first[1]) > 1e-9 * first[1]:
                return _differ(what, first_rank, first, rank, total_)
    return ""


def _differ(what: str, first_rank: int, first: Any, rank: int, other: Any) -> str:
    return (
        f"ranks of one data-parallel group must hold the same parameters, but {what} is {_shown(first)} on rank "
        f"{first_rank} and {_shown(other)} on rank {rank}; if these ranks are no replicas of each other, give "
        "topology= or, for shards of one matrix, set tensor_model_parallel and partition_dim on the parameter"
    )


def _shown(value: Any) -> str:
    if not isinstance(value, Storage):
        return str(value)
    split = f" splits {dict(value.split)}" if value.split else ""
    return f"{value.name} {value.shape} {value.dtype}{split}"


def _different_plans(plans: Sequence[Plan], mesh: Mesh) -> str:
    """Which rank has another plan than the first of its team, and the first block in which they differ. Collective."""
    complaint = ""
    for plan in plans:
        digests = everyones(mesh.group(plan.ranks), plan.digest())
        if len(set(digests)) == 1:
            continue
        everyones_plans = everyones(mesh.group(plan.ranks), plan)
        for rank, other in zip(plan.ranks, everyones_plans, strict=True):
            pairs = zip(everyones_plans[0].blocks, other.blocks, strict=False)
            differing = next((f"{a} and {b}" for a, b in pairs if a != b), f"{len(other.blocks)} blocks")
            if other != everyones_plans[0] and not complaint:
                complaint = f"the plans of ranks {plan.ranks[0]} and {rank} differ: {differing}"
    return complaint


def flat_groups(facts: Facts) -> bool:
    """Whether an engine has put flat slices into the groups."""
    return any(is_flat(params) for params in facts.originals)


def check_shapes(shapes: Sequence[Sequence[int]] | None, params: Sequence[Tensor]) -> None:
    """Raise ValueError unless these are the shapes of the trainable parameters, as the model has them."""
    if shapes is None:
        return
    if not isinstance(shapes, Sequence) or not all(isinstance(shape, Sequence) for shape in shapes):
        raise TypeError(f"shapes must be the shapes of the trainable parameters, got {shapes!r}")
    found = [zero.shape_of(param) for param in params if param.requires_grad]
    given = [tuple(shape) for shape in shapes]
    if given != found:
        place = next((i for i, (a, b) in enumerate(zip(given, found, strict=False)) if a != b), None)
        detail = "" if place is None else f": number {place} is {given[place]}, the parameter's is {found[place]}"
        raise ValueError(f"shapes has {len(given)} entries for {len(found)} trainable parameters{detail}")
