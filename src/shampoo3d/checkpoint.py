"""State keyed by parameter and block: made whole over the replicas, and taken back by whoever owns what."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shampoo3d.exchange import share
from shampoo3d.holdings import Binding, Replicas, state_dtype
from shampoo3d.hyperparams import ShampooHyperParams, check_group
from shampoo3d.preconditioner import state_shapes

ParamState = dict[str, Any]
"""``{"step": t, "<start>:<stop>,...": {"momentum": ..., "L0": ..., "P0": ...}}``, one entry per block."""


def live_state(replicas: Sequence[Replicas]) -> dict[Tensor, ParamState]:
    """For each parameter, its blocks that this rank owns; the tensors are views of the stacks."""
    state: dict[Tensor, ParamState] = {}
    for shared in replicas:
        for binding in shared.bindings:
            state[binding.param] = {"step": 0}
        for batch in shared.batches:
            tensors = batch.stack.tensors()
            for member in batch.members:
                key = shared.plan.blocks[member.slot].key
                state[member.binding.param][key] = {name: tensor[member.row] for name, tensor in tensors.items()}
    return state


def complete_state(
    rank: int, replicas: Sequence[Replicas], live: Mapping[Tensor, ParamState], hp: ShampooHyperParams
) -> dict[Tensor, ParamState]:
    """The state of every block, whoever owns it, in copies. Collective among replicas."""
    whole: dict[Tensor, ParamState] = {}
    for shared in replicas:
        whole |= {binding.param: {"step": live[binding.param]["step"]} for binding in shared.bindings}
        shapes = [state_shapes(block.shape, binding.matrix.rank, hp) for binding, block in shared.local]
        for dtype in dict.fromkeys(state_dtype(binding.param.dtype) for binding in shared.bindings):
            slots = [s for s, (b, _) in enumerate(shared.local) if state_dtype(b.param.dtype) == dtype]
            sizes = {slot: sum(shape.numel() for shape in shapes[slot].values()) for slot in slots}
            arrivals = share(rank, shared, sizes, partial(_flat, shared, live), dtype)
            for slot, flat in (item for arrived in arrivals for item in arrived.items()):
                pieces = flat.split_with_sizes([shape.numel() for shape in shapes[slot].values()])
                named = zip(shapes[slot].items(), pieces, strict=True)
                param, key = shared.local[slot][0].param, shared.plan.blocks[slot].key
                whole[param][key] = {name: piece.view(shape).clone() for (name, shape), piece in named}
    return whole


def _flat(shared: Replicas, live: Mapping[Tensor, ParamState], slot: int) -> Tensor:
    tensors: dict[str, Tensor] = live[shared.local[slot][0].param][shared.plan.blocks[slot].key]
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def check_loadable(binding: Binding, saved: ParamState, hp: ShampooHyperParams) -> None:
    """Raise unless ``saved`` has exactly the blocks of this parameter, with the right tensors in each.

    Raises:
        ValueError: naming the parameter and what is missing, left over or of another shape.
    """
    name = binding.matrix.name
    blocks = {a.key: b for a, b in zip(binding.matrix.blocks, binding.matrix.local_blocks, strict=True)}
    found = set(saved) - {"step"}
    if found != set(blocks):
        missing, extra = sorted(set(blocks) - found), sorted(found - set(blocks))
        raise ValueError(
            f"the loaded state of {name!r} has {len(found)} blocks where the optimizer has {len(blocks)}: missing "
            f"{missing[:3]}, unknown {extra[:3]}; it was saved with another block_size or shape, or not by all ranks"
        )
    if not isinstance(saved.get("step"), int):
        raise ValueError(f"the loaded state of {name!r} has no step count: 'step' is {saved.get('step')!r}")
    for key, block in blocks.items():
        wanted = {field: tuple(shape) for field, shape in state_shapes(block.shape, binding.matrix.rank, hp).items()}
        given = {field: tuple(tensor.shape) for field, tensor in saved[key].items()}
        if given != wanted:
            raise ValueError(
                f"the loaded state of block {key} of {name!r} holds {given} where {wanted} is needed: saved with "
                "other hyperparams, such as graft_type, start_preconditioning_step or precondition"
            )


def load(replicas: Sequence[Replicas], live: dict[Tensor, ParamState], saved: Mapping[Tensor, ParamState]) -> None:
    """Copy saved state, already checked, into the blocks that this rank owns."""
    for shared in replicas:
        for binding in shared.bindings:
            if binding.param in saved:
                live[binding.param]["step"] = saved[binding.param]["step"]
        for member in (member for batch in shared.batches for member in batch.members):
            param = member.binding.param
            if param in saved:
                key = shared.plan.blocks[member.slot].key
                for name, tensor in live[param][key].items():
                    tensor.copy_(saved[param][key][name])


def loaded_groups(current: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The current parameters with the saved settings.

    Raises:
        TypeError, ValueError: naming the group that differs in its number of parameters, or a setting that is invalid.
    """
    if len(current) != len(saved):
        raise ValueError(f"the loaded state has {len(saved)} parameter groups, the optimizer has {len(current)}")
    groups = []
    for number, (ours, theirs) in enumerate(zip(current, saved, strict=True)):
        if len(ours["params"]) != len(theirs["params"]):
            raise ValueError(
                f"group {number} of the loaded state has {len(theirs['params'])} parameters, "
                f"the optimizer's has {len(ours['params'])}"
            )
        kept: dict[str, Any] = {name: ours[name] for name in ("params", "param_names") if name in ours}
        group: dict[str, Any] = {**ours, **theirs, **kept}
        check_group(group)
        groups.append(group)
    return groups
