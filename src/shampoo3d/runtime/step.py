"""A step, in the order of the update rule."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from shampoo3d.numerics.grafting import graft_scale
from shampoo3d.numerics.schedule import Phase, phase
from shampoo3d.runtime.bindings import StepCounts
from shampoo3d.runtime.exchange import Exchange
from shampoo3d.runtime.recording import mark
from shampoo3d.runtime.team import Team, WorkItem
from shampoo3d.settings.hyperparams import ShampooHyperParams


class UnfinishedStepError(RuntimeError):
    """Interruption of an earlier step: parameters and state are neither those before it nor those after it."""


def take_step(
    teams: Sequence[Team],
    exchanges: Sequence[Exchange],
    groups: Sequence[Mapping[str, Any]],
    hp: ShampooHyperParams,
    steps: StepCounts,
) -> None:
    """Update the weights of all group tensors in ``steps``, each at its step t. Collective in each team.

    Args:
        groups: the settings, by the group numbers of the group tensors.
    """
    # Products of reduced precision change PyTorch's global precision flags, which background work may be using.
    join_background_roots(teams, None if hp.computation.products == "bfloat16" else steps)
    mark("waiting")
    buckets = [bucket for bucket in dict.fromkeys(s for team in teams for s in team.buckets) if bucket.begin(steps)]
    mark("averages")
    for team, exchange in zip(teams, exchanges, strict=True):
        if taking_part := {group_tensor: t for group_tensor, t in steps.items() if group_tensor in team.names}:
            _precondition_all(exchange, taking_part, hp)
            if hp.borrows_lengths:
                _graft(team, exchange, hp, taking_part)
                mark("grafting")
    for bucket in buckets:
        bucket.update(groups)
    mark("weights")
    for exchange in exchanges:
        exchange.copy(steps)
    mark("copies")
    for batch in (batch for team in teams for batch in team.batches):
        batch.stack.launch()
    mark("roots")


def join_background_roots(teams: Sequence[Team], steps: StepCounts | None = None) -> None:
    """Wait for roots computed in the background and use them from now on: those of ``steps``, or all."""
    for team in teams:
        for batch in team.batches:
            if steps is None or any(team.binding_of(slot).group_tensor in steps for slot in batch.slots):
                batch.stack.join()


def _precondition_all(exchange: Exchange, steps: StepCounts, hp: ShampooHyperParams) -> None:
    """Turn gradients into directions. A function of its own, so that no work item holds a bucket's S afterwards."""
    for items, due in exchange.collect(steps):
        mark("exchange")
        _precondition(items, due, hp)
    mark("exchange")


def _precondition(items: Sequence[WorkItem], due: Sequence[WorkItem], hp: ShampooHyperParams) -> None:
    """Turn the gradients of work items into directions, and refresh the roots of all rows that are due together.

    A root includes the gradient that it is applied to; eigenbases take it in afterwards, as in the paper on SOAP.
    """
    phases = {t: phase(t, hp) for t in {item.t for item in items}}
    for item in items:
        stack = item.batch.stack
        if phases[item.t].accumulate and not item.batch.guests:
            stack.accumulate(item.blocks, item.rows, item.t)
    mark("statistics")
    if hp.variant.direction == "adam":
        _direct(items, phases)
    for item in due:
        stack = item.batch.stack
        (stack.enqueue_refresh if hp.computation.asynchronous else stack.refresh_roots)(item.rows, item.t)
    mark("roots")
    if hp.variant.direction == "root":
        _direct(items, phases)


def _direct(items: Sequence[WorkItem], phases: Mapping[int, Phase]) -> None:
    for item in items:
        stack, bucket = item.batch.stack, item.batch.bucket
        if not phases[item.t].started:
            stack.update_average(item.blocks, item.rows, item.t)
            continue
        stack.precondition(item.blocks, item.rows, item.t, out=item.blocks)
        if bucket is not None and isinstance(item.rows, torch.Tensor):  # indexing by a tensor made a copy
            bucket.S[item.rows] = item.blocks
    mark("directions")


def _graft(team: Team, exchange: Exchange, hp: ShampooHyperParams, steps: StepCounts) -> None:
    """Scale the directions, now at home, to the lengths of the grafted ones."""
    buckets = [bucket for bucket in team.buckets if bucket.steps(steps)]
    norms = torch.zeros(len(team.bindings), 2, dtype=torch.float64, device=team.device)
    for bucket in buckets:
        bucket.add_norms(norms, team.bindings)
    scale = graft_scale(exchange.sum_norms(norms), hp)
    for bucket in buckets:
        bucket.graft(scale, team.bindings)
