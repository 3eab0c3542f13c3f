"""The cases on the stand-in for an accelerator, in a process of their own: registering it changes what others do."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parent / "standin_cases.py"


def passed(*options: str) -> int:
    paths = [str(CASES.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CASES.parents[2])
    assert done.returncode == 0, done.stdout[-4000:]
    return int(re.findall(r"(\d+) passed", done.stdout)[0])


def test_an_accelerator_would_mind_nothing() -> None:
    assert passed() >= 12


@pytest.mark.slow
def test_an_accelerator_would_not_mind_other_settings() -> None:
    assert passed("-m", "slow") >= 18
