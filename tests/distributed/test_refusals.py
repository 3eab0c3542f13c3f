"""Refusals of what ranks cannot do together: by every rank, in words, before anything has changed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shampoo3d import Shampoo, ShampooHyperParams

from .harness import RankFailedError, needs_deepspeed, run
from .models import Shape
from .training import Session, Topology, data_parallel, with_deepspeed

SETTINGS = ShampooHyperParams(block_size=6, matrix_eps=1e-6)
SECONDS = 30.0  # less than the timeout of a collective: a rank left waiting for the others fails the test


def shampoo(params: Any, **given: Any) -> Shampoo:
    return Shampoo(params, lr=0.02, hyperparams=SETTINGS, **given)


@dataclass(frozen=True)
class Outcome:
    """Return the end of an attempt on one rank."""

    error: Exception | None
    unchanged: bool = True

    @property
    def text(self) -> str:
        return f"{type(self.error).__name__}: {self.error}"


def _attempt(build: Callable[..., Session], *args: Any, **kwargs: Any) -> Outcome:
    """Build a session and take one step; an error must leave the parameters as they were."""
    session = None
    try:
        session = build(*args, **kwargs)
        before = session.weights()
        session.train(0, 1)
    except Exception as error:
        unchanged = session is None or all(torch.equal(before[n], w) for n, w in session.weights().items())
        return Outcome(error, unchanged)
    return Outcome(None)


def _refused(outcomes: list[Outcome], *kinds: type[Exception]) -> None:
    for rank, outcome in enumerate(outcomes):
        assert isinstance(outcome.error, kinds), f"rank {rank}: {outcome.text}"
        assert outcome.unchanged, f"rank {rank}"


# --- claims that contradict the ranks


class Claiming:
    """An optimizer factory that tells the optimizer about its ranks; a function is called on each rank."""

    def __init__(self, **claims: Any) -> None:
        self.claims = claims

    def __call__(self, params: Any) -> Shampoo:
        return shampoo(params, **{name: c() if callable(c) else c for name, c in self.claims.items()})


def _other_rank() -> int:
    return 1 - dist.get_rank()


CLAIMS = {
    "world_rank": ({"world_rank": _other_rank}, ["0", "1"]),
    "world_size": ({"world_size": 3}, ["3", "2"]),
    "topology": ({"topology": Topology(data=4)}, ["4", "2"]),
    "topology-axes": ({"topology": Topology(model=2)}, ["topology", "data"]),
    "shapes": ({"shapes": [(5, 7)]}, ["shapes"]),
}


def _claim(claims: dict[str, Any], under_deepspeed: bool) -> Outcome:
    if under_deepspeed:
        return _attempt(with_deepspeed, Shape(), Topology(data=2), Claiming(**claims))
    return _attempt(data_parallel, Shape(), Claiming(**claims))


def _check_claim(name: str, under_deepspeed: bool) -> None:
    claims, words = CLAIMS[name]
    outcomes = run(_claim, 2, claims, under_deepspeed, seconds=SECONDS)
    _refused(outcomes, ValueError)
    for outcome in outcomes:
        assert name.split("-")[0] in outcome.text
        assert all(word in outcome.text for word in words), outcome.text


@needs_deepspeed
@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_that_contradicts_deepspeed(name: str) -> None:
    _check_claim(name, under_deepspeed=True)


@pytest.mark.parametrize("name", [name for name in CLAIMS if name != "topology-axes"])
def test_a_claim_that_contradicts_torch_distributed(name: str) -> None:
    """Without an engine nothing contradicts the axes of a topology of the right size."""
    _check_claim(name, under_deepspeed=False)


def _forgotten_rank() -> None:
    data_parallel(Shape(), Claiming(world_rank=0)).train(0, 1)


def test_world_rank_0_on_every_rank() -> None:
    """A constant for `world_rank` is right on rank 0 only: the others end with the reason."""
    with pytest.raises(RankFailedError, match="ValueError: world_rank was given as 0, but"):
        run(_forgotten_rank, 2, seconds=SECONDS)


def _right_claims() -> dict[str, Any]:
    return {"world_rank": dist.get_rank, "world_size": 2, "topology": Topology(data=2)}


def _true_claim() -> Outcome:
    return _attempt(data_parallel, Shape(), Claiming(**_right_claims()))


def test_right_claims_are_accepted() -> None:
    assert [outcome.text for outcome in run(_true_claim, 2)] == ["NoneType: None"] * 2


# --- replicas that are not equal


def _not_averaged() -> Outcome:
    return _attempt(data_parallel, Shape(), shampoo, average=False)


def test_gradients_that_were_never_averaged() -> None:
    outcomes = run(_not_averaged, 2, seconds=SECONDS)
    _refused(outcomes, RuntimeError)
    assert all("average" in outcome.text for outcome in outcomes)


def _step(named: list[tuple[str, nn.Parameter]], **given: Any) -> Outcome:
    """One step with the given parameters, whose gradients are ones where they are present."""
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    if "drop_gradient" in given:
        named[given.pop("drop_gradient")][1].grad = None
    optimizer = Shampoo(named, lr=0.1, hyperparams=given.get("hyperparams", SETTINGS), splits=given.get("splits"))
    return _outcome_of(optimizer.step, named)


def _outcome_of(step: Callable[[], Any], named: list[tuple[str, nn.Parameter]]) -> Outcome:
    before = [parameter.detach().clone() for _, parameter in named]
    try:
        step()
    except Exception as error:
        unchanged = all(torch.equal(old, parameter) for old, (_, parameter) in zip(before, named, strict=True))
        return Outcome(error, unchanged)
    return Outcome(None)


def _linear(width: int = 8) -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(0)
    return list(nn.Sequential(nn.Linear(width, 6), nn.Linear(6, width)).double().named_parameters())


def _different(what: str) -> Outcome:
    odd = dist.get_rank() == dist.get_world_size() - 1
    named, given = _linear(width=9 if odd and what == "shape" else 8), {}
    if odd and what == "order":
        named.reverse()
    elif odd and what == "name":
        named = [(f"model.{name}", parameter) for name, parameter in named]
    elif odd and what == "number":
        named = named[:-1]
    elif odd and what == "value":
        with torch.no_grad():
            named[1][1].add_(1e-6)
    elif odd and what == "dtype":
        named = [(name, nn.Parameter(parameter.detach().float())) for name, parameter in named]
    elif odd and what == "hyperparams":
        given["hyperparams"] = ShampooHyperParams(block_size=4, matrix_eps=1e-6)
    elif odd and what == "splits":
        given["splits"] = {"0.weight": 2}
    elif what == "split of no use":
        given["splits"] = {"0.weight": (4, 1 + dist.get_rank())}
    elif odd and what == "gradient":
        given["drop_gradient"] = 0
    elif what == "another gradient":
        given["drop_gradient"] = dist.get_rank() % 2
    return _step(named, **given)


def _another_rate(last: float | None) -> Outcome:
    """Set rates like a scheduler on each rank's own loss; ``last``: that of the last rank."""
    named = _linear()
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    optimizer = Shampoo(named, lr=0.1, hyperparams=SETTINGS)
    optimizer.step()
    if last is None:
        optimizer.param_groups[0]["lr"] /= 1 + dist.get_rank()
    elif dist.get_rank() == dist.get_world_size() - 1:
        optimizer.param_groups[0]["lr"] = last
    return _outcome_of(optimizer.step, named)


def test_learning_rates_that_differ_between_replicas() -> None:
    outcomes = run(_another_rate, 2, None, seconds=SECONDS)
    _refused(outcomes, RuntimeError)
    assert all("differ in lr" in outcome.text for outcome in outcomes)


@pytest.mark.parametrize("rate", [float("nan"), -0.1])
def test_a_learning_rate_that_is_none_on_one_rank_is_named_on_all(rate: float) -> None:
    outcomes = run(_another_rate, 2, rate, seconds=SECONDS)
    _refused(outcomes, RuntimeError)
    assert all(f"in group 0 lr must be finite and >= 0, got {rate}" in outcome.text for outcome in outcomes)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "what",
    ["shape", "order", "name", "number", "value", "dtype", "hyperparams", "splits", "gradient", "another gradient"],
)
def test_replicas_that_differ_are_noticed_by_all_ranks(what: str, ranks: int) -> None:
    outcomes = run(_different, ranks, what, seconds=SECONDS)
    _refused(outcomes, RuntimeError)


def test_splits_are_told_where_they_differ_and_where_they_fit_no_shape() -> None:
    for outcome in run(_different, 2, "splits", seconds=SECONDS):
        assert "0.weight (6, 8) float64 on rank 0 and 0.weight (6, 8) float64 splits {0: 2} on rank 1" in outcome.text
    outcomes = run(_different, 1, "split of no use", seconds=SECONDS)
    _refused(outcomes, RuntimeError)
    assert "splits cuts axis 0 of '0.weight' into (4, 1): 4 + 1 add up to 5, not 6" in outcomes[0].text


def test_replicas_that_agree_are_not_refused() -> None:
    assert [outcome.text for outcome in run(_different, 3, "nothing")] == ["NoneType: None"] * 3


def _missing_on_one_shard() -> Outcome:
    """One model-parallel rank, and its replica, have no gradient for a matrix of which the other rank has."""

    def build() -> Session:
        session = with_deepspeed(Shape(), Topology(data=2, model=2), shampoo)
        if session.shards.index == 1:
            weight = session.module.get_parameter("2.qkv.weight")
            session.optimizer.register_step_pre_hook(lambda *_: setattr(weight, "grad", None))
        return session

    return _attempt(build)


@needs_deepspeed
def test_a_gradient_that_is_missing_on_one_tensor_parallel_shard() -> None:
    _refused(run(_missing_on_one_shard, 4, seconds=SECONDS), RuntimeError)


def _unfrozen_on_one_replica() -> Outcome:
    named = _linear()
    named[0][1].requires_grad_(False)
    for _, parameter in named[1:]:
        parameter.grad = torch.ones_like(parameter)
    optimizer = Shampoo(named, lr=0.1, hyperparams=SETTINGS)
    optimizer.step()
    if dist.get_rank() == 1:
        named[0][1].requires_grad_(True)
        named[0][1].grad = torch.ones_like(named[0][1])
    return _outcome_of(optimizer.step, named)


def test_a_parameter_that_joins_late_on_one_replica_only() -> None:
    _refused(run(_unfrozen_on_one_replica, 2, seconds=SECONDS), RuntimeError)


# --- gradients that are not finite


def _not_finite() -> Outcome:
    def build() -> Session:
        session = with_deepspeed(Shape(), Topology(pipe=2, data=2), raising)
        for name, parameter in session.module.named_parameters():
            if name == "3.up.weight":
                parameter.register_hook(lambda gradient: gradient * float("inf"))
        return session

    def raising(params: Any) -> Shampoo:
        settings = ShampooHyperParams(block_size=6, nonfinite_gradient="raise")
        return Shampoo(params, hyperparams=settings)

    return _attempt(build)


@needs_deepspeed
def test_an_infinite_gradient_on_one_stage_raises_on_all_ranks_if_asked_to() -> None:
    _refused(run(_not_finite, 4, seconds=SECONDS), RuntimeError)
