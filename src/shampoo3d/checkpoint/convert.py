"""Conversion of what DeepSpeed's engine or ``torch.save`` wrote into a folder that loads into any layout."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from shampoo3d.checkpoint.folder import write
from shampoo3d.checkpoint.manifest import CheckpointError, Manifest, Parameter, saved_settings
from shampoo3d.checkpoint.reading import load_tensors_only
from shampoo3d.checkpoint.state import FLAT_NAMES
from shampoo3d.checkpoint.tensors import WEIGHT, Held, among_equals_of, merge_chunks, stacked
from shampoo3d.distributed.topology import ParallelGroups
from shampoo3d.engines.engine_files import RankState, checkpoint_of, rank_states
from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.blocks import Block

Parts = dict[Block, Tensor]
Found = tuple[str, str, Shape, Block, Tensor]
"""Names of a matrix and of a tensor of it, its shape, a rectangle of it, the values."""


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Manifest:
    """Write a folder from a DeepSpeed checkpoint of ZeRO stage 0 to 3, or a saved ``state_dict()``, in one process.

    At stage 0, and in a ``state_dict()``, there are no weights: the folder loads with ``weights=False``.

    Raises:
        CheckpointError: naming what is damaged, missing or contradictory; nothing is written.
    """
    ranks = _read(Path(source))
    described = _described(ranks)
    tensors = _collected(ranks, described.parameters)
    _check_complete(tensors, described, Path(source))
    write(ParallelGroups.alone(), target, tensors, described)
    return described


def describe(source: str | os.PathLike[str]) -> Manifest:
    """Return the manifest that this checkpoint would have after conversion.

    Raises:
        CheckpointError: as :func:`convert`.
    """
    return _described(_read(Path(source)))


def _read(source: Path) -> list[RankState]:
    try:
        return [_saved(source)] if source.is_file() else rank_states(checkpoint_of(source))
    except (ValueError, OSError) as error:
        raise CheckpointError(str(error)) from None


def _saved(path: Path) -> RankState:
    """Read a file that has a ``state_dict()``, alone or as "optimizer" among others."""
    saved = load_tensors_only(path, f"{path}")
    state = saved.get("optimizer", saved) if isinstance(saved, dict) else None
    if not isinstance(state, dict) or "shampoo" not in state:
        raise CheckpointError(f"{path} has no state of 3D-Shampoo")
    return RankState(path, state, [])


def _described(ranks: Sequence[RankState]) -> Manifest:
    parameters: dict[str, Parameter] = {}
    for rank in ranks:
        try:
            described = {name: Parameter.from_json(of) for name, of in rank.state["shampoo"]["parameters"].items()}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{rank.path} is damaged: its parameters are not described: {error}") from None
        for name, of in described.items():
            if parameters.setdefault(name, of) != of:
                raise CheckpointError(f"{rank.path} has {name!r} as {of}, and another file as {parameters[name]}")
    first = ranks[0].state
    groups = tuple(saved_settings(group) for group in first["param_groups"])
    shampoo = first["shampoo"]
    return Manifest(parameters, (), dict(shampoo["hyperparams"]), groups, int(shampoo["skipped_steps"]), {})


def _collected(ranks: Sequence[RankState], parameters: Mapping[str, Parameter]) -> list[Held]:
    sizes: dict[tuple[str, str], Shape] = {}
    parts: dict[tuple[str, str], Parts] = {}
    for rank in ranks:
        for name, kind, size, block, values in _found(rank, parameters):
            sizes[name, kind] = size
            known = parts.setdefault((name, kind), {}).setdefault(block, values)
            if known is not values and not torch.equal(known, values):
                raise CheckpointError(
                    f"{rank.path} has another {kind} of {name!r} than a file before it: ranks call different matrices "
                    "(experts?) by one name; use save_checkpoint instead"
                )
    return [Held(*key, sizes[key], tuple(merge_chunks(of.items()))) for key, of in parts.items()]


def _found(rank: RankState, parameters: Mapping[str, Parameter]) -> list[Found]:
    try:
        return list((_sliced if "slices" in rank.state["shampoo"] else _whole)(rank, parameters))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{rank.path} is damaged: {type(error).__name__}: {error}") from None


def _whole(rank: RankState, parameters: Mapping[str, Parameter]) -> Iterator[Found]:
    """Yield from a file that has the complete state of its parameters, by number."""
    names = rank.state["shampoo"]["names"]
    for number, state in rank.state["state"].items():
        for key, tensors in state.items():
            if key != "step":
                name = names[number]
                yield from _of_block(name, parameters[name], Block.of_key(key), tensors)


def _sliced(rank: RankState, parameters: Mapping[str, Parameter]) -> Iterator[Found]:
    """Yield from a file that has slices, and factors of some blocks."""
    described = rank.state["shampoo"]
    for name, where in described["slices"].items():
        number, size = where["tensor"], parameters[name].merged
        state = rank.state["state"][number]
        flats = {kind: state[flat] for kind, flat in FLAT_NAMES.items() if kind in where["momenta"]}
        shift = where.get("shift", 0)  # which the first versions did not know
        for start, shape, offset, strides in where["pieces"]:
            box = Block(tuple(start), tuple(shape))
            for kind, flat in (flats | {WEIGHT: rank.masters[number]}).items():
                first = flat.storage_offset() + offset + (0 if kind == WEIGHT else shift)
                yield name, kind, size, box, flat.as_strided(box.shape, tuple(strides), first)
    for name, blocks in described["factors"].items():
        for key, tensors in blocks.items():
            yield from _of_block(name, parameters[name], Block.of_key(key), tensors)


def _of_block(name: str, of: Parameter, block: Block, tensors: Mapping[str, Tensor]) -> Iterator[Found]:
    for kind, values in tensors.items():
        if kind[0] in "ALPQ":
            yield name, *stacked(block, kind, values, *among_equals_of(of.cuts)[block])
        else:
            yield name, kind, of.merged, block, values


def _check_complete(tensors: Sequence[Held], described: Manifest, source: Path) -> None:
    for of in tensors:
        stored = sum(chunk.block.elements for chunk in of.chunks)
        total = torch.Size(of.size).numel()
        if stored != total:
            raise CheckpointError(f"{source} has {stored} of {total} elements of {of.key}: files of ranks are missing")
    if missing := described.parameters.keys() - {of.name for of in tensors}:
        raise CheckpointError(f"{source} has no state of {sorted(missing)[:5]}")
