"""Storage of a model's parameters on the ranks of a layout."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from shampoo3d.cli.train.settings import RunError
from shampoo3d.planning.layout import Sharding
from shampoo3d.planning.shards import Holder, Holders, Ranks, Shard

from .builtin import Parameter
from .experts import check_experts, expert_of, held_by, parameter_groups
from .request import Request

COLUMNS = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "query", "key", "value", "qkv", "query_key_value", "c_attn", "in_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "w1", "w3", "dense_h_to_4h", "intermediate.dense"),
)
ROWS = ("o_proj", "out_proj", "down_proj", "c_proj", "fc2", "w2", "dense_4h_to_h", "output.dense", "attn.proj")
"""Linear layers whose outputs Megatron divides, by the ends of their names, and those whose inputs it divides."""


def stored(request: Request, parameters: Sequence[Parameter]) -> dict[Ranks, list[Sharding]]:
    """Describe the storage of all parameters, by the ranks that share them: those of a stage, or replicas of experts.

    Raises:
        RunError: saying what cannot be divided.
    """
    if request.expert > 1:
        check_experts(parameters, request.expert, stacked=request.fsdp)
    found: dict[Ranks, list[Sharding]] = {}
    for stage, members in enumerate(stages(parameters, request.pipe)):
        first = stage * request.data * request.tensor
        for data, some in _by_data_ranks(request, members):
            ranks = tuple(first + i * request.tensor + t for i in data for t in range(request.tensor))
            found[ranks] = _shardings(request, some, data, first)
            if not request.fsdp and (request.tensor > 1 or len(data) < request.data):  # as the ranks agree on it
                found[ranks].sort(key=lambda sharding: sharding.name)
    return found


def _by_data_ranks(request: Request, members: Sequence[Parameter]) -> Iterator[tuple[range, Sequence[Parameter]]]:
    """Divide the parameters of a stage by the data ranks that store them together.

    Expert-parallel ranks are neighbours. In DeepSpeed those that hold the same experts share no others'; under FSDP all
    ranks share a stack.
    """
    if request.expert == 1 or request.fsdp:
        yield range(request.data), members
        return
    common, held = held_by(members, request.expert)
    shares = (range(request.data), common), *((range(e, request.data, request.expert), of) for e, of in enumerate(held))
    yield from ((data, some) for data, some in shares if some)


def _shardings(request: Request, members: Sequence[Parameter], data: range, first: int) -> list[Sharding]:
    """Describe the storage of parameters that data ranks store together; ``first``: the first rank of their stage."""
    hp = request.hp
    ignored = {"embedding": hp.ignore_embedding_layer, "output layer": hp.ignore_output_layer}
    return [
        Sharding(
            param.name,
            param.shape,
            "float32" if request.zero and param.dtype != "float64" else param.dtype,  # the master copy
            holders,
            request.sharded,
            divided_axis(param) if request.tensor > 1 else None,
            param.role if ignored.get(param.role) else "",
            param.dtype,
            param.split if hp.heeds_modules else (),
            param.kernel,
        )
        for group in _groups(request, members, data)
        for param, holders in zip(group, _holders(request, group, data, first), strict=True)
    ]


def _groups(request: Request, members: Sequence[Parameter], data: range) -> Iterator[Sequence[Parameter]]:
    """Divide parameters into groups: one, or as many as DeepSpeed makes of experts, where ZeRO cuts each by itself."""
    experts = len(data) < request.data
    return parameter_groups(members, request.tensor) if experts else iter([members])


def stages(parameters: Sequence[Parameter], pipe: int) -> list[list[Parameter]]:
    """Cut the numbered layers evenly by the number of their elements; what is between layers follows the one before.

    Raises:
        RunError: if there are fewer layers than stages.
    """
    found: list[list[Parameter]] = [[] for _ in range(pipe)]
    units = [(layer, list(members)) for layer, members in groupby(parameters, layer_of)]
    total, before, stage = sum(_elements(members) for layer, members in units if layer), 0.0, 0
    for layer, members in units:
        if layer:
            count = _elements(members)
            stage = min(pipe - 1, int(pipe * (before + count / 2) / total))
            before += count
        found[stage] += members
    if not all(found):
        layers = sum(bool(layer) for layer, _ in units)
        raise RunError(f"--pipe {pipe} stages cannot share {layers} numbered layers: take fewer")
    return found


def layer_of(parameter: Parameter) -> str:
    """Return the name of the numbered layer that a parameter belongs to, up to its number; empty if to none."""
    found = re.match(r"(.*?\.)?\d+(?=\.)", parameter.name)
    return found[0] if found else ""


def _elements(members: Sequence[Parameter]) -> int:
    return sum(math.prod(param.shape) for param in members)


def divided_axis(param: Parameter) -> int | None:
    """Return the axis that tensor parallelism divides, by the parameter's role or the end of its name."""
    if param.kernel or not param.shape:
        return None
    last, bias = len(param.shape) - 1, param.name.endswith("bias")
    stem = "." + re.sub(r"[._](weight|bias)$", "", param.name)
    rows, columns = (any(stem.endswith(f".{end}") for end in ends) for ends in (ROWS, COLUMNS))
    if last == 0 or bias:  # also a stack of them, for experts
        return last if columns else None
    if param.role and not stem.endswith((".wpe", ".position_embeddings")):
        return 0
    if columns or rows:
        return last - 1 if columns != param.transposed else last
    return None


def _holders(request: Request, members: Sequence[Parameter], data: range, first: int) -> Iterator[Holders]:
    """Yield the ranks that store each of these parameters; those that are stored alike are one object."""
    axes = [divided_axis(param) if request.tensor > 1 else None for param in members]
    flat = request.zero in (1, 2)
    shards = [
        [_cut(param.shape, axis, request.tensor, t) for t in range(request.tensor)]
        for param, axis in zip(members, axes, strict=True)
    ]
    totals = [sum(of[t].elements for of in shards) for t in range(request.tensor)]
    sizes = [2 * -(-total // (2 * len(data))) for total in totals]
    starts, alike = [0] * request.tensor, dict[tuple[object, ...], Holders]()
    for param, axis, parts in zip(members, axes, shards, strict=True):
        experts = request.expert if request.fsdp and expert_of(param) else 1
        key = (param.name,) if flat else (param.shape, axis, experts)
        if key not in alike:
            alike[key] = Holders(
                Holder(
                    first + rank * request.tensor + t,
                    part.range(i * sizes[t] - starts[t], (i + 1) * sizes[t] - starts[t])
                    if flat
                    else _of_data_rank(request, part, rank, experts),
                    t if axis is None and request.sharded else 0,
                )
                for i, rank in enumerate(data)
                for t, part in enumerate(parts)
                # Where each tensor-parallel rank has a shard group, those that store nothing of it are known, too.
                if not flat or (axis is None and request.tensor > 1) or _meets(i, sizes[t], starts[t], part.elements)
            )
        yield alike[key]
        starts = [start + part.elements for start, part in zip(starts, parts, strict=True)]


def _meets(data: int, size: int, start: int, count: int) -> bool:
    return data * size < start + count and start < (data + 1) * size


def _cut(shape: tuple[int, ...], axis: int | None, parts: int, part: int) -> Shard:
    """Return a tensor-parallel shard: parts of equal size, rounded up, until nothing is left."""
    spans = [(0, n) for n in shape]
    if axis is not None:
        size = -(-shape[axis] // parts)
        spans[axis] = (min(shape[axis], part * size), min(shape[axis], (part + 1) * size))
    return Shard.of([[span] for span in spans])


def _of_data_rank(request: Request, shard: Shard, data: int, experts: int) -> Shard:
    """Return what a data rank stores of a tensor-parallel shard: all, a flat range (ZeRO 3), or rows (FSDP).

    Rows are those of a stack's part for one of so many expert-parallel ``experts``.
    """
    if request.zero == 3:
        size = -(-shard.elements // request.data)
        return shard.range(data * size, (data + 1) * size)
    if not (request.fsdp and shard.spans):
        return shard
    [(a, b)], *rest = shard.spans
    part, expert = divmod(data % request.shards, experts)
    a, b = (a + (b - a) * place // experts for place in (expert, expert + 1))
    size = -(-(b - a) * experts // request.shards)
    return Shard.of([[(min(b, a + part * size), min(b, a + (part + 1) * size))], *rest])
