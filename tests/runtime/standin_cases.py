"""Host reads, mixed devices and launches on a stand-in for an accelerator. ``test_standin.py`` runs them."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common import draw
from shampoo3d import Computation, Shampoo, ShampooHyperParams
from shampoo3d.numerics import background
from standin import DEVICE, Accelerator, AtOnce, accelerator

SHAPES = [(16, 8), (16,), (12, 12), (8, 4, 3, 3)]
READS = {
    "runtime/assemble.py:checksum": "at binding: replicas are compared",
    "runtime/agreement.py:gradient_norms": "each step, unless nonfinite_gradient is ignore",
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


@pytest.fixture(autouse=True)
def _in_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_thread", lambda _: AtOnce())


def made(hp: ShampooHyperParams, device: torch.device | str) -> tuple[list[nn.Parameter], Shampoo]:
    params = [nn.Parameter(draw(shape, seed).to(device)) for seed, shape in enumerate(SHAPES)]
    return params, Shampoo(params, lr=0.01, hyperparams=hp)


def put(params: list[nn.Parameter], t: int) -> None:
    for k, p in enumerate(params):
        p.grad = draw(p.shape, 1000 * t + k).to(p.device)


def values(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().cpu().clone() for p in params]


@pytest.mark.parametrize("name", PRESETS)
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
            assert t == 0 or gpu.reads == {"runtime/agreement.py:gradient_norms": 1}, t
            on_cpu.step()
            for a, b, w in zip(values(params), expected, before, strict=True):
                torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-9 * float((a - w).norm()))


@pytest.mark.parametrize("name", PRESETS)
def test_with_gradients_that_are_not_checked_the_host_reads_nothing(name: str) -> None:
    with accelerator() as gpu:
        params, optimizer = made(replace(PRESETS[name], nonfinite_gradient="ignore"), DEVICE)
        for t in range(6):
            put(params, t)
            gpu.clear()
            optimizer.step()
            assert t == 0 or not gpu.reads, t


@pytest.mark.parametrize("name", ["default", "soap", "classic"])
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


# ---- launches ----

MOST_LAUNCHES = {"default": 150, "soap": 90, "classic": 100}
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


@pytest.mark.parametrize("name", ["default", "soap", "classic"])
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
