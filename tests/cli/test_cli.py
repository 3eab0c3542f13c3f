"""The command line, with real processes where it starts them."""

import contextlib
import functools
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from distributed.harness import needs_deepspeed
from distributed.harness import run as run_ranks
from shampoo3d.cli import commands as cli
from shampoo3d.cli.train.log import Record, read
from shampoo3d.cli.train.settings import Settings, log_file
from shampoo3d.planning.plan import Plan
from shampoo3d.runtime.memory import Memory

TINY = (
    "--layers 2 --width 16 --heads 2 --context 16 --batch 4 --micro-batches 2 --block-size 8 --refresh 2 --device cpu"
)
COMMAND = [sys.executable, "-m", "shampoo3d.cli"]


def start(arguments: str, *, output: Path) -> subprocess.Popen[str]:
    command = [*COMMAND, *arguments.split(), "--output", str(output)]
    # Where the tests run in the background of a shell, it lets them ignore Ctrl-C, and so would what they start.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    finally:
        signal.signal(signal.SIGINT, before)


def environment() -> dict[str, str]:
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in launched}


def run(arguments: str, *, output: Path) -> tuple[int, str, str]:
    process = start(arguments, output=output)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def losses(output: Path, optimizer: str) -> list[tuple[str, int, float]]:
    records: list[Record] = read(log_file(output, optimizer))
    return [(r["event"], r["step"], r["loss"]) for r in records if r["event"] != "finished"]


def one_line(err: str) -> str:
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("shampoo3d: ")
    return lines[0]


@pytest.mark.slow
def test_demo_in_small(tmp_path: Path) -> None:
    code, out, err = run(f"train {TINY} --steps 6 --evaluate-every 3", output=tmp_path / "run")
    assert code == 0, err
    for words in ("AdamW", "3D-Shampoo", "validation loss", "optimizer's share", "state per rank", "steps to AdamW's"):
        assert words in out
    for name in ("loss.png", "ownership.png"):
        assert (tmp_path / "run" / name).stat().st_size > 10_000
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for name in ("adamw", "shampoo"):
        assert len(summary["runs"][name]["state_bytes"]) == 4
        assert [step for event, step, _ in losses(tmp_path / "run", name) if event == "validation"] == [1, 3, 6]
    # Both start from the same weights, on the same sequences.
    assert losses(tmp_path / "run", "adamw")[0] == losses(tmp_path / "run", "shampoo")[0]
    plans, memory = assert_foreseen(Settings.load(tmp_path / "run"))
    assert [plan.ranks for plan in plans] == [(0, 1), (0, 1, 2, 3), (2, 3)]
    assert [of.state for of in memory.values()] == summary["runs"]["shampoo"]["state_bytes"]


def assert_foreseen(run_settings: Settings) -> tuple[list[Plan], dict[int, Memory]]:
    """`shampoo3d plan` shows what the run did."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from shampoo3d.cli.train.forecast import foresee
    from shampoo3d.cli.train.results import read_plans
    from shampoo3d.cli.train.text import read_text

    vocabulary = read_text(run_settings.text, run_settings.context).vocabulary
    plans: list[Plan] = read_plans(run_settings.output)
    forecast = foresee(run_settings, len(vocabulary))
    assert [p.digest() for p in forecast.plans] == [p.digest() for p in plans]
    return plans, forecast.memory


SMALL: dict[str, Any] = {
    **{"layers": 2, "width": 16, "heads": 2, "context": 16, "batch": 12, "micro_batches": 2, "block_size": 8},
    **{"steps": 8, "save_every": 4, "evaluate_every": 4, "device": "cpu"},
}
GRID = {"pipe": 2, "data": 2, "zero_stage": 1}
MORE_GRIDS = [
    {"data": 2, "zero_stage": 3},
    {"model_parallel": 2, "data": 2, "zero_stage": 2},
    {"data": 2, "zero_stage": 1},
    {"zero_stage": 3},
    {"data": 3, "zero_stage": 3},
    {"model_parallel": 2, "data": 2, "zero_stage": 3},
    {"model_parallel": 2, "pipe": 2, "data": 2, "zero_stage": 1},
]


def small(output: Path, **grid: int) -> Settings:
    return Settings(output=output, **SMALL | {"pipe": 1, "data": 1} | grid)


def train_once(name: str, settings: Settings, until: int = 8) -> tuple[list[float], list[int]]:
    """Train up to a step; rank 0 learns the losses from the first step on, and which steps were trained here."""
    from distributed.training import prepare_deepspeed
    from shampoo3d.cli.train.text import read_text
    from shampoo3d.cli.train.trainer import Trainer

    trained: list[int] = []

    class Interruptible(Trainer):
        def _step(self, step: int) -> None:
            if step > until:
                raise KeyboardInterrupt
            trained.append(step)
            super()._step(step)

    prepare_deepspeed()
    records: list[Record] = []
    trainer = Interruptible(name, settings, read_text(settings.text, settings.context), records.append)
    with contextlib.suppress(KeyboardInterrupt):
        trainer.complete()
    return [record["loss"] for record in records if "loss" in record], trained


def train_whole_and_in_two(name: str, whole: Settings, cut: Settings) -> tuple[list[float], list[float]]:
    """The second run ends after step 6 and goes on after step 4, where it saved."""
    losses, _ = train_once(name, whole)
    train_once(name, cut, until=6)
    resumed, trained = train_once(name, cut)
    assert trained == [5, 6, 7, 8]
    return losses, resumed


@functools.cache
def losses_of_one_process(name: str) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        [(losses, _)] = run_ranks(train_once, 1, name, small(Path(folder)))
    return list(losses)


@needs_deepspeed
@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("shampoo", GRID),
        pytest.param("adamw", GRID, marks=pytest.mark.slow),
        *(pytest.param("shampoo", grid, marks=pytest.mark.slow) for grid in MORE_GRIDS),
    ],
    ids=str,
)
def test_every_topology_trains_the_same_model_and_resumes(name: str, grid: dict[str, int], tmp_path: Path) -> None:
    whole, cut = (small(tmp_path / run, **grid) for run in ("whole", "cut"))
    losses, resumed = run_ranks(train_whole_and_in_two, whole.world, name, whole, cut)[0]
    assert losses[0] == pytest.approx(losses_of_one_process(name)[0], abs=1e-5)
    assert losses == pytest.approx(losses_of_one_process(name), abs=1e-3)
    assert resumed == losses
    if name == "shampoo":
        assert_foreseen(whole)


@pytest.mark.slow
def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    arguments = f"train {TINY} --optimizer shampoo --pipe 1 --data 2 --steps 200 --save-every 7 --evaluate-every 100"
    code, _, err = run(arguments, output=tmp_path / "whole")
    assert code == 0, err

    process = start(arguments, output=tmp_path / "cut")
    wait_for(process, lambda: len(losses(tmp_path / "cut", "shampoo")) > 12)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == cli.INTERRUPTED
    assert err == ""
    assert "shampoo3d train --resume" in out
    assert not any(child.is_running() for child in children)
    kept = losses(tmp_path / "cut", "shampoo")
    assert 12 < len(kept) < 200
    assert kept == losses(tmp_path / "whole", "shampoo")[: len(kept)]

    # What a save that was cut short leaves behind does no harm.
    (tmp_path / "cut" / "shampoo" / "checkpoint" / "step-000099").mkdir()
    code, _, err = run("train --resume", output=tmp_path / "cut")
    assert code == 0, err
    assert losses(tmp_path / "cut", "shampoo") == losses(tmp_path / "whole", "shampoo")


@pytest.mark.slow
def test_dead_rank_ends_the_run_in_one_line(tmp_path: Path) -> None:
    process = start(f"train {TINY} --data 1 --optimizer shampoo --steps 100000", output=tmp_path)
    wait_for(process, lambda: len(losses(tmp_path, "shampoo")) > 2)
    children = psutil.Process(process.pid).children(recursive=True)
    victim = next(child for child in children if child.environ()["RANK"] == "1")
    victim.kill()
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "rank 1 of 2 was killed by SIGKILL" in one_line(err)
    assert f"--resume --output {tmp_path}" in err
    assert not any(child.is_running() for child in children)


@pytest.mark.slow
def test_dead_parent_leaves_no_processes(tmp_path: Path) -> None:
    process = start(f"train {TINY} --data 1 --optimizer adamw --steps 100000", output=tmp_path)
    wait_for(process, lambda: len(losses(tmp_path, "adamw")) > 2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(children, timeout=20)[1]


@pytest.mark.slow
def test_error_inside_a_rank_is_told_in_one_line(tmp_path: Path) -> None:
    code, _, err = run(f"train {TINY} --pipe 1 --data 1 --optimizer adamw --adamw-lr 1e38", output=tmp_path)
    assert code != 0
    assert "take a smaller --adamw-lr" in one_line(err)


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "shampoo3d.cli"]
    grid = "--pipe 1 --data 1 --model-parallel 2 --zero-stage 3"
    command = [*launcher, *f"train {TINY} {grid} --steps 4 --output {tmp_path / 'run'}".split()]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "optimizer's share" in result.stdout
    assert "4 steps of 64 bytes on pipe 1 x data 1 x model 2, ZeRO 3" in " ".join(result.stdout.split())
    assert (tmp_path / "run" / "ownership.png").exists()


WRONG = {
    "--text missing.txt": "--text missing.txt cannot be read: No such file or directory",
    "--processes 3": "--processes is 3, but --pipe 2 x --data 2 x --model-parallel 1 = 4",
    "--pipe 8": "--pipe 8 stages cannot share --layers 4",
    "--optimizer sgd": "--optimizer must be one of adamw, shampoo, both, not 'sgd'",
    "--steps many": "--steps",
    "--stepps 3": "--stepps",
    "--steps 0": "--steps must be at least 1, not 0",
    "--batch 30": "--batch 30 is not a multiple of --data 2 x --micro-batches 4 = 8",
    "--model-parallel 3": "--heads 4 is not a multiple of --model-parallel 3",
    "--model-parallel 0": "--model-parallel must be at least 1, not 0",
    "--zero-stage 4": "--zero-stage must be one of 0, 1, 2, 3, not 4",
    "--zero-stage 2": "--zero-stage 2 with --pipe 2: DeepSpeed offers no ZeRO 2 or 3 with a pipeline: take --pipe 1",
    "--heads 3": "--width 128 is not a multiple of --heads 3",
    "--shampoo-lr nan": "--shampoo-lr must be a positive number, not nan",
    "--device tpu": "--device must be one of auto, cpu, cuda, not 'tpu'",
    "--resume": "--resume needs --output",
    "--resume --output nowhere": "--output nowhere holds no run to resume",
    "--context 100000": "--context 100000 needs at least",
}


def refusal(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments.split())
    assert stop.value.code not in (0, None)
    return one_line(capsys.readouterr().err)


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_input_is_one_line(arguments: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert WRONG[arguments] in refusal(f"train {arguments}", capsys)
    finally:
        os.chdir(before)
    assert not list(tmp_path.iterdir())


def test_a_run_is_neither_overwritten_nor_resumed_as_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Settings(output=tmp_path, steps=7).save()
    assert "already holds a run" in refusal(f"train --output {tmp_path}", capsys)
    Settings(output=tmp_path, steps=7, text=Path("text.txt")).save()
    assert "text.txt cannot be read" in refusal(f"train --resume --output {tmp_path} --text text.txt", capsys)
    contradiction = refusal(f"train --resume --output {tmp_path} --steps 8", capsys)
    assert "--steps 8 contradicts the run" in contradiction
    assert "which has 7" in contradiction


def test_launcher_with_another_number_of_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "the launcher's WORLD_SIZE is 3" in refusal(f"train --output {tmp_path}", capsys)


def test_missing_extras_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    without = "import sys; sys.modules['typer'] = None; import shampoo3d.cli.commands"
    result = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True, env=environment())
    assert result.returncode != 0
    assert one_line(result.stderr) == 'shampoo3d: the command line needs typer: pip install "3d-shampoo[cli,deepspeed]"'
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'needs deepspeed: pip install "3d-shampoo[cli,deepspeed]"' in refusal("train", capsys)


def planned(arguments: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    """Return the rows that `shampoo3d plan` prints for each rank, by the headings of all tables."""
    with pytest.raises(SystemExit) as stop:
        cli.main(f"plan {arguments}".split())
    assert stop.value.code in (0, None)
    found: dict[str, dict[str, str]] = {}
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")]
        if line.startswith("┃"):
            header = cells
        elif line.startswith("│"):
            found.setdefault(cells[0], {}).update(
                (name if name not in found[cells[0]] else f"received {name}", cell)
                for name, cell in zip(header, cells, strict=True)
            )
    return list(found.values())


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


def test_plan_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = planned(f"--layers 6 --pipe 3 --data 3 --picture {tmp_path / 'plan.png'}", capsys)
    assert len(rows) == 9
    for row in rows:
        kinds = ("statistics", "roots", "momenta", "buffers", "transient")
        assert number(row["total"]) == pytest.approx(sum(number(row[kind]) for kind in kinds), abs=0.3)
        assert number(row["load / mean"]) == pytest.approx(1, abs=0.2)
        assert number(row["weights"]) > 0
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_plan_shows_what_an_accelerator_takes(capsys: pytest.CaptureFixture[str]) -> None:
    """A round at once, by another method; nothing travels."""
    [cpu], [cuda] = (planned(f"--layers 2 --pipe 1 --data 1 --device {device}", capsys) for device in ("cpu", "cuda"))
    assert number(cuda["transient"]) > 2 * number(cpu["transient"])
    assert {name for name in cuda if cuda[name] != cpu[name]} == {"transient", "total"}
    assert cpu["buffers"] == "0.0"
    assert "weights" not in cpu


def test_plan_shows_what_copies_of_roots_cost(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {copies: planned(f"--layers 2 --pipe 1 --data 4 --root-copies {copies}", capsys) for copies in (1, 2, 4)}
    found = {copies: ranks[-1] for copies, ranks in rows.items()}
    for copies, row in found.items():
        assert ("received roots" in row) == (copies > 1)
        assert ("weights" in row) == (copies < 4)
    for kind in ("roots", "momenta"):
        assert number(found[1][kind]) < number(found[2][kind]) < number(found[4][kind])
    statistics = [sum(number(rank["statistics"]) for rank in ranks) for ranks in rows.values()]
    assert statistics == pytest.approx([statistics[0]] * 3, abs=0.3)  # each of them shown to a tenth
    assert "--root-copies 2 needs replicas" in refusal("plan --pipe 1 --zero-stage 1 --root-copies 2", capsys)
    assert "--data 3 is not a multiple of --root-copies 2" in refusal("plan --data 3 --root-copies 2", capsys)


def test_files_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert "Not a directory" in refusal(f"train --output {tmp_path / 'file' / 'run'}", capsys)
    (tmp_path / "settings.json").write_text("{}")
    assert "does not hold the settings of a run" in refusal(f"train --resume --output {tmp_path}", capsys)
    assert "--picture plan.doc" in refusal("plan --picture plan.doc", capsys)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert not ended.value.code
    assert re.fullmatch(r"3d-shampoo \d+\.\d+\S*, torch \d+\.\d+\S*\n", capsys.readouterr().out)
