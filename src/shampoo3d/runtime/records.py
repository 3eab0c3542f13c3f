"""Records of what the ranks of a team store: compared with each other, and joined to the storage of each matrix."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo3d.distributed.collectives import all_gather_distinct, all_gather_object
from shampoo3d.distributed.topology import Group
from shampoo3d.engines.engine import LocalShard
from shampoo3d.engines.parameters import ParameterRegistry
from shampoo3d.engines.reading import local
from shampoo3d.planning.layout import Sharding
from shampoo3d.planning.shards import Holder, Holders, Ranks, Shard
from shampoo3d.settings.distribution import Distribution

Checksum = tuple[float, float]


class Common(NamedTuple):
    """Settings and, for each matrix, its sharding without holders: all ranks of a team must have them in common.

    ``steps`` are those taken with the state that there is.
    """

    settings: dict[str, Any]
    shardings: list[Sharding]
    steps: list[int]


class Stored(NamedTuple):
    """A shard that one rank stores of a matrix, or one of each of several; ``total`` is the sum of all magnitudes."""

    shard: Shard
    fingerprint: str
    total: float


class Summary(NamedTuple):
    """Summary of the shards of one rank.

    Attributes:
        groups: its shard groups, for each kind of matrices: one, or one for each of them.
        alike: what it stores of each matrix of a kind, by the number of the kind, if that is the same shard of all.
        single: what it stores of single matrices of other kinds, if anything, by their numbers.
    """

    groups: list[tuple[int, ...]]
    alike: dict[int, Stored]
    single: dict[int, Stored]


class Record:
    """Record of what one rank stores of the matrices of a team."""

    def __init__(
        self,
        members: Sequence[tuple[LocalShard, int]],
        groups: Sequence[Mapping[str, Any]],
        registry: ParameterRegistry,
        distribution: Distribution,
        known: Mapping[Tensor, int],
    ) -> None:
        both = (registry.roles.hp, distribution)
        settings = {field.name: getattr(of, field.name) for of in both for field in fields(of)}
        steps = [0 if registry.flat else known.get(s.tensor, 0) for s, _ in members]
        self.common = Common(settings, [_sharding(s, groups, registry) for s, _ in members], steps)
        self.shards = [(number, s.shard) for s, number in members]  # each with its shard group
        self.checksums = [checksum(_values(s)) for s, _ in members]
        kinds: defaultdict[Any, list[int]] = defaultdict(list)
        for number, of in enumerate(self.common.shardings):
            kinds[of.shape, of.sharded, of.divided, of.dtype].append(number)
        self.kinds = list(kinds.values())

    @property
    def summary(self) -> Summary:
        found = Summary([], {}, {})
        for kind, numbers in enumerate(self.kinds):
            shards = {self.shards[number][1] for number in numbers}
            groups = tuple(self.shards[number][0] for number in numbers)
            alike = len(set(groups)) == 1
            found.groups.append(groups[:1] if alike else groups)
            if alike and len(shards) == 1 and next(iter(shards)).elements:
                found.alike[kind] = self._stored(numbers)
            elif len(shards) > 1 or not alike:
                own = (number for number in numbers if self.shards[number][1].elements)
                found.single.update({number: self._stored([number]) for number in own})
        return found

    def _stored(self, numbers: Sequence[int]) -> Stored:
        sums = [self.checksums[number] for number in numbers]
        fingerprint = hashlib.sha256(repr(sums).encode()).hexdigest()[:16]  # equal also where they are NaN
        return Stored(self.shards[numbers[0]][1], fingerprint, sum(magnitude for _, magnitude in sums))


def _values(s: LocalShard) -> Tensor:
    return local(s.tensor).reshape(-1)[s.offset : s.offset + s.shard.elements]


def _sharding(s: LocalShard, groups: Sequence[Mapping[str, Any]], registry: ParameterRegistry) -> Sharding:
    excluded = registry.roles.of(s.original)
    if not groups[s.group]["precondition"]:
        excluded = "its parameter group has precondition=False"
    dtype, model_dtype = (str(tensor.dtype).removeprefix("torch.") for tensor in (s.tensor, s.original))
    name, roles = registry.names[s.original], registry.roles
    split, kernel = registry.split.get(s.original, roles.fused.get(s.original, ())), s.original in roles.kernels
    return Sharding(name, s.shape, dtype, Holders(), s.sharded, s.divided, excluded, model_dtype, split, kernel)


def exchanged(group: Group, record: Record) -> tuple[list[Holders], str]:
    """Return the holders of each matrix, or how the ranks differ. Collective.

    What grows with the number of ranks is a few shards of each: one for each kind of matrices that all ranks divide
    alike, and those of single matrices that lie on few ranks.
    """
    table = all_gather_distinct(group, record.common)
    if error := _differences(group.ranks, table):
        return [], error
    summaries = dict(zip(group.ranks, all_gather_object(group, record.summary), strict=True))
    if _differ_in_values(summaries, record):
        checksums = all_gather_object(group, record.checksums)
        shards = all_gather_object(group, record.shards)
        error = _other_values(group.ranks, record, shards, checksums)
    return ([], error) if error else (_holders(summaries, record), "")


def _holders(summaries: Mapping[int, Summary], record: Record) -> list[Holders]:
    """Join what the ranks store; of one shard group of a sharded matrix those with nothing of it are left out."""
    single: defaultdict[int, dict[int, Shard]] = defaultdict(dict)
    for rank, summary in summaries.items():
        for number, stored in summary.single.items():
            single[number][rank] = stored.shard
    found: dict[int, Holders] = {}
    for kind, numbers in enumerate(record.kinds):
        sharding = record.common.shardings[numbers[0]]
        everywhere = {rank: of.alike[kind].shard for rank, of in summaries.items() if kind in of.alike}
        nothing = dict.fromkeys(summaries, Shard.whole(sharding.shape).range(0, 0))
        groups = {rank: of.groups[kind] for rank, of in summaries.items()}
        differ = any(len(of) > 1 for of in groups.values())
        shared: Holders | None = None
        for index, number in enumerate(numbers):
            if shared is None or differ or single[number]:
                here = {rank: of[index % len(of)] for rank, of in groups.items()}
                left_out = sharding.sharded and len({*here.values()}) == 1
                shards = ({} if left_out else nothing) | everywhere | single[number]
                found[number] = Holders(Holder(rank, shards[rank], here[rank]) for rank in sorted(shards))
                shared = None if single[number] else found[number]
            else:
                found[number] = shared
    return [found[number] for number in range(len(found))]


def _differ_in_values(summaries: Mapping[int, Summary], record: Record) -> bool:
    """Return whether ranks that store the same elements have other values of them, or may have."""
    fingerprints: dict[Any, str] = {}
    totals: defaultdict[int, dict[int, float]] = defaultdict(dict)
    ways: defaultdict[int, set[bool]] = defaultdict(set)  # of each kind: told as one, or matrix by matrix
    place = {number: (kind, index) for kind, of in enumerate(record.kinds) for index, number in enumerate(of)}
    for summary in summaries.values():
        told = [(True, kind, (kind, 0), of) for kind, of in summary.alike.items()]
        told += [(False, number, place[number], of) for number, of in summary.single.items()]
        for as_one, number, (kind, index), of in told:
            group = summary.groups[kind][index % len(summary.groups[kind])]
            if fingerprints.setdefault((as_one, number, group, of.shard), of.fingerprint) != of.fingerprint:
                return True
            totals[kind][group] = totals[kind].get(group, 0.0) + of.total
            ways[kind].add(as_one)
    for kind, numbers in enumerate(record.kinds):
        if record.common.shardings[numbers[0]].sharded:
            # Every shard group of a sharded matrix has all elements; sums in another order differ by rounding.
            most = max(totals[kind].values(), default=0.0)
            if any(not abs(total - most) <= 1e-9 * most for total in totals[kind].values()):
                return True
        elif len(ways[kind]) > 1:  # of replicas some tell as one what others tell matrix by matrix
            return True
    return False


def _differences(ranks: Ranks, table: Sequence[Common]) -> str:
    """Describe how ranks of a team differ in settings or in parameters."""
    first = table[0]
    for rank, row in zip(ranks, table, strict=True):
        if row is first:
            continue
        pairs: list[tuple[str, Any, Any]] = [(name, first.settings[name], row.settings[name]) for name in row.settings]
        shardings = enumerate(zip(first.shardings, row.shardings, strict=False))
        pairs += ((f"parameter {number}", one, other) for number, (one, other) in shardings)
        pairs += (
            (f"the step of {sharding.name}", one, other)
            for sharding, one, other in zip(first.shardings, first.steps, row.steps, strict=False)
        )
        pairs.append(("number of parameters", len(first.shardings), len(row.shardings)))
        for subject, one, other in pairs:
            if one != other:
                return _differ(subject, ranks[0], one, rank, other)
    return ""


def _other_values(
    ranks: Ranks,
    record: Record,
    shards: Sequence[Sequence[tuple[int, Shard]]],
    checksums: Sequence[Sequence[Checksum]],
) -> str:
    """Describe the first matrix of which ranks store different values of the same elements, and which."""
    for number, sharding in enumerate(record.common.shardings):
        first_of: dict[Any, tuple[int, Checksum]] = {}
        totals: dict[int, tuple[int, Checksum]] = {}
        subject = f"sum and magnitude of {sharding.name}"
        for rank, row, sums in zip(ranks, shards, checksums, strict=True):
            (group, shard), own = row[number], sums[number]
            first_rank, first = first_of.setdefault((group, shard), (rank, own))
            if repr(own) != repr(first):  # also where they are NaN
                return _differ(subject, first_rank, first, rank, own)
            start, (total, magnitude) = totals.get(group, (rank, (0.0, 0.0)))
            totals[group] = start, (total + own[0], magnitude + own[1])
        first_rank, first = next(iter(totals.values()))
        for rank, total_ in totals.values():
            if sharding.sharded and abs(total_[1] - first[1]) > 1e-9 * first[1]:
                return _differ(subject, first_rank, first, rank, total_)
    return ""


def _differ(subject: str, first_rank: int, first: Any, rank: int, other: Any) -> str:
    return (
        f"ranks of one data-parallel group must hold the same parameters, but {subject} is {_shown(first)} on rank "
        f"{first_rank} and {_shown(other)} on rank {rank}; if these ranks are not replicas of each other, pass "
        "topology= or, for shards of one matrix, set tensor_model_parallel and partition_dim on the parameter"
    )


def _shown(value: Any) -> str:
    if not isinstance(value, Sharding):
        return str(value)
    split = f" splits {dict(value.split)}" if value.split else ""
    return f"{value.name} {value.shape} {value.dtype}{split}"


def checksum(tensor: Tensor) -> tuple[float, float]:
    """Compute the sum and the sum of magnitudes in float64: equal on replicas."""
    values = tensor.detach().to(torch.float64)
    return values.sum().item(), values.abs().sum().item()
