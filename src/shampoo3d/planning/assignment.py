"""Assignment of blocks to owners, computed alike on every rank without communication. Pure."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shampoo3d.numerics.state_names import nothing_at_home
from shampoo3d.planning.blocks import Block, Part, equal_in_row
from shampoo3d.planning.cost import applied_cost, block_bytes, block_cost, element_bytes
from shampoo3d.planning.factors import sizes
from shampoo3d.planning.layout import Matrix
from shampoo3d.planning.loads import Loads
from shampoo3d.planning.locality import Wishes, deal, laid_along, nearest, stored
from shampoo3d.planning.plan import Plan, PlannedMatrix
from shampoo3d.planning.runs import Kind, Run, one_by_one
from shampoo3d.planning.shards import Holders, Ranks
from shampoo3d.planning.stagger import Turns, factored_blocks, refresh_turns
from shampoo3d.settings.hyperparams import ShampooHyperParams

LISTED = 2**17
"""Equal blocks times ranks up to which these blocks are looked at one by one."""


@dataclass(frozen=True)
class Draft:
    """Equal blocks of one matrix that need owners.

    Attributes:
        run: the blocks, without owners.
        among: the ranks that may own them; empty for all.
    """

    matrix: Matrix
    planned: PlannedMatrix
    run: Run
    among: Ranks

    @property
    def kind(self) -> Kind:
        return self.run.kind

    @property
    def alike(self) -> tuple[Any, ...]:
        """All that blocks have in common which may be exchanged."""
        return self.kind.cost, self.kind.elements, self.kind.bytes, self.run.copies, self.among

    @property
    def placed(self) -> tuple[Any, ...]:
        """All that drafts have in common whose blocks are stored alike, in another matrix each."""
        matrix = self.matrix
        return self.run.indices, self.kind, matrix.cuts, matrix.shape, matrix.groups, matrix.holders


def make_plan(
    matrices: Sequence[Matrix],
    ranks: Sequence[int],
    hp: ShampooHyperParams,
    fixed: Mapping[str, Sequence[int]] | None = None,
    load: Mapping[int, tuple[float, int]] | None = None,
    memory_bound: int | None = None,
    turns: Mapping[str, tuple[Turns, ...]] | None = None,
) -> Plan:
    """Give each block to one of ``ranks`` so that the estimated costs are balanced.

    Greedy, the most expensive blocks first to the least loaded ranks (Graham 1969: at most 4/3 of the optimum), ties to
    the one with less state. Of equal blocks, each is then owned by the rank that already stores most of it, as far as
    possible: this saves traffic and changes no balance. Where they are few, they are given in the order of their turns
    to refresh, so that each rank has about as many at one turn as at another; where they are many, this is so anyway.

    Args:
        matrices: those that these ranks store, in the same order on each of them.
        ranks: the global ranks that store them.
        hp: the costs depend on block sizes and refresh intervals.
        fixed: the owners of all blocks of matrices that already have some, which they keep.
        load: the cost and the bytes of state that each rank has besides this plan.
        memory_bound: bytes of state that no rank may exceed.
        turns: of all matrices with factors, by :func:`refresh_turns`; by default of those in ``matrices`` alone.

    Raises:
        ValueError: naming the block, the bytes and the bound, if no rank has room for it.
    """
    turns = refresh_turns(factored_blocks(matrices), hp) if turns is None else turns
    planned = tuple(_planned(matrix, turns) for matrix in matrices)
    resident = _resident(matrices, hp)
    loads = Loads(ranks, load or {}, [resident[rank] for rank in ranks], memory_bound)
    drafts = [
        draft
        for number, (matrix, of) in enumerate(zip(matrices, planned, strict=True))
        for draft in _drafts(matrix, of, number, hp)
    ]
    runs, cohorts = [], defaultdict[tuple[Any, ...], list[Draft]](list)
    for draft in drafts:
        if fixed and draft.matrix.name in fixed:
            runs.append(_kept(draft, fixed[draft.matrix.name], loads))
        else:
            cohorts[draft.alike].append(draft)
    for cohort in sorted(cohorts.values(), key=lambda cohort: (-cohort[0].kind.cost, -cohort[0].kind.elements)):
        few = sum(len(draft.run) for draft in cohort) * len(ranks) <= LISTED
        found = _one_by_one(cohort, loads) if few else _many(cohort, loads, hp.preconditioning_compute_steps)
        if found is None:
            raise ValueError(_no_room(cohort[0], drafts, loads))
        runs += found
    runs.sort(key=lambda run: (run.matrices, run.indices.start))
    return Plan(tuple(ranks), planned, tuple(runs), tuple(loads.resident), hp.preconditioning_compute_steps)


def _planned(matrix: Matrix, turns: Mapping[str, tuple[Turns, ...]]) -> PlannedMatrix:
    if matrix.cuts:
        return PlannedMatrix(matrix.name, matrix.cuts, (), turns[matrix.name] if matrix.axes else ())
    return PlannedMatrix(matrix.name, (), tuple(block.key for block in matrix.blocks))


def _drafts(matrix: Matrix, planned: PlannedMatrix, number: int, hp: ShampooHyperParams) -> Iterator[Draft]:
    """Describe the equal blocks of a matrix; those without factors stay on ranks that store them."""
    for part, among in [(part, ()) for part in matrix.blocks.parts] if matrix.axes else _by_storing_ranks(matrix):
        run = Run(_kind(matrix, part, hp), (number,), part.indices, 0, matrix.sharding.copies, ())
        yield Draft(matrix, planned, run, among)


def _by_storing_ranks(matrix: Matrix) -> list[tuple[Part, Ranks]]:
    """Divide the parts of a matrix without factors, whose blocks do not cross shards, by the ranks that store them."""
    storing = ((block.shape, tuple(found.ranks for found in matrix.storage.meeting(block))) for block in matrix.blocks)
    return [
        (Part(Block((a,), (b - a,)), shape), tuple(itertools.chain(*ranks)))
        for a, b, (shape, ranks) in equal_in_row(storing)
    ]


def _kind(matrix: Matrix, part: Part, hp: ShampooHyperParams) -> Kind:
    sharding, (factors, diagonals) = matrix.sharding, sizes(part.shape, matrix.axes, matrix.diagonal)
    momenta, elements = not sharding.sharded, math.prod(part.shape)
    return Kind(
        sharding.dtype,
        sharding.model_dtype,
        part.shape,
        matrix.axes,
        matrix.diagonal,
        block_bytes(part.shape, factors, hp, sharding.dtype, diagonals, momenta=momenta),
        block_cost(elements, factors, hp, diagonals),
        applied_cost(elements, factors, hp),
    )


def _kept(draft: Draft, owners: Sequence[int], loads: Loads) -> Run:
    """Give blocks to the owners that they have."""
    run, of = draft.run, draft.planned
    mine = [owners[of.number_of(index)] for index in run.indices]
    for owner, count in Counter(mine).items():
        most = loads.give(run.kind, owner, run.copies, count)
        if loads.bound is not None and most > loads.bound:
            raise ValueError(
                f"memory_bound={loads.bound} is less than the {most} bytes of state that a rank keeps with the blocks "
                f"of {draft.matrix.name!r} that rank {owner} owns already; make a new optimizer"
            )
    return replace(run, owned=one_by_one(mine))


def _one_by_one(cohort: Sequence[Draft], loads: Loads) -> list[Run] | None:
    """Give equal blocks to owners one by one, in the order of their turns; None if there is no room for one."""
    turns = [turn for draft in cohort for turn in draft.planned.turns_of(draft.run.indices)]
    kind, copies, among = cohort[0].kind, cohort[0].run.copies, cohort[0].among
    owners = [-1] * len(turns)
    for i in sorted(range(len(turns)), key=turns.__getitem__):
        owners[i] = loads.least(kind, copies, among)
        if owners[i] < 0:
            return None
        loads.give(kind, owners[i], copies)
    if kind.axes:
        storing = [counts for draft in cohort for counts in stored(draft.matrix, draft.run.indices)]
        owners = nearest(owners, storing, loads.ranks)
    rest = iter(owners)
    return [replace(draft.run, owned=one_by_one(list(itertools.islice(rest, len(draft.run))))) for draft in cohort]


def _many(cohort: Sequence[Draft], loads: Loads, every: int) -> list[Run] | None:
    """Give equal blocks to owners by counting how many each is to have; None if there is no room for all."""
    kind, copies, among = cohort[0].kind, cohort[0].run.copies, cohort[0].among
    shares = loads.fill(kind, sum(len(draft.run) for draft in cohort), copies, among)
    if shares is None:
        return None
    if not kind.axes:  # those of `among` all store the blocks
        return deal([(draft.run, [(0, len(draft.run), next(iter(shares)))]) for draft in cohort], shares)
    stacks: defaultdict[tuple[Any, ...], list[Draft]] = defaultdict(list)
    for draft in cohort:
        stacks[draft.placed].append(draft)
    wishes: list[Wishes] = []
    for drafts in stacks.values():
        run = drafts[0].run
        if len(drafts) > 1:
            turns = tuple(draft.planned.turn_of(run.indices.start) for draft in drafts)
            numbers = tuple(number for draft in drafts for number in draft.run.matrices)
            run = replace(run, matrices=numbers, turns=every, first_turns=turns)
        wishes += laid_along(run, drafts[0].matrix)
    return deal(wishes, {rank: shares[rank] for rank in loads.ranks})


def _no_room(draft: Draft, drafts: Sequence[Draft], loads: Loads) -> str:
    run, of, kinds = draft.run, draft.planned, ((draft.kind, len(draft.run)) for draft in drafts)
    key = of.blocks[of.number_of(run.indices.start)].key
    return (
        f"memory_bound={loads.bound} leaves no rank for block {key} of {of.name!r}: it has {run.kind.bytes} bytes of "
        f"state, and all blocks together {sum(kind.bytes * count for kind, count in kinds)} on {len(loads.ranks)} "
        f"ranks, which keep {min(loads.resident)} to {max(loads.resident)} bytes of momenta besides; take a smaller "
        "block_size or more ranks"
    )


def _resident(matrices: Sequence[Matrix], hp: ShampooHyperParams) -> Counter[int]:
    """Count the bytes of momenta of the elements of sharded matrices that each rank stores."""
    alike: Counter[tuple[Holders, int]] = Counter()
    for matrix in (matrix for matrix in matrices if matrix.sharding.sharded):
        # A flat slice has room for matrices of both kinds, unless those with factors have no state there.
        bare = matrix.factored and nothing_at_home(hp)
        alike[matrix.holders, 0 if bare else element_bytes(hp, matrix.dtype, factored=False)] += 1
    totals: Counter[int] = Counter()
    for (holders, size), count in alike.items():
        for holder in holders:
            totals[holder.rank] += holder.shard.elements * size * count
    return totals


def make_plans(
    held: Mapping[Ranks, Sequence[Matrix]],
    hp: ShampooHyperParams,
    fixed: Mapping[str, Sequence[int]] | None = None,
    memory_bound: int | None = None,
    turns: Mapping[str, tuple[Turns, ...]] | None = None,
) -> list[Plan]:
    """Make a plan for each set of ranks that store the same matrices, the larger sets first.

    A set is balanced on top of the plans of the sets that contain it, which all its ranks know. (Ranks that share a
    tied weight with another stage are such a set; all sets are in one order everywhere, so no two wait for each other.)
    By default the ``turns`` are those of all blocks in ``held``.
    """
    plans: list[Plan] = []
    if turns is None:
        turns = refresh_turns(factored_blocks(itertools.chain.from_iterable(held.values())), hp)
    for ranks in in_order(held):
        known = [(plan.load(), plan.bytes()) for plan in plans if set(ranks) <= set(plan.ranks)]
        load = {rank: (sum(cost[rank] for cost, _ in known), sum(size[rank] for _, size in known)) for rank in ranks}
        plans.append(make_plan(held[ranks], ranks, hp, fixed, load, memory_bound, turns))
    return plans


def in_order(teams: Iterable[Ranks]) -> list[Ranks]:
    """Sort sets of ranks into the order in which all their members meet: the larger first."""
    return sorted(teams, key=lambda ranks: (-len(ranks), ranks))
