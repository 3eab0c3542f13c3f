"""Host reads, mixed devices and launches on a stand-in for an accelerator. ``test_standin.py`` runs them."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from common import assert_equal, draw, slow_but
from shampoo3d import Computation, Shampoo, ShampooHyperParams, StepRefusedError
from shampoo3d.numerics import background
from standin import DEVICE, Accelerator, AtOnce, accelerator

SHAPES = [(16, 8), (16,), (12, 12), (8, 4, 3, 3)]
READS = {
    "runtime/records.py:checksum": "at binding: replicas are compared",
    "runtime/agreement.py:_read_votes": "after binding, and where the host has news: other gradients, an error",
}
PRESETS = {
    "default": ShampooHyperParams.default(block_size=8),
    "soap": ShampooHyperParams.soap(block_size=8),
    "classic": ShampooHyperParams.classic(block_size=8, matrix_eps=1e-4),
    "classic, averages": ShampooHyperParams(
        block_size=8, matrix_eps=1e-4, beta2=0.9, graft_type="adagrad", preconditioning_compute_steps=3
    ),
}
for _name in ("default", "classic"):
    _hp = PRESETS[_name]
    PRESETS[f"{_name}, asynchronous"] = replace(_hp, computation=replace(_hp.computation, asynchronous=True))
NAMES = slow_but(["default", "soap", "classic, asynchronous"], PRESETS)
MAIN = slow_but(["default"], ["default", "soap", "classic"])


@pytest.fixture(autouse=True)
def _in_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_thread", lambda _: AtOnce())


def made(hp: ShampooHyperParams, device: torch.device | str) -> tuple[list[nn.Parameter], Shampoo]:
    params = [nn.Parameter(draw(shape, seed).to(device)) for seed, shape in enumerate(SHAPES)]
    return params, Shampoo(params, lr=0.01, hyperparams=hp)


def put(params: list[nn.Parameter], t: int) -> None:
    for k, p in enumerate(params):
        p.grad = draw(p.shape, 1000 * t + k).to(p.device)


def spoil(param: nn.Parameter) -> None:
    assert param.grad is not None
    param.grad.view(-1)[-1] = float("nan")


def values(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().cpu().clone() for p in params]


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_the_cpu_and_the_host_reads_nothing_else(name: str) -> None:
    hp = PRESETS[name]
    expected, on_cpu = made(hp, "cpu")
    with accelerator() as gpu:
        params, optimizer = made(hp, DEVICE)
        for t in range(13):
            put(params, t)
            put(expected, t)
            before = values(params)
            gpu.clear()
            optimizer.step()
            assert set(gpu.reads) <= set(READS), t
            assert t == 0 or not gpu.reads, (t, gpu.reads)
            assert t < 12 or not gpu.uploads, (t, gpu.uploads)
            on_cpu.step()
            for a, b, w in zip(values(params), expected, before, strict=True):
                torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-9 * float((a - w).norm()))


@pytest.mark.parametrize("name", MAIN)
def test_with_gradients_that_are_not_checked_the_host_reads_nothing(name: str) -> None:
    with accelerator() as gpu:
        params, optimizer = made(replace(PRESETS[name], nonfinite_gradient="ignore"), DEVICE)
        for t in range(6):
            put(params, t)
            gpu.clear()
            optimizer.step()
            assert t == 0 or not gpu.reads, t


@pytest.mark.parametrize("name", slow_but(["default"], ["default", "soap", "classic, asynchronous"]))
def test_numbers_of_the_step_before_arrive_without_a_read(name: str) -> None:
    """Numbers are those of the CPU, one step late, and never of a step that did not count."""
    expected, on_cpu = made(PRESETS[name], "cpu")
    on_cpu.watch(1)
    with accelerator() as gpu:
        params, optimizer = made(PRESETS[name], DEVICE)
        optimizer.watch(1)
        before: dict[str, float] = {}
        for t in range(13):
            put(params, t)
            put(expected, t)
            if t == 5:
                spoil(params[1])
                spoil(expected[1])
            gpu.clear()
            optimizer.step()
            told = optimizer.report().scalars()
            assert t == 0 or not gpu.reads, (t, gpu.reads)
            assert t < 12 or not gpu.uploads, (t, gpu.uploads)
            if t not in (5, 6):  # the skipped one, and that after it, at which the host knows it
                assert told.get("shampoo/step") == before.get("shampoo/step")
                for key in (key for key in before if "seconds" not in key):
                    assert told[key] == pytest.approx(before[key], rel=1e-9), key
            on_cpu.step()
            before = on_cpu.report().scalars()
            if "shampoo/step" in told:
                assert told["shampoo/step"] == (t if t < 6 else t - 1)


@pytest.mark.parametrize("name", MAIN)
def test_a_state_goes_out_and_in(name: str, tmp_path: Path) -> None:
    hp = PRESETS[name]
    with accelerator():
        params, optimizer = made(hp, DEVICE)
        for t in range(3):
            put(params, t)
            optimizer.step()
        optimizer.save_checkpoint(tmp_path / "saved")
        start, state = values(params), optimizer.state_dict()
        for t in range(3, 6):
            put(params, t)
            optimizer.step()
        for load in ("folder", "dictionary"):
            again, resumed = made(hp, DEVICE)
            for p, w in zip(again, start, strict=True):
                p.data.copy_(w)
            if load == "folder":
                resumed.load_checkpoint(tmp_path / "saved")
            else:
                resumed.load_state_dict(state)
            for t in range(3, 6):
                put(again, t)
                resumed.step()
            for a, b in zip(values(again), values(params), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# ---- steps that do not count ----


def state_of(optimizer: Shampoo) -> dict[str, Any]:
    """The complete state, on the host."""
    return tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, optimizer.state_dict())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", slow_but(["classic, asynchronous"], PRESETS))
def test_a_step_that_is_skipped_never_was(name: str) -> None:
    """All weights and all state are those of a run that never got it, and the host reads nothing in it nor after it."""
    with accelerator() as gpu:
        (params, optimizer), (others, undisturbed) = made(PRESETS[name], DEVICE), made(PRESETS[name], DEVICE)
        for t in range(9):
            if t in (3, 4, 7):
                put(params, 100 + t)
                spoil(params[t % len(params)])
                before = values(params)
                gpu.clear()
                optimizer.step()
                assert not gpu.reads
                assert_equal(values(params), before)
                if t == 7:
                    assert_equal(state_of(optimizer)["state"], state_of(undisturbed)["state"])
            put(params, t)
            put(others, t)
            gpu.clear()
            optimizer.step()
            assert t == 0 or not gpu.reads
            undisturbed.step()
        assert (optimizer.skipped_steps, undisturbed.skipped_steps) == (3, 0)
        undisturbed.skipped_steps = 3
        assert_equal(state_of(optimizer), state_of(undisturbed))
        assert_equal(values(params), values(others))


@pytest.mark.parametrize("name", MAIN)
def test_a_step_that_is_refused_raises_at_the_next_one(name: str) -> None:
    hp = replace(PRESETS[name], nonfinite_gradient="raise")
    with accelerator() as gpu:
        (params, optimizer), (others, undisturbed) = made(hp, DEVICE), made(hp, DEVICE)
        for t in range(6):
            put(params, t)
            put(others, t)
            if t == 2:
                spoil(params[1])
                gpu.clear()
                optimizer.step()
                assert not gpu.reads
                put(params, t)
                with pytest.raises(
                    StepRefusedError, match=r"step 3 was refused: the gradient of '.*1' has a norm of nan: it must be"
                ):
                    optimizer.step()
            gpu.clear()
            optimizer.step()
            assert t == 0 or not gpu.reads
            undisturbed.step()
        assert optimizer.skipped_steps == 0
        assert_equal(state_of(optimizer), state_of(undisturbed))
        assert_equal(values(params), values(others))


def test_what_was_loaded_is_not_refused() -> None:
    with accelerator():
        params, optimizer = made(replace(PRESETS["default"], nonfinite_gradient="raise"), DEVICE)
        for t in range(2):
            put(params, t)
            optimizer.step()
        state = optimizer.state_dict()
        spoil(params[0])
        optimizer.step()
        optimizer.load_state_dict(state)
        for t in range(2, 4):
            put(params, t)
            optimizer.step()
        assert optimizer.state[params[0]]["step"] == 4


def test_what_the_host_has_to_tell_costs_one_read() -> None:
    """Other gradients than before, parameters of a new group, and an error, which raises at once in one process."""
    with accelerator() as gpu:
        params, optimizer = made(PRESETS["default"], DEVICE)
        more = nn.Parameter(draw((6, 5), 9).to(DEVICE))
        expected = [0, 0, 1, 0, 1]
        for t, reads in enumerate([None, *expected]):
            put(params, t)
            if t in (3, 4):
                params[1].grad = None
            gpu.clear()
            optimizer.step()
            assert reads is None or gpu.reads == Counter({"runtime/agreement.py:_read_votes": reads}), t
        assert [optimizer.state[p]["step"] for p in params] == [6, 4, 6, 6]
        optimizer.add_param_group({"params": [more]})
        for t in range(2):
            put([*params, more], t)
            gpu.clear()
            optimizer.step()
            assert bool(gpu.reads) == (t == 0)
        optimizer.param_groups[0]["lr"] = -1.0
        with pytest.raises(StepRefusedError, match="lr must be"):
            optimizer.step()


def test_failed_roots_raise_one_step_later_than_on_a_cpu() -> None:
    hp = ShampooHyperParams.classic(block_size=8, computation=Computation(max_root_failures=0), weight_decay=0.0)
    with accelerator() as gpu:
        params, optimizer = made(replace(hp, preconditioning_compute_steps=2), DEVICE)
        for t in range(5):
            put(params, t)
            if t == 3:  # the next refresh fails
                optimizer._teams[0].batches[0].stack.statistics[0].tiles[""].fill_(-1.0)
            gpu.clear()
            optimizer.step()
            assert t == 0 or not gpu.reads
        with pytest.raises(
            StepRefusedError, match="roots could not be computed or used, more than max_root_failures=0"
        ):
            optimizer.step()


# ---- launches ----

MOST_LAUNCHES = {"default": 135, "soap": 72, "classic": 118}
"""Numbers for a step without roots of a model shaped like GPT-2, whose matrices are cut into blocks of one shape."""


def launches(gpu: Accelerator, layers: int, hp: ShampooHyperParams, steps: int) -> list[list[str]]:
    """The launches of each step of a model of so many layers, shaped like those of GPT-2, with a width of 16."""
    shapes = [(48, 16), (48,), (16, 16), (16,), (64, 16), (64,), (16, 64), (16,), (16,), (16,)] * layers
    params = [nn.Parameter(draw(shape, k).float().to(DEVICE)) for k, shape in enumerate(shapes)]
    optimizer = Shampoo(params, lr=0.01, hyperparams=hp)
    found = []
    for t in range(steps):
        put_float(params, t)
        gpu.clear()
        optimizer.step()
        found.append(list(gpu.launches))
    return found


def put_float(params: list[nn.Parameter], t: int) -> None:
    for k, p in enumerate(params):
        p.grad = draw(p.shape, 1000 * t + k).float().to(DEVICE)


@pytest.mark.parametrize("name", MAIN)
def test_steps_of_one_phase_launch_the_same(name: str) -> None:
    """They could be captured as a graph; and depth does not matter."""
    hp = {
        "default": ShampooHyperParams.default(
            block_size=16,
            preconditioning_compute_steps=8,
            computation=Computation(root_storage="bfloat16", momentum_storage="bfloat16", refresh="together"),
        ),
        "soap": ShampooHyperParams.soap(block_size=16, preconditioning_compute_steps=8),
        "classic": ShampooHyperParams.classic(block_size=16, preconditioning_compute_steps=8),
    }[name]
    hp = replace(hp, computation=replace(hp.computation, refresh="together"))
    with accelerator() as gpu:
        few = launches(gpu, 2, hp, 8)
        deep = launches(gpu, 5, hp, 8)
    assert few[4] == few[5] == few[6]
    assert Counter(few[5]) == Counter(deep[5])
    assert len(few[5]) <= MOST_LAUNCHES[name], len(few[5])
