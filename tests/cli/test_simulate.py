"""`shampoo3d simulate` and `calibrate`: arithmetic against hand-made numbers, and what cannot be otherwise."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import called, check_refused
from shampoo3d.cli.plan.builtin import Parameter
from shampoo3d.cli.plan.forecast import Forecast
from shampoo3d.cli.plan.request import Request
from shampoo3d.cli.simulate.calibrate import Meter, joined, measure
from shampoo3d.cli.simulate.clock import Event, Spent, Start, Wait, Work
from shampoo3d.cli.simulate.hardware import Curve, Hardware, Link, hardware_of
from shampoo3d.cli.simulate.presets import PRESETS
from shampoo3d.cli.simulate.replay import replay
from shampoo3d.cli.simulate.simulation import Simulation, cycle, scaling
from shampoo3d.cli.train.settings import RunError

FAST = Curve({1: 1e30})
NO_TIME = Hardware(
    "toy", {"float32": FAST, "bfloat16": FAST}, FAST, {"eigh": Curve({1024: 1e-30}), "qr": Curve({1024: 1e-30})},
    0.0, 0.0, 0.0, 0.0, 0.0, Link(0.0, 1e30), Link(0.0, 1e30), 8, 1e9, queue=False,
)  # fmt: skip
"""A machine on which nothing takes time, to which a test gives one rate."""
MACHINE = replace(PRESETS["a100"], queue=False)
SQUARE = [Parameter("layers.0.weight", (64, 64))]
LAYERS = [Parameter(f"layers.{i}.weight", (256, 128)) for i in range(4)]


def simulated(hardware: Hardware, parameters: list[Parameter], **asked: Any) -> Simulation:
    return Simulation.of(Forecast.of(Request("", **asked), parameters), hardware)


# ---- hardware --------------------------------------------------------------------------------------------------------


def test_a_curve_is_straight_on_logarithmic_scales() -> None:
    curve = Curve({100: 1.0, 1: 100.0})
    assert [curve.at(size) for size in (0.1, 1, 10, 100, 1e5)] == pytest.approx([100, 100, 10, 1, 1])


@pytest.mark.parametrize("points", [{}, {0: 1.0}, {1: 0.0}, {1: math.inf}, {1: math.nan}])
def test_a_curve_needs_positive_numbers(points: dict[float, float]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Curve(points)


@pytest.mark.parametrize("name", PRESETS)
def test_hardware_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(hardware_of(name).to_json())
    assert hardware_of(str(path)) == PRESETS[name]


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", NO_TIME.to_json().replace('"node": 8', '"node": 0')])
def test_a_file_that_describes_no_hardware_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(RunError, match=r"machine\.json describes no hardware"):
        hardware_of(str(path))


def test_collectives_take_their_bytes_through_the_slowest_link() -> None:
    of = replace(NO_TIME, inside=Link(1.0, 100.0), between=Link(5.0, 10.0), node=2)
    assert of.all_to_all(0, (0, 1), [7, 200], [7, 300]) == 1 + 3
    assert of.all_to_all(0, (0, 1, 2), [0, 200, 40], [0, 0, 30]) == pytest.approx(5 + 1 + 4)
    assert of.all_gather((0, 1), 50) == 1 + 0.5
    # Four ranks on two nodes of two: three pieces arrive at each rank, over two links of each node.
    assert of.all_gather((0, 1, 2, 3), 50) == pytest.approx(5 + 1 + 150 / 20)
    assert of.all_gather((0, 2), 50) == 5 + 5
    assert of.all_reduce((0, 1), 100) == 2 * of.all_gather((0, 1), 50)


# ---- ranks in time ---------------------------------------------------------------------------------------------------


def work(phase: str, seconds: float) -> Work:
    return Work(phase, Spent(0.0, seconds, 1))


def test_ranks_wait_for_the_slower_one_and_for_what_travels() -> None:
    started = Start("weights", (0, 1), 0, 0.5)
    meeting: list[Event] = [started, Wait(started)]
    timeline = replay({0: [work("a", 2.0), *meeting], 1: [work("a", 1.0), *meeting, work("b", 1.0)]}, NO_TIME)
    assert (timeline.end(0), timeline.end(1), timeline.seconds) == (2.5, 3.5, 3.5)
    assert timeline.phases(1) == {"a": 1.0, "waiting: weights to replicas": 1.5, "b": 1.0}
    assert (timeline.busy(1), timeline.travelled[1]) == (2.0, 0.5)


@pytest.mark.parametrize(("overlap", "seconds"), [(True, 3.0), (False, 5.0)])
def test_what_travels_beside_the_work_is_hidden(overlap: bool, seconds: float) -> None:
    started = Start("gradients", (0, 1), 0, 2.0)
    events: list[Event] = [started, work("a", 3.0), Wait(started)]
    assert replay({0: events, 1: events}, replace(NO_TIME, overlap=overlap)).seconds == seconds


def test_two_collectives_share_a_link() -> None:
    first, second = (Start("gradients", (0, 1), number, 2.0) for number in range(2))
    events: list[Event] = [first, second, Wait(first), Wait(second)]
    assert replay({0: events, 1: events}, NO_TIME).seconds == 4.0


def test_a_device_lags_behind_its_host_or_waits_for_it() -> None:
    queue = replace(NO_TIME, queue=True)
    few = [Work("a", Spent(1.0, 5.0, 1)), Work("b", Spent(1.0, 0.5, 1))]
    many = [Work("a", Spent(4.0, 1.0, 1)), Work("b", Spent(4.0, 1.0, 1))]
    assert (replay({0: few}, queue).seconds, replay({0: many}, queue).seconds) == (5.5, 8.0)
    assert replay({0: few}, NO_TIME).seconds == 7.5


def test_ranks_that_do_not_meet_are_told() -> None:
    started = Start("weights", (0, 1), 0, 0.5)
    with pytest.raises(AssertionError, match=r"ranks \[0\] wait"):
        replay({0: [started, Wait(started)], 1: []}, NO_TIME)


# ---- a step ----------------------------------------------------------------------------------------------------------


def test_products_and_decompositions_of_a_step_are_those_of_the_update_rule() -> None:
    """Sum ``G G^T, G^T G, P G, (P G) Q`` at each step; at a refresh two decompositions and ``Q diag Q^T`` of both."""
    of = replace(NO_TIME, products={"float32": Curve({1: 64**3})}, decompositions={"eigh": Curve({64: 100.0})})
    one = simulated(of, SQUARE, preset="classic", preconditioning_compute_steps=4)
    assert sorted(one.seconds.values()) == pytest.approx([4, 4, 4, 4 + 200 + 2], rel=1e-6)
    assert one.mean == pytest.approx(4 + 202 / 4)
    assert one.phases(one.most)["roots"] == pytest.approx(202)


def test_each_operation_costs_the_host_the_same() -> None:
    one, two = (simulated(replace(NO_TIME, operation=seconds), SQUARE) for seconds in (1e-6, 2e-6))
    assert two.mean == pytest.approx(2 * one.mean)
    assert 100 < one.mean / 1e-6 < 1000


def test_bytes_are_those_of_the_plan() -> None:
    of = replace(NO_TIME, inside=Link(0.0, 1000.0))
    one = simulated(of, LAYERS, data=2, fsdp=True)
    received = one.forecast.received
    for kind, phase in (("gradients", "gradients out"), ("updates", "updates back")):
        most = max(received[rank][kind] for rank in (0, 1))
        assert one.phases()[f"waiting: {phase}"] == pytest.approx(most / 1000, rel=1e-6), kind
    copied = simulated(of, LAYERS, data=2)
    weights = copied.forecast.received[0]["weights"]
    assert copied.phases()["waiting: weights to replicas"] == pytest.approx(weights / 1000)


def test_more_of_anything_takes_no_longer() -> None:
    slow = replace(MACHINE, node=1)
    longest = simulated(slow, SQUARE, data=2, zero=1).mean
    for name, better in (("memory", Curve({1: 1e14})), ("operation", 1e-7), ("kernel", 0.0), ("node", 2)):
        assert simulated(replace(slow, **{name: better}), SQUARE, data=2, zero=1).mean < longest, name


def test_roots_beside_the_training_are_hidden_as_far_as_it_lasts() -> None:
    of = replace(NO_TIME, decompositions={"eigh": Curve({64: 1.0})}, training=1e6)
    asked = {"preset": "classic", "preconditioning_compute_steps": 4, "asynchronous": True}
    hidden, late = (simulated(of, SQUARE, tokens=tokens, **asked) for tokens in (1000, 1))
    # Of 3 multiply-adds for each of 4096 parameters and each token, 1e6 in a second.
    assert (hidden.training, late.training) == pytest.approx((12.288, 0.012288))
    assert hidden.mean == pytest.approx(0.0, abs=1e-9)
    assert late.seconds[late.most] == pytest.approx(2 - 0.012288)
    assert hidden.beside == late.beside == pytest.approx(2 / 4)


def test_the_bubble_of_a_pipeline() -> None:
    request = Request("", pipe=2, tokens=1000)
    one = Simulation.of(Forecast.of(request, LAYERS), NO_TIME, micro_batches=4)
    passes = 3 * 4 * 256 * 128 * 1000 / 2 / 1e9
    assert one.training == pytest.approx(passes * 5 / 4)
    assert one.bubble == pytest.approx(passes / 4)


def test_a_cycle_comes_after_the_beginning() -> None:
    hp = Request("").hp
    assert cycle(hp) == range(30, 40)
    assert cycle(replace(hp, computation=replace(hp.computation, refresh_growth=4))) == range(440, 480)


def test_the_curve_goes_over_all_numbers_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shampoo3d.cli.simulate.simulation.SCALES", (1, 2, 4))
    curve = [*scaling(Request("", fsdp=True), LAYERS, MACHINE)]
    assert [of.forecast.request.data for of in curve] == [1, 2, 4]
    assert curve[0].roots > curve[1].roots > curve[2].roots


# ---- the commands ----------------------------------------------------------------------------------------------------

SMALL = "def model():\n    import torch\n    return torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3)))\n"


def test_the_command_shows_writes_and_draws(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("simulated_model.py").write_text(SMALL)
    Path("toy.json").write_text(MACHINE.to_json())
    command = "simulate simulated_model:model --data 2 --hardware toy.json --json out.json --picture out.svg"
    code, out, err = called(command, capsys)
    assert (code, err) == (0, "")
    assert all(words in out for words in ("pipe 1 x data 2", "waiting: weights to replicas", "roots", "A100", "%"))
    found = json.loads(Path("out.json").read_text())
    assert found["seconds"]["least"] <= found["seconds"]["mean"] <= found["seconds"]["most"]
    assert sum(found["phases"]["mean"].values()) == pytest.approx(found["seconds"]["mean"], rel=0.05)
    assert "rank 1" in Path("out.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("simulate gpt2 --hardware h1000", "--hardware h1000 is neither one of a100, h100"),
        ("simulate gpt2 --micro-batches 0", "--micro-batches must be at least 1, not 0"),
        ("simulate gpt2 --picture a.txt", "--picture a.txt must end in .png or .svg"),
        ("simulate gpt2 --zero 4", "--zero must be one of"),
        ("calibrate --ranks 0", "--ranks must be at least 1, not 0"),
        ("calibrate --device tpu", "--device must be cpu or cuda"),
        ("calibrate --seconds 0", "--seconds must be above 0"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_refused(arguments, message, capsys)


def test_a_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shampoo3d.cli.simulate.calibrate.POOL", 2**16)
    monkeypatch.setattr("shampoo3d.cli.simulate.calibrate.STEPS", 3)
    models = ([(8, 8)], [(8, 8 + i) for i in range(6)], [(8, 8)] * 16)
    monkeypatch.setattr("shampoo3d.cli.simulate.calibrate.MODELS", models)
    monkeypatch.setattr("shampoo3d.cli.simulate.calibrate.CACHED_ELEMENTS", 2**12)
    meter = Meter(torch.device("cpu"), seconds=0.0, cpu=True)
    here = replace(measure(meter, sides=(8, 32), sizes=(2**15,)), inside=Link(0.0, 1e9), between=Link(0.0, 1e9))
    assert {*here.products} == {"float32", "bfloat16"}
    assert here.decompositions["eigh"].at(32) > here.decompositions["eigh"].at(8)
    assert 0 < here.operation + here.step < 0.1
    assert joined([here, here]) == Hardware.from_json(here.to_json()) == here
