"""A step, in the order of the update rule."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from shampoo3d.numerics.grafting import graft_scale
from shampoo3d.runtime.bindings import Steps
from shampoo3d.runtime.exchange import Exchange
from shampoo3d.runtime.team import Due, Team, Unit
from shampoo3d.settings.hyperparams import LayerwiseGrafting, ShampooHyperParams


class UnfinishedStepError(RuntimeError):
    """An earlier step ended in its middle, so that parameters and state are neither those before it nor after it."""


def take_step(
    teams: Sequence[Team],
    exchanges: Sequence[Exchange],
    groups: Sequence[Mapping[str, Any]],
    hp: ShampooHyperParams,
    steps: Steps,
) -> None:
    """Update the weights of all places in ``steps``, each at its step t. Collective in each team.

    Args:
        groups: the settings, by the places' group numbers.
    """
    # Work in the background may hold PyTorch's switches of precision, which reduced products turn.
    settle(teams, None if hp.computation.products == "bfloat16" else steps)
    slabs = [slab for slab in dict.fromkeys(s for team in teams for s in team.slabs) if slab.begin(steps)]
    for team, exchange in zip(teams, exchanges, strict=True):
        if taking_part := {place: t for place, t in steps.items() if place in team.names}:
            _precondition_all(exchange, taking_part, hp)
            if hp.graft_type is not LayerwiseGrafting.NONE:
                _graft(team, exchange, hp, taking_part)
    for slab in slabs:
        slab.update(groups)
    for exchange in exchanges:
        exchange.copy(steps)
    for batch in (batch for team in teams for batch in team.batches):
        batch.stack.launch()


def settle(teams: Sequence[Team], steps: Steps | None = None) -> None:
    """Put the roots that were computed in the background in their place: those of ``steps``, or all."""
    for batch in (batch for team in teams for batch in team.batches):
        if steps is None or any(member.binding.place in steps for member in batch.members):
            batch.stack.settle()


def _precondition_all(exchange: Exchange, steps: Steps, hp: ShampooHyperParams) -> None:
    """Turn gradients into directions; the units, which hold on to the slabs' S, end with it."""
    for units, due in exchange.collect(steps):
        _precondition(units, due, hp)


def _precondition(units: Sequence[Unit], due: Sequence[Due], hp: ShampooHyperParams) -> None:
    """Turn the gradients of units into directions, with new roots of all rows that are due in one go.

    Roots take in the gradient that they are applied to; eigenbases do so afterwards, as in their paper.
    """
    for unit in units:
        if unit.accumulate:
            unit.batch.stack.accumulate(unit.blocks, unit.rows, unit.t)
    if hp.variant.direction == "adam":
        _direct(units)
    for stack, rows, t in due:
        (stack.refresh_later if hp.computation.asynchronous else stack.refresh_roots)(rows, t)
    if hp.variant.direction == "root":
        _direct(units)


def _direct(units: Sequence[Unit]) -> None:
    for unit in units:
        if not unit.started:
            unit.batch.stack.wait(unit.blocks, unit.rows, unit.t)
        else:
            unit.batch.stack.precondition(unit.blocks, unit.rows, unit.t, out=unit.blocks)
            if unit.batch.slab is not None and isinstance(unit.rows, torch.Tensor):  # these are a copy
                unit.batch.slab.S[unit.rows] = unit.blocks


def _graft(team: Team, exchange: Exchange, hp: ShampooHyperParams, steps: Steps) -> None:
    """Give the directions, now at home, the lengths of others."""
    slabs = [slab for slab in team.slabs if slab.steps(steps)]
    norms = torch.zeros(len(team.bindings), 2, dtype=torch.float64, device=team.device)
    for slab in slabs:
        slab.add_norms(norms, team.bindings)
    scale = graft_scale(exchange.sum_norms(norms), hp)
    for slab in slabs:
        slab.graft(scale, team.bindings)
