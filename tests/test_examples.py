"""The examples run, and learn, as their first lines say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
LAST_WORDS = "bytes from other ranks in a step"


def output_of(*command: str) -> str:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300)
    # On a loaded machine gloo may abort while it closes its connections, when all is done and said.
    closing = "Signal 6 (SIGABRT)" in done.stderr and LAST_WORDS in done.stdout
    assert done.returncode == 0 or closing, done.stderr[:4000] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_plain() -> None:
    found = output_of(str(EXAMPLES / "plain.py"))
    adamw, shampoo = (float(loss) for loss in re.findall(r"steps: ([\d.]+)", found))
    assert shampoo < adamw + 0.05
    assert re.search(r"2\.weight +256x512 +preconditioned .* 2 of 256x256", found)


def output_of_ranks(count: int, *command: str) -> str:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
    found = output_of(*launcher, *command)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", found)]
    assert losses[-1] < losses[0] / 2
    return found


@pytest.mark.slow
def test_deepspeed_pipeline() -> None:
    pytest.importorskip("deepspeed")
    found = output_of_ranks(4, str(EXAMPLES / "deepspeed_pipeline.py"))
    assert re.search(r"0\.weight +64x64 +preconditioned .* 4 of 32x32 .* 0-1", found)
    assert re.search(r"2\.weight +64x64 +preconditioned .* 4 of 32x32 .* 2-3", found)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [(), ("3",)])
def test_deepspeed_zero(stage: tuple[str, ...]) -> None:
    pytest.importorskip("deepspeed")
    found = output_of_ranks(2, str(EXAMPLES / "deepspeed_zero.py"), *stage)
    # Stages 1 and 2 give most of a matrix to one rank, which then owns its blocks.
    owners = re.findall(r"\.weight +\d+x64 +preconditioned .* \d of \d+x\d+ +\d+, \d+ +(\S+)", found)
    assert {rank for some in owners for rank in some.split("-")} == {"0", "1"}
    assert len(owners) == 3


@pytest.mark.slow
def test_a_run_goes_on_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    found = [
        output_of(*launcher, str(ranks), str(EXAMPLES / "deepspeed_resume.py"), str(folder), str(stage))
        for ranks, folder, stage in ((4, tmp_path / "a", 1), (2, tmp_path / "a", 3), (1, tmp_path / "b", 0))
    ]
    found.append(output_of(*launcher, "1", str(EXAMPLES / "deepspeed_resume.py"), str(tmp_path / "b"), "0"))
    moved, stayed = (re.findall(r"step (\d+): loss ([\d.]+)", a + b) for a, b in (found[:2], found[2:]))
    assert [step for step, _ in moved] == [str(step) for step in range(5, 41, 5)]
    assert float(moved[-1][1]) < float(moved[0][1]) / 2
    for (_, a), (_, b) in zip(moved, stayed, strict=True):
        assert float(a) == pytest.approx(float(b), rel=0.02, abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp.py", "fsdp2.py"])
def test_torch_alone(name: str) -> None:
    found = output_of_ranks(2, str(EXAMPLES / name))
    assert re.search(r"0\.weight +64x64 +preconditioned .* 4 of 32x32 .* 0-1", found)


IN_TURN = """
import runpy, shlex, sys
for line in sys.argv[1:]:
    sys.argv = shlex.split(line)
    sys.path[0] = sys.argv[0].rpartition("/")[0]
    print("example", line, flush=True)
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_trainers(tmp_path: Path) -> None:
    pytest.importorskip("hydra")  # with it all others of the extra
    again = [f"{name}.py {tmp_path / name}" for name in ("lightning_trainer", "hf_trainer", "accelerate_loop")]
    cli = f"lightning_cli.py fit --config {EXAMPLES / 'lightning_cli.yaml'}"
    lines = [line for line in again for _ in range(2)]
    lines += [cli, f"{cli} --optimizer.init_args.hyperparams.block_size 32"]
    lines += [f"hydra_optimizer.py {setting}" for setting in ("", "optimizer.hyperparams.block_size=32")]
    found = output_of("-c", IN_TURN, *(f"{EXAMPLES}/{line}" for line in lines)).split("example ")[1:]
    assert len(found) == len(lines)
    steps = [[int(step) for step in re.findall(r"^step (\d+): loss", part, re.MULTILINE)] for part in found]
    losses = [[float(loss) for loss in re.findall(r": loss ([\d.]+)", part)] for part in found]
    blocks = [int(re.search(r"2\.weight +\d+x\d+ +preconditioned .* (\d+) of ", part)[1]) for part in found[-4:]]
    assert all(of[-1] < of[0] * 0.9 for of in losses[::2])
    for first, second in ((0, 1), (2, 3), (4, 5)):  # a second run goes on
        assert steps[second][-1] > steps[first][-1]
        assert losses[second][-1] < losses[first][-1]
    assert blocks == [4, 64, 1, 2]


def test_each_is_short() -> None:
    pages = {path for path in EXAMPLES.glob("*.py") if path.name != "one_file_shampoo.py"}  # that is a whole optimizer
    assert all(len(path.read_text().splitlines()) < 80 for path in pages)
