"""The drawings in docs/images are made by scripts that still run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.slow
def test_the_matrix_under_zero_2(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(DOCS / "draw_zero2.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"zero2-matrix.png", "zero2-matrix.svg"}
    assert all((DOCS / "images" / path.name).exists() for path in tmp_path.iterdir())
