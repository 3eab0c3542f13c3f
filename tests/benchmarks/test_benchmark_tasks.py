"""The comparison of optimizers: its tasks, its rule of tuning, and its arithmetic."""

import io
import json
import lzma
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from tasks import compare, problems, report, step_cost
from tasks.contenders import ADAM_RATES, BASELINE, OURS, Muon, contenders, peer
from tasks.problems import Batch, Images, Task
from tasks.training import share_of_rate, train
from tasks.tuning import central, median_reached, reached, tune

pytestmark = pytest.mark.slow
KNOWN = {contender.name: contender for contender in contenders()}


def images(side: int = 8) -> Images:
    """Bright on the left or on the right."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(240, side, side, generator=generator) / 2, torch.arange(240) % 2
    x[y == 0, :, : side // 2] += 0.5
    x[y == 1, :, side // 2 :] += 0.5
    return Images("halves", Batch(x[:200], y[:200]), Batch(x[200:], y[200:]))


def small_tasks(text: Path) -> list[Task]:
    text.write_text("to be or not to be, that is the question. " * 100)
    shown = images()
    return [
        problems.gpt(text, steps=10, batch=4, width=16, layers=1),
        problems.autoencoder(shown, steps=10, batch=16),
        problems.convnet(shown, steps=10, batch=16),
        problems.vit(shown, steps=10, batch=16, width=16, layers=1),
    ]


# ---- tasks and runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Muon", *OURS])
def test_every_task_is_learnt_by_every_optimizer_that_comes_along(name: str, tmp_path: Path) -> None:
    for task in small_tasks(tmp_path / "text"):
        rate = 1e-4 if name == "SGD" else 1e-2
        outcome = train(task, KNOWN[name].make, {"lr": rate}, seed=0)
        first, *_, last = outcome.curve.losses
        assert outcome.final == last < first, task.name
        assert outcome.curve.steps == list(range(11))
        assert all(times == sorted(times) for times in outcome.curve.seconds.values())
        assert 0 < outcome.optimizer["cpu"] < outcome.training["cpu"] == outcome.curve.seconds["cpu"][-1]


def test_weights_and_batches_depend_on_the_seed_alone(tmp_path: Path) -> None:
    for task in small_tasks(tmp_path / "text"):
        torch.manual_seed(7)
        weights = [param.clone() for param in task.make(1).parameters()]
        draws = [batch.inputs for batch, _ in zip(task.batches(1), range(3), strict=False)]
        torch.manual_seed(8)
        again = zip(task.make(1).parameters(), weights, strict=True)
        assert all(torch.equal(param, before) for param, before in again)
        assert all(torch.equal(a.inputs, b) for a, b in zip(task.batches(1), draws, strict=False))
        other = next(task.batches(2)).inputs
        assert not torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], other)


def test_full_size_of_the_language_model(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("".join(map(chr, range(60, 125))) * 20)
    facts = problems.gpt(text).facts
    matrices = 4 * 12 * 96 * 96
    vectors = 4 * (2 * 2 * 96 + (3 + 1 + 4 + 1) * 96)
    assert facts["parameters"] == matrices + vectors + (65 + 64) * 96 + 2 * 96 + 65 * 96 + 65
    assert (facts["steps"], facts["batch"]) == (800, 32)


def test_text_targets_are_the_next_characters(tmp_path: Path) -> None:
    task = small_tasks(tmp_path / "text")[0]
    inputs, targets = next(task.batches(0))
    assert inputs.shape == (4, problems.CONTEXT)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_the_language_model_does_not_see_what_comes(tmp_path: Path) -> None:
    task = small_tasks(tmp_path / "text")[0]
    model, tokens = task.make(0), torch.zeros(1, problems.CONTEXT, dtype=torch.long)
    changed = tokens.clone()
    changed[0, 40] = 1
    differ = (model(changed) - model(tokens)).abs().amax(2)[0]
    assert differ[:40].max() < 1e-6 < differ[40:].min()


@pytest.mark.parametrize("packed", [False, True])
def test_images_of_a_file(tmp_path: Path, packed: bool) -> None:
    path, buffer = tmp_path / ("images.npz.xz" if packed else "images.npz"), io.BytesIO()
    x = numpy.arange(3 * 4 * 4, dtype=numpy.uint8).reshape(3, 4, 4)
    y = numpy.array([2, 0, 1], dtype=numpy.uint8)
    numpy.savez(buffer, xtr=x[:2], ytr=y[:2], xte=x[2:], yte=y[2:])
    path.write_bytes(lzma.compress(buffer.getvalue()) if packed else buffer.getvalue())
    found = problems.read_images(path)
    assert torch.equal(found.train.inputs * 255, torch.arange(32.0).view(2, 4, 4))
    assert found.train.targets.tolist() == [2, 0]
    assert found.test.targets.tolist() == [1]
    assert found.data == f"{path.name}, 2 and 1 images of 4 pixels squared"


def test_digits_are_moved_and_the_ones_that_validate_are_others() -> None:
    found = problems.read_images(None)
    assert found.train.inputs.shape == (9 * (1797 - 360), 8, 8)
    assert 0.0 == found.test.inputs.min() < found.test.inputs.max() == 1.0
    plain = found.train.inputs.view(9, -1, 8, 8)[4]
    distances = torch.cdist(found.test.inputs.flatten(1), plain.flatten(1))
    assert distances.min() > 0
    # The nearest neighbour tells the digit, so images and classes belong together.
    told = found.train.targets[: len(plain)][distances.argmin(1)]
    assert (told == found.test.targets).float().mean() > 0.95


def test_without_a_file_the_text_is_that_of_python() -> None:
    text, data = problems.read_text(None)
    assert 500_000 < len(text) <= problems.CHARACTERS
    assert text.isascii()
    assert data == f"manual and sources of Python, {len(text)} characters"


def test_the_divergence_of_pixels_is_zero_for_the_image_itself() -> None:
    pixels = torch.tensor([[0.2, 0.9], [0.5, 0.4]])
    assert problems.pixel_divergence(torch.logit(pixels), pixels) == pytest.approx(0.0, abs=1e-6)
    p, q = 0.2, 0.5
    by_hand = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    found = problems.pixel_divergence(torch.zeros(1, 1), torch.tensor([[0.2]]))
    assert found == pytest.approx(by_hand, rel=1e-5)


def test_a_run_that_diverges_says_when(tmp_path: Path) -> None:
    task = small_tasks(tmp_path / "text")[1]
    outcome = train(task, KNOWN["SGD"].make, {"lr": 1e38}, seed=0)
    assert outcome.final is None
    assert outcome.stopped is not None
    assert outcome.stopped.startswith("step ")


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    shares = [share_of_rate(step, 200) for step in range(1, 201)]
    assert shares[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert shares[104] == pytest.approx(0.5)
    assert shares[-1] == pytest.approx(0.0, abs=1e-12)
    assert shares[9:] == sorted(shares[9:], reverse=True)


def test_every_step_has_its_rate(tmp_path: Path) -> None:
    rates = []

    class Listening(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            rates.append([group["lr"] for group in self.param_groups])

    def make(model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
        first, *others = model.parameters()
        return Listening([{"params": [first]}, {"params": others, "lr": 2 * lr}], lr)

    train(small_tasks(tmp_path / "text")[1], make, {"lr": 0.5}, seed=0)
    assert rates == [[0.5 * share_of_rate(step, 10), share_of_rate(step, 10)] for step in range(1, 11)]


def test_muon_turns_kernels_as_matrices_and_leaves_the_rest_to_adamw() -> None:
    model = problems.convnet(images()).make(0)
    optimizer = Muon(model, 0.1)
    names = {param: name for name, param in model.named_parameters()}
    assert {names[param] for param, _ in optimizer.matrices} == {name for name in names.values() if "weight" in name}
    kernel, matrix = optimizer.matrices[1]
    before = kernel.detach().clone()
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    update = (before - kernel.detach()).flatten(1) / (0.1 * 0.2 * max(matrix.shape) ** 0.5)
    assert kernel.grad is not None
    U, _, V = torch.linalg.svd(kernel.grad.flatten(1), full_matrices=False)
    # Five steps of Muon's iteration bring singular values to about 0.7 to 1.2, and turn nothing.
    turned = U.T @ update @ V.T
    assert 0.6 < turned.diagonal().min() < turned.diagonal().max() < 1.3
    assert (turned - turned.diagonal().diag()).abs().max() < 0.1
    assert len(Muon(model, 0.1, output="adamw").matrices) == len(optimizer.matrices) - 1


# ---- tuning ----------------------------------------------------------------------------------------------------------


def bowl(best: float) -> Callable[[dict[str, Any]], float]:
    return lambda settings: abs(math.log(settings["lr"] / best)) - 0.1 * ("beta2" in settings)


def test_tuning_takes_the_best_rate_and_then_tries_the_alternative() -> None:
    tuned = tune(ADAM_RATES, {"beta2": 0.99}, bowl(4e-3))
    assert tuned.best == {"lr": 4e-3, "beta2": 0.99}
    assert not tuned.at_edge
    assert len(tuned.trials) == len(ADAM_RATES) + 1


@pytest.mark.parametrize(
    ("best", "rates", "at_edge"),
    [
        (3.2e-2, [*ADAM_RATES, 3.2e-2, 6.4e-2], False),
        (6.4e-2, [*ADAM_RATES, 3.2e-2, 6.4e-2], True),
        (1.0, [*ADAM_RATES, 3.2e-2, 6.4e-2], True),
        (5e-4, [2.5e-4, 5e-4, *ADAM_RATES], False),
        (1e-9, [2.5e-4, 5e-4, *ADAM_RATES], True),
    ],
)
def test_tuning_goes_two_rates_beyond_the_edge_at_most(best: float, rates: list[float], at_edge: bool) -> None:
    tuned = tune(ADAM_RATES, None, bowl(best))
    assert [settings["lr"] for settings in tuned.settings] == pytest.approx(rates)
    assert tuned.at_edge is at_edge
    assert tuned.best["lr"] == pytest.approx(min(max(best, rates[0]), rates[-1]))


def test_where_every_rate_diverges_smaller_ones_are_tried() -> None:
    tuned = tune([0.1, 0.2], None, lambda settings: math.inf if settings["lr"] > 0.06 else 1.0)
    assert [settings["lr"] for settings in tuned.settings] == pytest.approx([0.025, 0.05, 0.1, 0.2])
    assert tuned.best["lr"] == pytest.approx(0.025)


def test_the_middle_of_a_grid() -> None:
    assert central(ADAM_RATES, 3) == ADAM_RATES[1:4]
    with pytest.raises(ValueError, match="grid of 5 rates has no middle of 6"):
        central(ADAM_RATES, 6)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def curve(losses: list[float], step: int = 10, seconds: float = 2.0) -> dict[str, Any]:
    marks = range(len(losses))
    times = {"cpu": [seconds * mark for mark in marks], "wall": [3 * seconds * mark for mark in marks]}
    return {"steps": [step * mark for mark in marks], "losses": losses, "seconds": times}


def test_a_loss_is_reached_between_two_marks() -> None:
    assert reached(curve([4.0, 3.0, 1.0, 0.5]), 1.5) == pytest.approx({"steps": 17.5, "cpu": 3.5, "wall": 10.5})
    assert reached(curve([4.0, 3.0, 1.0]), 1.0) == pytest.approx({"steps": 20.0, "cpu": 4.0, "wall": 12.0})
    assert reached(curve([4.0, 2.0, 3.0, 1.0]), 2.5) == pytest.approx({"steps": 7.5, "cpu": 1.5, "wall": 4.5})
    assert reached(curve([4.0, 3.0]), 5.0) == pytest.approx({"steps": 0.0, "cpu": 0.0, "wall": 0.0})
    assert reached(curve([4.0, 3.0]), 2.9) is None


def test_the_median_counts_seeds_that_never_get_there() -> None:
    quick, slow, never = curve([4.0, 0.0]), curve([4.0, 2.0, 0.0]), curve([4.0, 3.0])
    assert median_reached([slow, never, quick], 1.0, "steps") == pytest.approx(15.0)
    assert median_reached([never, quick, never], 1.0, "steps") == math.inf


def run_of(name: str, seed: int, losses: list[float], lr: float = 0.1, **what: Any) -> dict[str, Any]:
    about = {"task": "t", "data": "d", "steps": 20, "batch": 1, "parameters": 1, "optimizer": name, "described": ""}
    return {
        "what": {**about, "settings": {"lr": lr}, "seed": seed, **what},
        "final": losses[-1],
        "training": {"cpu": 4.0, "wall": 12.0},
        "optimizer": {"cpu": 1.0, "wall": 3.0},
        "curve": curve(losses),
    }


def result_of(runs: list[dict[str, Any]], *names: str) -> dict[str, Any]:
    tuned = []
    for name in names:
        what = next(run["what"] for run in runs if run["what"]["optimizer"] == name)
        about = {key: value for key, value in what.items() if key not in ("settings", "seed")}
        tuned.append({"what": about, "best": {"lr": 0.1}, "at_edge": False, "trials": [{"lr": 0.1}]})
    return {"runs": runs, "tuned": tuned}


def test_the_table_compares_with_the_median_of_adamw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        *(run_of(BASELINE, seed, [5.0, 3.0, final]) for seed, final in enumerate((1.0, 2.0, 1.5))),
        *(run_of("quick", seed, [5.0, 1.5, 1.0]) for seed in range(3)),
        *(run_of("slow", seed, [5.0, 4.0, 3.0]) for seed in range(3)),
        run_of("quick", 0, [5.0, 1.2], steps=10),
        run_of("quick", 0, [5.0, 0.1], lr=0.2),
    ]
    result = result_of(runs, "quick", "slow", BASELINE)
    (rows,) = report.summary(result).values()
    adamw, quick, slow = rows
    assert adamw["optimizer"] == BASELINE
    assert adamw["target"] == 1.5
    assert adamw["reached"]["steps"] == pytest.approx(20.0)
    assert quick["part"] == pytest.approx({"steps": 0.5, "cpu": 0.5, "wall": 0.5})
    assert quick["final"] == 1.0
    assert quick["share"] == 0.25
    assert quick["shorter"] == {10: {"final": 1.2, "cpu": 4.0, "wall": 12.0}}
    assert quick["needed"] == {"steps": 10, "cpu": 4.0, "wall": 12.0}
    assert quick["needed_part"] == {"steps": 0.5, "cpu": 1.0, "wall": 1.0}
    assert slow["needed"]["steps"] == math.inf
    assert slow["reached"]["wall"] == math.inf
    report.print_report(result, in_markdown=True)
    shown = capsys.readouterr().out
    assert "| slow | lr 0.1 | 3 | 3 to 3 | 3 | not reached | not reached | not reached | 4 | 25% |" in shown
    assert "| quick | 10 steps: 1.2 (reached) | 10 (50%) | 4 s (100%) | 12 s (100%) |" in shown
    report.figures(result, tmp_path)
    assert (tmp_path / "t.png").stat().st_size > 10_000


@pytest.mark.parametrize(("shortest", "steps"), [(2.5, 12.5), (math.inf, 15.0)])
def test_the_budget_that_is_needed_lies_between_those_tried(shortest: float, steps: float) -> None:
    runs = [
        run_of(BASELINE, 0, [5.0, 3.0, 2.0]),
        run_of("quick", 0, [5.0, 1.5, 1.0]),
        run_of("quick", 0, [5.0, shortest], steps=10),
        run_of("quick", 0, [5.0, 1.5], steps=15),
    ]
    _, quick = next(iter(report.summary(result_of(runs, BASELINE, "quick")).values()))
    assert quick["needed"]["steps"] == pytest.approx(steps)


@pytest.mark.parametrize("losses", [[1.0, 2.0, 3.0], [1.0, 2.0, math.inf]])
def test_an_adamw_that_learns_nothing_is_no_measure(losses: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    result = result_of([run_of(BASELINE, 0, losses), run_of("other", 0, [4.0, 3.5, 2.5])], BASELINE, "other")
    report.print_report(result, in_markdown=True)
    assert "| other | lr 0.1 | 2.5 | 2.5 to 2.5 | 1 | " in capsys.readouterr().out


# ---- the command -----------------------------------------------------------------------------------------------------


def test_a_comparison_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, output, trained = tmp_path / "text", tmp_path / "tasks.json", []
    text.write_text("to be or not to be " * 100)

    def counted(task: Task, make: Any, settings: Any, seed: int) -> Any:
        trained.append((task.steps, settings, seed))
        return train(task, make, settings, seed)

    monkeypatch.setattr(compare, "train", counted)
    monkeypatch.setattr(compare, "tasks", lambda *_: iter([problems.gpt(text, batch=2, width=16, layers=1)]))
    command = ["--tasks", "gpt", "--optimizers", "AdamW", "--rates", "2", "--steps", "2", "--output", str(output)]
    compare.main([*command, "--seeds", "1"])
    first = len(trained)
    assert 3 <= first <= 5  # two rates, up to two beyond, and the alternative
    compare.main([*command, "--seeds", "1"])
    assert len(trained) == first
    compare.main([*command, "--seeds", "2", "--shorter", "0.5"])
    assert [(steps, seed) for steps, _, seed in trained[first:]] == [(2, 1), (1, 0), (1, 1)]
    found = json.loads(output.read_text())
    assert len(found["runs"]) == first + 3
    assert found["setting"]["torch"] == torch.__version__
    compare.main([*command, "--seeds", "1", "--again", "AdamW"])
    assert len(trained) == 2 * first + 3


def test_unknown_optimizers_and_peers_are_refused() -> None:
    with pytest.raises(SystemExit, match="Adamm not among AdamW"):
        compare.chosen(compare.arguments(["--optimizers", "Adamm"]))
    with pytest.raises(ValueError, match="NAME=MODULE:CALLABLE"):
        peer("name=module")


def descent(params: Any, block_size: int, refresh: int, exponent: int) -> torch.optim.Optimizer:
    assert (block_size, refresh, exponent) == (1024, 10, 4)
    return torch.optim.SGD(params, lr=1.0)


def test_a_peer_is_imported_and_its_rate_is_set() -> None:
    contender = peer("plain=test_benchmark_tasks:descent")
    optimizer = contender.make(problems.convnet(images()).make(0), lr=0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25]
    assert contender.rates == ADAM_RATES


def test_steps_are_timed_side_by_side(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("to be or not to be " * 100)
    these = [contender for contender in contenders() if contender.name in (BASELINE, "3D-Shampoo")]
    adamw, ours = step_cost.measured(problems.gpt(text, batch=2, width=16, layers=1), these, {}, rounds=2, steps=1)
    assert (adamw["optimizer"], ours["optimizer"], adamw["of_adamw"]) == (BASELINE, "3D-Shampoo", 1.0)
    assert ours["passes_ms"] == adamw["passes_ms"] > 0
    assert ours["optimizer_ms"] > 0
