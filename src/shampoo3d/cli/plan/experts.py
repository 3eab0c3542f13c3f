"""Experts of a model, known by their names, and which expert-parallel rank holds which of them."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from shampoo3d.cli.train.settings import RunError

from .builtin import Parameter

_NAME = re.compile(r"((?:.*\.)?(?:deepspeed_)?experts)\.(?:(\d+)\.)?")
LARGEST_GROUP = 178_956_971
"""Elements of experts in a parameter group, as ``split_params_into_different_moe_groups_for_optimizer`` makes them."""


class Expert(NamedTuple):
    """The mixture that a parameter belongs to, and the number of its expert; None for a stack of all of them."""

    mixture: str
    number: int | None


def expert_of(param: Parameter) -> Expert | None:
    """Return the expert whose parameter this is, by its name; None if it is none's."""
    found = _NAME.match(param.name)
    return Expert(found[1], int(found[2]) if found[2] else None) if found else None


def check_experts(parameters: Sequence[Parameter], ranks: int, *, stacked: bool) -> None:
    """Raise unless so many expert-parallel ranks can share the experts equally.

    Args:
        stacked: the experts of a layer must be in one parameter.

    Raises:
        RunError: naming the numbers, and what is possible.
    """
    counts = _counts(parameters)
    if not counts:
        raise RunError(f'--expert {ranks} needs a model with experts, parameters below "experts": take --expert 1')
    for mixture, count in counts.items():
        if count % ranks:
            possible = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            raise RunError(
                f"--expert {ranks} does not divide the {count} experts of {mixture!r}: take one of {possible}"
            )
    single = next((param for param in parameters if (of := expert_of(param)) and of.number is not None), None)
    if stacked and single:
        raise RunError(
            f"--expert {ranks} with --fsdp needs the experts of a layer in one parameter, a DTensor divided along its "
            f"first axis, but {single.name!r} is of one expert: take DeepSpeed (--zero 0, 1 or 2), or --expert 1"
        )


def _counts(parameters: Sequence[Parameter]) -> dict[str, int]:
    """Count the experts of each mixture."""
    counts: defaultdict[str, int] = defaultdict(int)
    for param in parameters:
        if of := expert_of(param):
            counts[of.mixture] = max(counts[of.mixture], param.shape[0] if of.number is None else of.number + 1)
    return counts


def held_by(parameters: Sequence[Parameter], ranks: int) -> tuple[list[Parameter], list[list[Parameter]]]:
    """Return the parameters without those of experts, and those of the experts that each expert-parallel rank holds.

    As in DeepSpeed, ranks hold neighbouring experts; what a stack has of these is a parameter of its own.
    """
    counts = _counts(parameters)
    common, held = list[Parameter](), [list[Parameter]() for _ in range(ranks)]
    for param in parameters:
        expert = expert_of(param)
        if expert is None:
            common.append(param)
        elif expert.number is None:
            part = replace(param, shape=(param.shape[0] // ranks, *param.shape[1:]))
            for some in held:
                some.append(part)
        else:
            held[expert.number * ranks // counts[expert.mixture]].append(param)
    return common, held


def parameter_groups(parameters: Sequence[Parameter], tensor: int = 1) -> Iterator[list[Parameter]]:
    """Yield the groups into which DeepSpeed's helper puts the parameters of experts, of tensor-parallel shards."""
    group, total = list[Parameter](), 0
    for param in parameters:
        size = math.prod(param.shape) // tensor
        if group and total + size > LARGEST_GROUP:
            yield group
            group, total = [], 0
        group.append(param)
        total += size
    yield group
