"""The examples run, and learn, as their first lines say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def output_of(*command: str) -> str:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_plain() -> None:
    found = output_of(str(EXAMPLES / "plain.py"))
    adamw, shampoo = (float(loss) for loss in re.findall(r"steps: ([\d.]+)", found))
    assert shampoo < adamw + 0.05
    assert re.search(r"2\.weight +256x512 +preconditioned +2", found)


@pytest.mark.slow
def test_deepspeed_pipeline() -> None:
    pytest.importorskip("deepspeed")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")
    found = output_of(*launcher, str(EXAMPLES / "deepspeed_pipeline.py"))
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", found)]
    assert losses[-1] < losses[0] / 2
    assert re.search(r"0\.weight +64x64 +preconditioned +4 +0-1", found)
    assert re.search(r"2\.weight +64x64 +preconditioned +4 +2-3", found)


def test_each_is_short() -> None:
    assert all(len(path.read_text().splitlines()) < 80 for path in EXAMPLES.glob("*.py"))
