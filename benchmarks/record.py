"""Circumstances of a measurement: machine, versions, commit."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def setting(**what: Any) -> dict[str, Any]:
    """Describe a measurement: ``what``, and the machine, versions and commit ("-dirty": changes not committed)."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    return {
        **what,
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit or "unknown",
    }


def processor() -> str:
    """The CPU's name as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(output: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
