"""The log of one optimizer's run: JSON lines that rank 0 writes, from which all that is shown afterwards is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""A record whose `event` is one of "step", "watched", "validation", "finished", "error"; see `Trainer` for the rest."""

Report = Callable[[Record], None]


class Log:
    """A log that appends records to `path`, each complete on disk before the next step begins."""

    def __init__(self, path: Path, report: Report, keep: int) -> None:
        """Continue after step `keep`: report the records up to it, drop later ones, whose steps are trained again."""
        records = [record for record in read(path) if record["step"] <= keep and record["event"] != "finished"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        self.seconds: float = records[-1]["seconds"] if records else 0.0
        for record in records:
            report(record)
        self._file = path.open("a", buffering=1)
        self._report = report

    def write(self, **record: Any) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._report(record)


def read(path: Path) -> list[Record]:
    """Read all complete records; a run that was ended in the middle of a line loses that line."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def finished(path: Path) -> bool:
    records = read(path)
    return bool(records) and records[-1]["event"] == "finished"
