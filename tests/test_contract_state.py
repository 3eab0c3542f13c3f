"""State of parameters by the contract of ``torch.optim.Optimizer``: ours, and what wrappers put there."""

from __future__ import annotations

import copy
import io
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from common import parameters
from contract import Behaviours, Make, advance, as_adamw, ended, equal, twins

BEHAVIOURS = Behaviours()
behaviour = BEHAVIOURS.add


def wrapped(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> None:
    for k, p in enumerate(params):
        optimizer.state[p]["mine"] = torch.full_like(p, k)
        optimizer.state[p]["count"] = k
        optimizer.state[p]["nested"] = {"ema": torch.zeros(3)}
    optimizer.state["of the wrapper"] = {"k": 5}


def is_wrapped(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> bool:
    entries = [optimizer.state[p] for p in params]
    mine = all(bool((entry["mine"] == k).all()) and entry["count"] == k for k, entry in enumerate(entries))
    nested = all(torch.equal(entry["nested"]["ema"], torch.zeros(3)) for entry in entries)
    return mine and nested and optimizer.state["of the wrapper"] == {"k": 5}


def _with_entries_of_a_wrapper(begun: int, make: Make) -> list[bool]:
    params = parameters()
    params[1].requires_grad_(False)
    optimizer = make(params)
    advance(optimizer, params, range(begun))
    wrapped(optimizer, params)
    found = []
    for change in (
        lambda: advance(optimizer, params, range(begun, 4)),
        lambda: (params[1].requires_grad_(True), advance(optimizer, params, [4])),
        lambda: optimizer.add_param_group({"params": parameters([(4, 3)])}),
        lambda: advance(optimizer, params, [5]),
        optimizer.state_dict,
    ):
        change()
        found.append(is_wrapped(optimizer, params))
    return found


OF_SGD = [partial(_with_entries_of_a_wrapper, begun) for begun in (0, 2)]
"""AdamW breaks where there is state before its first step."""
BEHAVIOURS |= zip(
    ("entries of a wrapper, before the first step", "entries of a wrapper, after it"), OF_SGD, strict=True
)


@behaviour
def entries_of_a_wrapper_are_saved(make: Make) -> list[bool]:
    params, optimizer, others, other = twins(make)
    wrapped(optimizer, params)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    advance(optimizer, params, [3])
    advance(other, others, [3])
    clone = copy.deepcopy(optimizer)
    return [
        is_wrapped(other, others),
        equal(params, others),
        is_wrapped(clone, clone.param_groups[0]["params"]),
        optimizer.state[params[0]]["mine"] is not clone.state[clone.param_groups[0]["params"][0]]["mine"],
    ]


@behaviour
def loading_replaces_the_entries_of_a_wrapper(make: Make) -> bool:
    params, optimizer, _, other = twins(make)
    wrapped(optimizer, params)
    optimizer.load_state_dict(other.state_dict())
    return any("mine" in optimizer.state[p] for p in params)


def _with_state_taken_away(take: Callable[[Optimizer, list[nn.Parameter]], Any], begun: int, make: Make) -> bool:
    """Parameters without state begin anew, as in an optimizer of their own."""
    params, one, _, _ = twins(make)
    take(one, params)
    twin = [nn.Parameter(p.detach().clone()) for p in params]
    fresh = make(twin)
    advance(one, params, range(3, 6))
    advance(fresh, twin, range(3, 6))
    return equal(params[:begun], twin[:begun]) and not equal(
        params[begun:] or [torch.ones(1)], twin[begun:] or [torch.zeros(1)]
    )


def _new_state(optimizer: Optimizer, _: Any) -> None:
    optimizer.state = defaultdict(dict)


def _first_cleared(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.state[params[0]].clear()


def _first_deleted(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    del optimizer.state[params[0]]


def _first_replaced(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.state[params[0]] = {}


ALL = len(parameters())
for take, begun in (
    (_new_state, ALL),
    (lambda of, _: of.state.clear(), ALL),
    (_first_cleared, 1),
    (_first_deleted, 1),
    (_first_replaced, 1),
):
    BEHAVIOURS[f"state taken away: {getattr(take, '__name__', '')}"] = partial(_with_state_taken_away, take, begun)


@behaviour
def a_saved_state_goes_on(make: Make) -> bool:
    params, one, _, _ = twins(make)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = make(others)
    other.load_state_dict(copy.deepcopy(one.state_dict()))  # AdamW's state would share its memory
    advance(one, params, range(3, 6))
    advance(other, others, range(3, 6))
    return equal(params, others)


@behaviour
def a_state_of_another_optimizer(make: Make) -> str:
    params, one, _, _ = twins(make)
    other = torch.optim.Rprop(params) if isinstance(one, torch.optim.AdamW) else torch.optim.AdamW(params)
    advance(other, params, [3])
    return ended(lambda: (one.load_state_dict(other.state_dict()), advance(one, params, [4])))


@behaviour
def a_state_of_other_groups(make: Make) -> list[str]:
    params, one, _, _ = twins(make)
    more, two = make(parameters([*[p.shape for p in params], (3,)])), make([{"params": [p]} for p in parameters()])
    return [ended(partial(of.load_state_dict, one.state_dict())) for of in (more, two)]


@as_adamw(BEHAVIOURS)
def test_it_behaves_as_adamw(behaves: Callable[[Make], Any], make: Make) -> None:
    control = partial(torch.optim.SGD, momentum=0.9) if behaves in OF_SGD else torch.optim.AdamW
    assert behaves(make) == behaves(partial(control, lr=0.01))
