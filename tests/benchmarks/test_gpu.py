"""The command for a GPU, at toy sizes on the CPU, so that it runs on the day when there is one."""

import json
import subprocess
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from gpu import HERE, PARTS
from gpu_parts import graph, reads, running, steps
from gpu_parts.bench import FAULT, NEEDS_CUDA, OK, PRESETS, TOY, Bench
from gpu_parts.page import page

from shampoo3d import Shampoo
from shampoo3d.numerics.schedule import phase

CPU = torch.device("cpu")


def bench() -> Bench:
    return Bench(CPU, TOY, 30.0)


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path) -> None:
    output, shown = tmp_path / "gpu.json", tmp_path / "gpu.md"
    command = [sys.executable, str(HERE), "--toy", "--output", str(output), "--page", str(shown)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(output.read_text())["parts"]
    assert list(found) == list(PARTS)
    needing = {name for name, part in found.items() if part["status"] == NEEDS_CUDA}
    assert needing == {"waiting", "graph, classic", "graph, default", "graph, soap"}
    assert all(part["status"] == running.FINISHED for name, part in found.items() if name not in needing)
    assert {row["preset"] for row in found["results"]["tables"]["results"]} == set(PRESETS)
    assert {row["optimizer"] for row in found["steps"]["tables"]["training"]} == set(steps.WHOLE)
    for name in PARTS:
        assert f"## {name[:1].upper()}{name[1:]}" in shown.read_text()


# ---- parts that fail -------------------------------------------------------------------------------------------------


def breaks(_: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "table", {"value": 1.0, "verdict": OK}
    raise RuntimeError("broken\nin two lines")


def faulty(_: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "table", {"value": 2.0, "verdict": f"{FAULT}: too much"}


def outcome_of(work: Any) -> dict[str, Any]:
    kept: list[dict[str, Any]] = []
    running.here(running.Part(work, 1, graph), bench(), kept.append)
    return kept[-1]


def test_a_part_that_breaks_keeps_its_rows_and_tells_the_error() -> None:
    broken, wrong = outcome_of(breaks), outcome_of(faulty)
    assert broken["error"] == "RuntimeError: broken"
    assert broken["tables"]["table"][0]["value"] == 1.0
    result = {"parts": {"a": broken, "b": wrong, "c": outcome_of(lambda of: graph.graph(of, "soap"))}}
    assert list(running.failures(result)) == ["a: RuntimeError: broken", "b: 1 faults"]
    assert result["parts"]["c"]["status"] == NEEDS_CUDA
    setting = {"device": "CPU", "cuda": None, "machine": "m", "torch": "t", "python": "p", "commit": "c", "size": "toy"}
    told = page({"setting": setting, **result}, PARTS)
    assert "| a | failed | 0 | RuntimeError: broken |" in told
    assert "FAULT: too much" in told


@pytest.mark.parametrize(
    ("program", "error"),
    [("raise SystemExit(3)", "ended with exit status 3"), ("import time; time.sleep(60)", "was ended after")],
)
def test_a_process_that_dies_or_hangs_is_told(
    program: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text(program)
    monkeypatch.setattr(running, "GRACE", 1.0)
    outcome, _ = running.apart(script, "part", 0.0, [])
    assert outcome["status"] == running.FAILED
    assert error in outcome["error"]


def test_a_part_has_a_process_of_its_own() -> None:
    outcome, told = running.apart(HERE, "graph, soap", 30.0, ["--toy"])
    assert told["torch"] == torch.__version__
    assert outcome["status"] == NEEDS_CUDA
    assert outcome["error"] == ""
    assert outcome["tables"] == {"replays": [{"preset": "soap", "verdict": NEEDS_CUDA}]}


def test_parts_on_a_gpu_are_run_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without touching it here; what they say of the machine is kept, and each gets its share of what time is left."""
    given: list[tuple[str, float]] = []

    def apart(script: Path, name: str, seconds: float, passed_on: list[str]) -> Any:
        given.append((name, seconds))
        return {"status": "finished", "error": "", "seconds": 1.0, "tables": {}}, {
            "device": "a GPU",
            "seconds": seconds,
        }

    monkeypatch.setattr(running, "apart", apart)
    output = tmp_path / "gpu.json"
    options = Namespace(only=list(PARTS), device=torch.device("cuda:0"), seconds=420.0, output=output)
    result = running.run(PARTS, HERE, options, [])
    assert result == json.loads(output.read_text())
    assert result["setting"] == {"device": "a GPU", "seconds": 420.0}
    assert [name for name, _ in given] == list(PARTS)
    assert given[0][1] == pytest.approx(420 * 40 / sum(part.weight for part in PARTS.values()), rel=0.01)
    assert given[-1][1] == pytest.approx(420, rel=0.01)  # no time has passed


def test_one_dear_case_is_not_tried_with_more_parameters() -> None:
    prices = steps.Prices(bench())
    assert prices.affords("dear", 100)
    prices.learn("dear", 100, 2.0)
    assert prices.affords("dear", 100)
    assert not prices.affords("dear", 400)
    prices.bench.seconds = 0.0
    assert not prices.affords("unknown", 1)


# ---- what needs CUDA, as far as it can be tried without --------------------------------------------------------------


def test_the_place_of_a_warning_is_the_function_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    tolist = torch.Tensor.tolist

    def waiting(tensor: torch.Tensor) -> Any:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", waiting)
    early, late = reads.observed(PRESETS["classic"](block_size=32), CPU)
    assert set(late) == {"runtime/agreement.py:_read_votes"}
    assert set(early) <= set(reads.EXPECTED)
    assert modes == ["warn", "default"] * reads.STEPS


def test_an_error_of_waiting_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    norm = torch._foreach_norm

    def waiting(*args: Any, **kwargs: Any) -> Any:
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return norm(*args, **kwargs)

    monkeypatch.setattr(torch, "_foreach_norm", waiting)
    error = reads.forbidden(PRESETS["soap"](block_size=32), CPU)
    assert error.startswith("runtime/agreement.py:gradient_norms: RuntimeError: called")
    assert reads.forbidden(PRESETS["soap"](block_size=32, nonfinite_gradient="ignore"), CPU) == ""
    assert modes[-1] == "default"


def test_places_that_are_expected_exist() -> None:
    root = Path(sys.modules[Shampoo.__module__].__file__ or "").parent
    for where in reads.EXPECTED:
        file, _, name = where.partition(":")
        assert f"def {name}(" in (root / file).read_text(), where


def test_replays_are_compared_with_the_steps_that_they_stand_for() -> None:
    weights = graph.eager(graph.quiet("classic"), CPU)
    assert len(weights) == graph.REPLAYS + 1
    assert [row["verdict"] for _, row in graph.compared("classic", weights, weights)] == [OK, OK]
    stuck = [weights[0], weights[1], *[weights[1]] * (graph.REPLAYS - 1)]
    one, later = (row["verdict"] for _, row in graph.compared("classic", weights, stuck))
    assert one == OK
    assert later.startswith(FAULT)
    one, later = (row["verdict"] for _, row in graph.compared("default", weights, stuck))
    assert (one, later.startswith(FAULT)) == (OK, False)


def test_no_roots_are_due_while_steps_are_replayed() -> None:
    for name in PRESETS:
        steps_replayed = range(graph.BEFORE + 1, graph.BEFORE + graph.REPLAYS + 1)
        assert not any(phase(t, graph.quiet(name)).refresh for t in steps_replayed)
        assert graph.quiet(name).nonfinite_gradient == "ignore"
