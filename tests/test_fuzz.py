"""Random settings, parameters and gradients: finite steps, skipped ones or clear errors, never a corrupted parameter.

Each case is one seed: ``run(seed)`` does it again.
"""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common import DTYPES, assert_equal, clones, random_states, tensors_in
from generated import COMPUTATION, GROUP, KINDS, LAYOUTS, SETTINGS, VARIANT, a_gradient, a_shape, drawn, noise, settings
from shampoo3d import Computation, LayerwiseGrafting, Shampoo, ShampooHyperParams, StepRefusedError, Variant
from shampoo3d.runtime.agreement import largest_norm
from shampoo3d.runtime.bindings import state_dtype

INF = float("inf")
QUICK, ALL = 60, 1_600

# ---- what must hold ----


def same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, also where they are NaN."""
    return torch.equal(
        *(torch.clone(x.detach(), memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for x in (a, b))
    )


def times(factor: float, bound: float) -> float:
    """Their product, of no bound and 0 also 0."""
    return factor * bound if factor else 0.0


@dataclass
class Bound:
    """Bound the way of one parameter: |u| by the lengths that are borrowed, see ``docs/variants.md``.

    Attributes:
        gradient: the largest norm of a gradient so far, which bounds that of its average.
        M: the same of momentum.
        ordinary: whether all gradients were of a usual size.
    """

    factored: bool
    hp: ShampooHyperParams
    steps: int = 0
    gradient: float = 0.0
    M: float = 0.0
    ordinary: bool = True

    def step(self, G: Tensor, W: Tensor, group: dict[str, Any]) -> float:
        """Return the bound of this step."""
        v, length = self.hp.variant, G.double().norm().item()
        self.steps += 1
        self.gradient = max(self.gradient, length) if self.hp.averaged else length
        if not self.hp.weight_updates(self.steps):
            return 0.0
        decay = group["weight_decay"] * W.double().norm().item()
        b = self._borrowed(G.numel(), self.hp.weight_updates(self.steps)) + (0.0 if v.decoupled_weight_decay else decay)
        self.M, u = times(group["momentum"], self.M) + b, b
        if not self.hp.averaged:
            u = times(group["momentum"], self.M) + b if self.hp.nesterov else self.M
        return u + (decay if v.decoupled_weight_decay else 0.0)

    def _borrowed(self, elements: int, age: int) -> float:
        """|D|: an entry is an average E of gradients over the root of a sum or average A of their squares.

        By Cauchy and Schwarz ``E^2 <= A (1 - beta1)^2 / (1 - gamma) sum_k (beta1^2 / gamma)^k``.
        """
        method, beta1, gamma = (
            self.hp.diagonal_method(self.factored),
            self.hp.variant.beta1,
            self.hp.variant.graft_beta2,
        )
        if self.factored and (method is LayerwiseGrafting.NONE or self.hp.borrows_decrease):
            return INF
        if method in (LayerwiseGrafting.NONE, LayerwiseGrafting.SGD):
            c = self.hp.correction(beta1, age, method)
            return self.gradient * (1 - beta1**age) / c
        if method is LayerwiseGrafting.ADAGRAD:
            return elements**0.5 / self.hp.correction(beta1, age, method)
        if not gamma:
            return INF if beta1 else elements**0.5
        terms = sum((beta1**2 / gamma) ** k for k in range(age))
        ratio = (1 - beta1) * (terms / (1 - gamma) * self.hp.correction(gamma, age, method)) ** 0.5
        return elements**0.5 * ratio / self.hp.correction(beta1, age, method)


@dataclass
class Case:
    """An optimizer on its way, and what it must not do."""

    chance: random.Random
    hp: ShampooHyperParams
    optimizer: Shampoo
    params: list[nn.Parameter]
    groups: list[dict[str, Any]]
    bounds: dict[nn.Parameter, Bound] = field(default_factory=dict)
    poisoned: bool = False
    """With "ignore": something that is not finite was let in, or a weight is larger than its dtype has room for."""

    def state(self) -> list[Tensor]:
        assert self.optimizer.root_failures >= 0  # which waits for roots from the background
        return tensors_in(dict(self.optimizer.state))

    def step(self) -> str:
        """One step with the gradients that are there; what came of it."""
        taking_part = [p for p in self.params if p.grad is not None]
        held = [p.grad for p in taking_part]
        gradients, weights, before = clones(held), clones(self.params), clones(self.state())
        skipped, bound = self.optimizer.skipped_steps, bool(self.optimizer.plans)
        bad, unclear = self._judged(held)
        generator, refused = torch.get_rng_state(), ""
        try:
            self.optimizer.step()
        except StepRefusedError as error:
            refused = str(error)
        assert torch.equal(torch.get_rng_state(), generator), "a generator was used"
        assert all(p.grad is g for p, g in zip(taking_part, held, strict=True)), "a gradient was replaced"
        for now, then in zip(held, gradients, strict=True):
            assert same(now, then), "a gradient was changed"
        if refused:
            assert "no parameter and no state was changed" in refused
            known = ("root_method", "max_root_failures", "the gradient of 'group")
            assert any(name in refused for name in known), refused
            assert ("the gradient of" in refused) <= (self.hp.nonfinite_gradient == "raise" and (bad or unclear))
        wanted = {"skip": "skipped", "raise": "refused", "ignore": "stepped"}[self.hp.nonfinite_gradient]
        came = "refused" if refused else "skipped" if self.optimizer.skipped_steps > skipped else "stepped"
        if bad and not refused:
            assert came == wanted, f"a gradient that is not finite, and the step {came}"
        assert came != "skipped" or bad or unclear, "skipped a step with finite gradients"
        if came != "stepped":
            assert all(map(same, self.params, weights)), "a weight was changed"
            assert not bound or all(map(same, self.state(), before)), "state was changed"
            return came
        self.poisoned |= bad
        for p, W in zip(self.params, weights, strict=True):
            if p.grad is None:
                assert same(p, W), "moved without gradient"
            elif p.numel() and not self.poisoned:
                self._check_moved(p, W)
        if not self.poisoned:
            assert all(x.isfinite().all() for x in self.state()), f"state: {self._where_not_finite()}"
        return came

    def _judged(self, gradients: list[Any]) -> tuple[bool, bool]:
        """Return whether a gradient cannot be used, and whether rounding decides about one."""
        ratios = [
            g.double().norm().item() / largest_norm(state_dtype(g.dtype), self.hp) for g in gradients if g.numel()
        ]
        usable = [math.isfinite(r) and r < 0.99 for r in ratios]
        clear = [not math.isfinite(r) or r > 1.01 for r in ratios]
        return any(clear), not all(usable)

    def _check_moved(self, p: nn.Parameter, W: Tensor) -> None:
        group = next(g for g in self.groups if any(p is q for q in g["params"]))
        if p not in self.bounds:
            bindings = [binding for team in self.optimizer._teams for binding in team.bindings]
            self.bounds[p] = Bound(next(b.matrix.factored for b in bindings if b.group_tensor.tensor is p), self.hp)
        most = times(group["lr"], self.bounds[p].step(p.grad, W, group))
        rounding, room = torch.finfo(p.dtype).eps, torch.finfo(p.dtype).max
        if not p.isfinite().all() and p.dtype == torch.float16 and W.abs().max().item() + most > 0.9 * room:
            self.poisoned = True  # float16 has no room for what the settings ask for
            return
        assert p.isfinite().all(), f"{p.dtype} {tuple(p.shape)} is {p.detach()}"
        moved = (p.double() - W.double()).norm().item()
        least = self._least(p, group)
        slack = 2 * rounding * (W.double().norm() + p.double().norm()).item() + p.numel() * torch.finfo(p.dtype).tiny
        assert moved <= 1.05 * most + slack, f"moved by {moved:.3g}, at most {most:.3g} is borrowed"
        assert moved >= 0.98 * least - slack, f"moved by {moved:.3g}, at least {least:.3g} is borrowed"

    def _least(self, p: nn.Parameter, group: dict[str, Any]) -> float:
        """SGD lends the very length of the gradient, where S is far from the 1e-16 that are added to its length.

        In bfloat16 S may cancel to 0: a root has entries 1000 times as large as what is left of their products.
        """
        hp, bound = self.hp, self.bounds[p]
        usual = hp.graft_type is LayerwiseGrafting.SGD and not hp.averaged and not hp.pseudo_inverse
        usual &= "bfloat16" not in (hp.computation.products, hp.computation.root_storage)
        usual &= (
            hp.inverse_exponent_override == 0
            and self.optimizer.root_failures == 0
            and hp.weight_updates(bound.steps) > 0
        )
        bound.ordinary &= p.grad is not None and 1e-3 < p.grad.double().norm() < 1e3
        alone = group["momentum"] == group["weight_decay"] == 0.0
        return group["lr"] * bound.gradient if usual and alone and bound.ordinary else 0.0

    def _where_not_finite(self) -> list[str]:
        found = []
        for number, state in enumerate(self.optimizer.state.values()):
            for key, block in state.items():
                for name, x in block.items() if isinstance(block, dict) else ():
                    if not x.isfinite().all():
                        found.append(f"{number} {key} {name}")
        return found


# ---- cases ----


def parameters_and_groups(
    chance: random.Random, hp: ShampooHyperParams
) -> tuple[list[nn.Parameter], list[dict[str, Any]]]:
    """Some parameters of all dtypes and layouts, in one or two groups."""
    dtypes = [chance.choice(DTYPES)] * 4 if chance.random() < 0.6 else DTYPES
    params = []
    for _ in range(chance.randint(1, 4)):
        W = noise(chance, a_shape(chance)) * chance.choice([1.0, 1.0, 0.0, 100.0])
        params.append(nn.Parameter(chance.choice(LAYOUTS)(W.to(chance.choice(dtypes)))))
    cut = chance.choice([0, len(params) // 2])
    groups = [{"params": some, **drawn(chance, GROUP)} for some in (params[:cut], params[cut:]) if some]
    for group in groups:
        if hp.averaged and chance.random() < 0.95:
            group.pop("momentum", None)
        if group.get("lr", 0.0) > 1:  # decay that is faster than 1 / lr makes any weight grow beyond all bounds
            group["weight_decay"] = 0.0
    return params, groups


def about_parameters(chance: random.Random, params: list[nn.Parameter], hp: ShampooHyperParams) -> dict[str, Any]:
    """Embeddings, where the settings need them, and what is several matrices in one."""
    told: dict[str, Any] = {}
    if hp.ignore_embedding_layer and chance.random() < 0.95:
        told["embeddings"] = params[:1]
    if chance.random() < 0.15:
        told["splits"] = {p: (1, p.shape[0] - 1) for p in params if p.ndim and p.shape[0] > 1}
    return told


def twin_of(case: Case, told: dict[str, Any]) -> tuple[Shampoo, list[nn.Parameter]]:
    """Another optimizer with the same weights and the state of a checkpoint."""
    params = [nn.Parameter(p.detach().clone()) for p in case.params]
    now = dict(zip(case.params, params, strict=True))
    given = {"embeddings": params[:1]} if "embeddings" in told else {}
    if "splits" in told:
        given["splits"] = {now[p]: parts for p, parts in told["splits"].items()}
    groups = [{**group, "params": [now[p] for p in group["params"]]} for group in case.optimizer.param_groups]
    twin = Shampoo(groups, hyperparams=case.hp, **given)
    twin.load_state_dict(copy.deepcopy(case.optimizer.state_dict()))
    return twin, params


def outcome(seed: int) -> str:
    chance = random.Random(seed)
    hp = settings(chance)
    if hp is None:
        return "settings refused"
    params, groups = parameters_and_groups(chance, hp)
    facts = about_parameters(chance, params, hp)
    try:
        optimizer = Shampoo(groups, hyperparams=hp, **facts)
    except ValueError as error:
        if not any(name in str(error) for name in ("momentum=", "ignore_embedding_layer=")):
            raise
        return "groups refused"
    case = Case(chance, hp, optimizer, params, optimizer.param_groups)
    usual = chance.sample(list(KINDS), 3) if chance.random() < 0.8 else ["tiny", "denormal", "largest", "zero"]
    copied_at, twin, twins, came = chance.choice([1, 2, *[99] * 6]), None, [], []
    for t in range(chance.randint(3, 6)):
        if t == copied_at and optimizer.plans and not case.poisoned:
            twin, twins = twin_of(case, facts)
        for p in params:
            p.grad = None
            if chance.random() > 0.1:
                p.grad = a_gradient(chance, p, chance.choice([*usual, "ordinary", *([*KINDS] if t % 3 == 2 else [])]))
        came.append(case.step())
        for p, q in zip(params, twins, strict=bool(twins)):
            q.grad = p.grad
        if twin is not None:
            try:
                twin.step()
            except StepRefusedError:
                assert came[-1] == "refused"
        factor = chance.choice([1.0, 1.0, 1.0, 0.5])
        for group in (*optimizer.param_groups, *(twin.param_groups if twin is not None else ())):
            group["lr"] *= factor
    if twin is not None and not case.poisoned:
        assert_equal(clones(twins), clones(params), "weights of the twin")
    return "poisoned" if case.poisoned else max(came)


def run(seed: int) -> str:
    """Do one case; what came of it."""
    try:
        return outcome(seed)
    except Exception as error:
        raise AssertionError(f"test_fuzz.run({seed}) fails: {type(error).__name__}: {error}") from error


def test_the_tables_hold_every_setting() -> None:
    assert SETTINGS.keys() | {"variant", "computation"} == ShampooHyperParams.__dataclass_fields__.keys()
    assert VARIANT.keys() == Variant.__dataclass_fields__.keys()
    assert COMPUTATION.keys() == Computation.__dataclass_fields__.keys()


def test_some_cases() -> None:
    before = random_states()
    for seed in range(QUICK):
        run(seed)
    assert_equal(random_states(), before)


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
def test_all_cases(half: int) -> None:
    found = Counter(run(seed) for seed in range(QUICK + half, QUICK + ALL, 2))
    assert found.total() == ALL // 2
    assert found["stepped"] > ALL / 6, found
