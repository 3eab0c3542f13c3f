"""State by parameter and block: gathered from a team, and loaded by the ranks that store and own it.

The blocks of a checkpoint are those of the logical matrix, so that it does not depend on the layout it came from.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from shampoo3d.checkpoint.manifest import Parameter
from shampoo3d.distributed.collectives import Communicator
from shampoo3d.numerics.momenta import kept_dtype
from shampoo3d.numerics.preconditioner import factor_shapes, state_shapes
from shampoo3d.numerics.state_names import momenta_names
from shampoo3d.planning.blocks import Block
from shampoo3d.planning.grid import describe
from shampoo3d.planning.layout import Matrix
from shampoo3d.planning.routes import BUCKET_ELEMENTS, transfers_of
from shampoo3d.planning.shards import Holder, Holders, Piece, Shard
from shampoo3d.runtime.bindings import Binding, state_dtype
from shampoo3d.runtime.team import Team
from shampoo3d.settings.hyperparams import ShampooHyperParams
from shampoo3d.settings.validation import check_kind

ParamState = dict[str, Any]
"""``{"step": t, "<start>:<stop>,...": {"momentum": ..., "L0": ..., "P0": ...}}``, one entry per block."""

FLAT_NAMES = {
    "momentum": "exp_avg",
    "gradient_average": "exp_avg",
    "graft_accumulator": "exp_avg_sq",
    "graft_momentum": "graft_momentum",
}
"""Names of the state of flat slices, which are those that DeepSpeed expects."""
_FLAT = {*FLAT_NAMES.values()}
_BLOCK = re.compile(r"\d+:\d+(,\d+:\d+)*")


def own(state: Mapping[Any, Any], *, flat: bool) -> ParamState:
    """Return the entries of a parameter's state that are ours; ``flat``: those of a flat slice."""
    return {name: value for name, value in state.items() if _is_own(name, flat)}


def foreign(state: Mapping[Any, Any], *, flat: bool) -> dict[Any, Any]:
    """Return the entries that a wrapper has put into a parameter's state, which are left to it."""
    return {name: value for name, value in state.items() if not _is_own(name, flat)}


def _is_own(name: Any, flat: bool) -> bool:
    if name == "step" or (flat and name in _FLAT):
        return True
    return isinstance(name, str) and _BLOCK.fullmatch(name) is not None


def live_state(teams: Sequence[Team]) -> dict[Tensor, ParamState]:
    """Return the state on this rank of each tensor of the groups, in views of the buckets and stacks.

    For flat slices it is the state of elements, in the layout of the slice; their factors are in
    :func:`owned_factors`.
    """
    state: dict[Tensor, ParamState] = {
        group_tensor.tensor: {"step": 0} for team in teams for group_tensor in team.group_tensors
    }
    for team in teams:
        for group_tensor, flat in team.shard_buckets.items():
            kept = flat.tensors_of(group_tensor).items()
            tensors = {FLAT_NAMES[name]: tensor for name, tensor in kept if tensor.numel()}
            state[group_tensor.tensor] |= tensors
        for bucket in team.stacked_buckets:
            for binding, fragment in bucket.members:
                state[binding.group_tensor.tensor].setdefault(fragment.box.key, {}).update(bucket.state(fragment))
        for binding, block, views, _ in factors_of(team):
            if not binding.matrix.sharded:
                state[binding.group_tensor.tensor].setdefault(block.key, {}).update(views)
    return state


def owned_factors(teams: Sequence[Team]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Return the factors that this rank owns of matrices in flat slices, by parameter and block."""
    factors: defaultdict[str, dict[str, dict[str, Tensor]]] = defaultdict(dict)
    for team in teams:
        for binding, block, views, _ in factors_of(team):
            if binding.matrix.sharded:
                factors[binding.matrix.name][block.key] = views
    return dict(factors)


def factors_of(team: Team) -> Iterator[tuple[Binding, Block, dict[str, Tensor], bool]]:
    """Yield each block whose factors are kept here, with views of its state; True if another rank owns it."""
    for batch in team.batches:
        tensors = batch.stack.tensors()
        for row, slot in enumerate(batch.slots):
            named = {name: tensor[row] for name, tensor in tensors.items()}
            yield team.binding_of(slot), team.block_of(slot), named, batch.guests


def logical(matrix: Matrix, hp: ShampooHyperParams) -> Matrix:
    """Return the same matrix as one process would store it: its blocks are those of a checkpoint."""
    whole = Holders([Holder(0, Shard.whole(matrix.shape))])
    alone = replace(matrix.sharding, holders=whole, sharded=False, divided=None)
    return describe(alone, replace(hp, fair_blocks=False), 1)


def complete_state(team: Team, steps: Mapping[Tensor, int]) -> dict[Tensor, ParamState]:
    """Gather copies of the state of every block of a team. Collective in the team."""
    communicator = Communicator(team.rank, team.group, team.device)
    momenta = _whole_momenta(team, communicator)
    factors = _all_factors(team, communicator)
    whole: dict[Tensor, ParamState] = {}
    for binding in team.bindings:
        state: ParamState = {"step": steps[binding.group_tensor.tensor]}
        for block in canonical_blocks(binding.matrix, team.hp):
            tensors = {name: tensor[block.slices].clone() for name, tensor in momenta[binding.number].items()}
            state[block.key] = tensors | factors.get((binding.number, block.key), {})
        whole[binding.group_tensor.tensor] = state
    return whole


def canonical_blocks(matrix: Matrix, hp: ShampooHyperParams) -> Sequence[Block]:
    """Return the blocks in a checkpoint: a preconditioned matrix's own, else those that one process would have."""
    return matrix.blocks if matrix.axes else logical(matrix, hp).blocks


def _whole_momenta(team: Team, communicator: Communicator) -> dict[int, dict[str, Tensor]]:
    """Gather the momenta of each logical matrix, merged, from the homes of its elements."""
    names = [momenta_names(team.hp, binding.matrix.factored) for binding in team.bindings]
    # Adam in eigenbases needs nothing at the homes.
    items = [(home, matrix, piece) for home, matrix, piece in _homes(team) if names[matrix]]
    here = _momenta_here(team)
    whole = {binding.number: _merged_zeros(binding, team.hp) for binding in team.bindings}
    sizes = [(home, piece.box.elements * len(names[matrix])) for home, matrix, piece in items]
    matrices = [matrix for _, matrix, _ in items]
    for n, flat in _shared(team, communicator, matrices, sizes, lambda n: torch.stack(here(*items[n][1:]))):
        _, matrix, piece = items[n]
        for name, values in zip(names[matrix], flat.view(len(names[matrix]), *piece.box.shape), strict=True):
            whole[matrix][name][piece.box.slices] = values
    return whole


def _homes(team: Team) -> Iterator[tuple[int, int, Piece]]:
    """Yield the rank that keeps the momenta of each piece, the matrix's number and the piece."""
    for binding in team.bindings:
        if binding.matrix.sharded:
            for holder in binding.matrix.holders:
                yield from ((holder.rank, binding.number, piece) for piece in binding.matrix.pieces(holder.shard))
    for transfer in transfers_of(team.plan, [binding.matrix for binding in team.bindings]):
        if not team.bindings[transfer.matrix].matrix.sharded:
            yield transfer.home, transfer.matrix, transfer.piece


def _momenta_here(team: Team) -> Callable[[int, Piece], list[Tensor]]:
    """Find the momenta of a piece of a matrix that are at home on this rank."""
    stacked = {
        (binding.number, fragment.box.key): (bucket, fragment)
        for bucket in team.stacked_buckets
        for binding, fragment in bucket.members
    }

    def here(matrix: int, piece: Piece) -> list[Tensor]:
        binding = team.bindings[matrix]
        if binding.matrix.sharded:
            return [*team.shard_buckets[binding.group_tensor].state(binding, piece).values()]
        bucket, fragment = stacked[matrix, piece.box.key]
        return [*bucket.state(fragment).values()]

    return here


def _merged_zeros(binding: Binding, hp: ShampooHyperParams) -> dict[str, Tensor]:
    """Allocate zeros for the momenta of a logical matrix, merged."""
    stored = binding.group_tensor.stored
    shape, dtype = binding.matrix.merged, state_dtype(stored.dtype)
    return {
        name: torch.zeros(shape, dtype=kept_dtype(name, hp, dtype), device=stored.device)
        for name in momenta_names(hp, binding.matrix.factored)
    }


def _all_factors(team: Team, communicator: Communicator) -> dict[tuple[int, str], dict[str, Tensor]]:
    """Gather all factors, by matrix and block."""
    local = {(binding.number, block.key): views for binding, block, views, _ in factors_of(team)}
    planned = [(team.plan.place(slot)[0], block) for slot, block in enumerate(team.plan.blocks) if block.axes]
    shapes = [factor_shapes(block.shape, block.axes, team.hp, block.diagonal) for _, block in planned]

    def mine(n: int) -> Tensor:
        matrix, block = planned[n]
        return torch.cat([tensor.reshape(-1) for tensor in local[matrix, block.key].values()])

    factors = {}
    counts = [[shape.numel() for shape in named.values()] for named in shapes]
    sizes = [(block.owner, sum(count)) for (_, block), count in zip(planned, counts, strict=True)]
    for n, flat in _shared(team, communicator, [matrix for matrix, _ in planned], sizes, mine):
        matrix, block = planned[n]
        pieces = zip(shapes[n].items(), flat.split_with_sizes(counts[n]), strict=True)
        factors[matrix, block.key] = {
            name: piece.view(shape).to(kept_dtype(name, team.hp, flat.dtype), copy=True)
            for (name, shape), piece in pieces
        }
    return factors


def _shared(
    team: Team,
    communicator: Communicator,
    matrices: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    mine: Callable[[int], Tensor],
) -> Iterator[tuple[int, Tensor]]:
    """Gather the items of all ranks: yield the number of each item with its flat tensor.

    Item n belongs to ``matrices[n]``, with the rank that has it and its elements in ``sizes[n]``; ``mine(n)`` returns
    the values of an item of this rank.
    """
    dtypes = [state_dtype(team.bindings[matrix].group_tensor.tensor.dtype) for matrix in matrices]
    for dtype in dict.fromkeys(dtypes):
        numbers = [n for n, of in enumerate(dtypes) if of == dtype]

        def chosen(index: int, numbers: Sequence[int] = numbers) -> Tensor:
            return mine(numbers[index])

        for arrived in communicator.all_gather("state", [sizes[n] for n in numbers], chosen, dtype, BUCKET_ELEMENTS):
            yield from ((numbers[index], flat) for index, flat in arrived.items())


def check_loadable(binding: Binding, saved: ParamState, hp: ShampooHyperParams) -> None:
    """Raise unless ``saved`` has exactly the blocks of this parameter, with the right tensors in each.

    Raises:
        ValueError: naming the parameter and what is missing, left over or of another shape.
    """
    matrix = binding.matrix
    blocks = {block.key: block for block in canonical_blocks(matrix, hp)}
    keys = set(saved) - {"step"}
    if keys != set(blocks):
        missing, extra = sorted(set(blocks) - keys), sorted(keys - set(blocks))
        raise ValueError(
            f"the loaded state of {matrix.name!r} has {len(keys)} blocks where the optimizer has {len(blocks)}: "
            f"missing {missing[:3]}, unknown {extra[:3]}; it was saved with another block_size or shape, other splits "
            f"(splits={{{matrix.name!r}: 1}} if it was one matrix), or not by all ranks"
        )
    if not isinstance(saved.get("step"), int):
        raise ValueError(f"the loaded state of {matrix.name!r} has no step count: 'step' is {saved.get('step')!r}")
    for key, block in blocks.items():
        shapes = state_shapes(block.shape, matrix.axes, hp, matrix.diagonal)
        wanted = {field: tuple(shape) for field, shape in shapes.items()}
        check_kind(f"the loaded state of block {key} of {matrix.name!r}", saved[key], Mapping, "a dict of tensors")
        for field, tensor in saved[key].items():
            check_kind(f"{field} in the loaded state of block {key} of {matrix.name!r}", tensor, Tensor, "a tensor")
        actual = {field: tuple(tensor.shape) for field, tensor in saved[key].items()}
        if actual != wanted:
            raise ValueError(
                f"the loaded state of block {key} of {matrix.name!r} holds {actual} where {wanted} is needed: saved "
                "with other hyperparams, such as graft_type, start_preconditioning_step or precondition"
            )
        bad = [field for field, tensor in saved[key].items() if not tensor.isfinite().all()]
        if bad and hp.nonfinite_gradient != "ignore":
            raise ValueError(
                f"{bad[0]} in the loaded state of block {key} of {matrix.name!r} is NaN or infinite, which is allowed "
                "only with nonfinite_gradient='ignore'"
            )


def load(teams: Sequence[Team], live: dict[Tensor, ParamState], saved: Mapping[Tensor, ParamState]) -> None:
    """Copy complete state, already checked, into the state on this rank."""
    for team in teams:
        for binding in team.bindings:
            if binding.group_tensor.tensor in saved:
                live[binding.group_tensor.tensor]["step"] = saved[binding.group_tensor.tensor]["step"]
        for binding, block, views, _ in factors_of(team):
            if binding.group_tensor.tensor in saved:
                copy_into(views, saved[binding.group_tensor.tensor][block.key])
        _load_momenta(team, saved)


def carry(
    live: dict[Tensor, ParamState], owned: Mapping[Tensor, ParamState], before: Sequence[Team], now: Sequence[Team]
) -> None:
    """Copy the state of the teams before into those now; owners and homes of bound parameters do not change."""
    factors = owned_factors(now)
    kept = {of.matrix.name for team in before for of in team.bindings if of.group_tensor.tensor in owned}
    for name, blocks in owned_factors(before).items():
        for key, views in factors.get(name, {}).items() if name in kept else ():
            copy_into(views, blocks[key])
    for tensor, state in owned.items():
        for key, value in state.items():
            if key == "step":
                live[tensor]["step"] = value
            elif isinstance(value, Tensor):
                live[tensor][key].copy_(value)
            else:
                copy_into(live[tensor][key], value)


def _load_momenta(team: Team, saved: Mapping[Tensor, ParamState]) -> None:
    whole: dict[int, dict[str, Tensor]] = {}
    for binding in team.bindings:
        if binding.group_tensor.tensor in saved:
            state = saved[binding.group_tensor.tensor]
            whole[binding.number] = _merged_zeros(binding, team.hp)
            for block in canonical_blocks(binding.matrix, team.hp):
                for name, tensor in whole[binding.number].items():
                    tensor[block.slices] = state[block.key][name]
    for bucket in team.stacked_buckets:
        for binding, fragment in bucket.members:
            if binding.number in whole:
                for name, values in bucket.state(fragment).items():
                    values.copy_(whole[binding.number][name][fragment.box.slices])
    for binding in team.bindings:
        if binding.number in whole and binding.matrix.sharded:
            flat = team.shard_buckets[binding.group_tensor]
            for piece in binding.matrix.pieces(binding.shard):
                for name, values in flat.state(binding, piece).items():
                    values.copy_(whole[binding.number][name][piece.box.slices])


def copy_into(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(values[name])


def parameters_of(teams: Sequence[Team], steps: Mapping[Tensor, int]) -> dict[str, Any]:
    """Describe the bound matrices, in plain data."""
    bindings = (binding for team in teams for binding in team.bindings)
    return {b.matrix.name: asdict(Parameter.of(b.matrix, steps[b.group_tensor.tensor])) for b in bindings}
