"""The table of ``shampoo3d train --watch``, from the records of a run."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from shampoo3d.cli.train.display import Display, watched
from shampoo3d.cli.train.settings import RunError, Settings

RANK = {
    **{f"shampoo/{kind}_norm/total": value for kind, value in (("gradient", 3.0), ("update", 0.03), ("weight", 3.0))},
    **{"shampoo/update_ratio/max": 0.2, "shampoo/condition/max": 1e4, "shampoo/root_age/max": 9.0},
    **{"shampoo/failed_roots": 1.0, "shampoo/skipped_steps": 2.0},
    **{"shampoo/seconds/roots": 0.3, "shampoo/seconds/weights": 0.1, "shampoo/seconds/total": 0.4},
}


def test_a_row_has_the_numbers_of_all_ranks() -> None:
    other = RANK | {"shampoo/gradient_norm/total": 4.0, "shampoo/condition/max": 1e5}
    row = watched(20, [RANK, other])
    assert row == ("20", "5.0e+00", "1.0e-02", "2.0e-01", "1.0e+05", "9", "2", "2", "roots 75 %")


def test_of_a_step_that_nobody_recorded_there_is_nothing() -> None:
    assert watched(1, [{"shampoo/skipped_steps": 1.0}])[1:] == (*["0.0e+00"] * 4, "0", "0", "1", "")


def test_rows_stand_below_one_head(tmp_path: Path) -> None:
    out = io.StringIO()
    settings = Settings(output=tmp_path, optimizer="shampoo", watch=10)
    with Display(settings, Console(file=out, width=80)) as display:
        for step in (10, 20):
            display.show({"optimizer": "shampoo", "event": "watched", "step": step, "ranks": [RANK]})
    lines = [line.split() for line in out.getvalue().splitlines() if "update/weight" in line or "roots" in line]
    assert [line[0] for line in lines] == ["step", "10", "20"]


def test_steps_between_lines_are_not_negative(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="--watch -1 must not be negative"):
        Settings(output=tmp_path, watch=-1)
