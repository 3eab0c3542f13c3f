"""State of matrices in flat slices: each rank saves and loads its own, as in DeepSpeed's files."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from shampoo3d.checkpoint.state import ParamState, copy_into, owned_factors
from shampoo3d.numerics.state_names import momenta_names
from shampoo3d.planning.shards import Shard
from shampoo3d.runtime.bindings import Binding
from shampoo3d.runtime.team import Team


def own_state(teams: Sequence[Team], numbers: Mapping[Tensor, int]) -> dict[str, Any]:
    """Collect the state that only this rank keeps of matrices in flat slices, with fingerprints of the layout.

    "slices" describes the storage: for each matrix the number of the flat tensor, -1 if it is not in the groups, the
    names of its momenta, by how much these are shifted against the weights, and for each rectangle start, shape, offset
    and strides. Only the first of several shard groups is described.
    """
    slices: dict[str, Any] = {}
    for team in teams:
        for binding in (binding for binding in team.bindings if binding.matrix.sharded):
            pieces = (p for shard in parts_of(team, binding, everything=False) for p in binding.matrix.pieces(shard))
            rectangles = [(p.box.start, p.box.shape, binding.offset + p.offset, p.strides) for p in pieces]
            if rectangles:
                momenta = momenta_names(team.hp, binding.matrix.factored)
                number = numbers.get(binding.group_tensor.tensor, -1)
                shift = team.shard_buckets[binding.group_tensor].shift(binding)
                where = {"tensor": number, "pieces": rectangles, "momenta": momenta, "shift": shift}
                slices[binding.matrix.name] = where
    return {"layout": layout_of(teams), "factors": owned_factors(teams), "slices": slices}


def parts_of(team: Team, binding: Binding, *, everything: bool) -> Iterator[Shard]:
    """Yield this rank's shard of a matrix: always with ``everything``, else only in the first shard group."""
    holders = binding.matrix.holders
    if everything or holders.shard_group_of(team.rank) == first_shard_group(binding):
        yield binding.shard


def first_shard_group(binding: Binding) -> int:
    """Return the number of the first shard group."""
    holders = binding.matrix.holders
    return min(holders.shard_groups)


def layout_of(teams: Sequence[Team]) -> list[str]:
    """Return fingerprints of the plans, since a rank's own state fits no other layout."""
    return [team.plan.digest() for team in teams]


def check_own(
    teams: Sequence[Team],
    live: Mapping[Tensor, ParamState],
    saved: Mapping[str, Any],
    slices: Mapping[Tensor, ParamState],
) -> None:
    """Raise unless the state that :func:`own_state` and :func:`live_state` returned belongs to this layout.

    Raises:
        ValueError: naming what differs.
    """
    if saved["layout"] != layout_of(teams):
        raise ValueError(
            "the loaded state was saved under another layout (number of ranks, ZeRO stage, block_size or parameters): "
            f"plans {saved['layout']}, here {layout_of(teams)}"
        )
    for tensor, state in slices.items():
        actual = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
        wanted = {name: tuple(value.shape) for name, value in live[tensor].items() if isinstance(value, Tensor)}
        if actual != wanted:
            raise ValueError(f"the loaded state of a slice of {tensor.numel()} elements holds {actual}, not {wanted}")


def load_own(teams: Sequence[Team], live: dict[Tensor, ParamState], saved: Mapping[str, Any], slices: Any) -> None:
    """Load the state that :func:`own_state` and :func:`live_state` returned on this rank, already checked."""
    for tensor, state in slices.items():
        live[tensor]["step"] = int(state["step"])
        copy_into({name: value for name, value in live[tensor].items() if name != "step"}, state)
    for name, blocks in owned_factors(teams).items():
        for key, views in blocks.items():
            copy_into(views, saved["factors"][name][key])
