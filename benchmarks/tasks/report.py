"""Tables and pictures of the results of ``compare.py``.

python benchmarks/tasks/report.py [benchmarks/results/tasks.json] [--figures FOLDER]       prints the tables in Markdown
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from step_report import markdown, show
from tasks.contenders import BASELINE
from tasks.tuning import median_reached, reached

Found = dict[str, Any]

AXES = {"steps": "steps", "cpu": "CPU time (s)", "wall": "wall-clock time (s)"}
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), "-", "--", "-.")
"""Told apart in grey, too, together with the marks; those of the optimizers in the order of a table."""
MARKS = ("", "", "", "", "", "o", "s", "^")


def summary(result: Found) -> dict[str, list[Found]]:
    """Rows by task and its data and budget: one for each optimizer that was tuned, AdamW's first."""
    tables: dict[str, list[Found]] = {}
    for tuned in sorted(result["tuned"], key=lambda one: one["what"]["optimizer"] != BASELINE):
        about = tuned["what"]
        name = "{task}: {data}; {parameters} parameters, {steps} steps of {batch}".format(**about)
        tables.setdefault(name, []).append(_row(tuned, result["runs"]))
    for rows in tables.values():
        _compare(rows)
    return tables


def _row(tuned: Found, runs: Sequence[Found]) -> Found:
    """Results of an optimizer by itself."""
    about, best = tuned["what"], tuned["best"]
    mine = [run for run in runs if about.items() <= run["what"].items()]
    losses = {str(run["what"]["settings"]): run["final"] for run in mine if run["what"]["seed"] == 0}
    full = [run for run in mine if run["what"]["settings"] == best]
    return {
        "optimizer": about["optimizer"],
        "steps": about["steps"],
        "best": best,
        "at_edge": tuned["at_edge"],
        "trials": [{"settings": trial, "loss": losses[str(trial)]} for trial in tuned["trials"]],
        "finals": (finals := _finals(full)),
        "final": statistics.median(finals),
        "training": _training(full),
        "share": statistics.median(run["optimizer"]["cpu"] / run["training"]["cpu"] for run in full),
        "curves": [run["curve"] for run in full],
        "shorter": _shorter({**about, "settings": best}, runs),
    }


def _finals(runs: Sequence[Found]) -> list[float]:
    return [math.inf if run["final"] is None else run["final"] for run in runs]


def _training(runs: Sequence[Found]) -> dict[str, float]:
    """Median seconds of all training."""
    return {clock: statistics.median(run["training"][clock] for run in runs) for clock in ("cpu", "wall")}


def _shorter(what: Found, runs: Sequence[Found]) -> dict[int, Found]:
    """Median final losses and seconds by the number of steps, of runs with the same settings and fewer steps."""
    found: dict[int, list[Found]] = {}
    for run in sorted(runs, key=lambda run: run["what"]["steps"]):
        steps = run["what"]["steps"]
        if steps < what["steps"] and {**what, "steps": steps}.items() <= run["what"].items():
            found.setdefault(steps, []).append(run)
    return {steps: {"final": statistics.median(_finals(some)), **_training(some)} for steps, some in found.items()}


def _compare(rows: Sequence[Found]) -> None:
    """Tell when each row was at the median final loss of the first, AdamW's, and what part of AdamW's time that is."""
    target, whole = rows[0]["final"], {"steps": rows[0]["steps"], **rows[0]["training"]}
    for row in rows:
        row["target"] = target
        row["reached"] = {axis: median_reached(row["curves"], target, axis) for axis in AXES}
        row["part"] = {axis: _part(row["reached"][axis], rows[0]["reached"][axis]) for axis in AXES}
        row["needed"] = _needed(row)
        row["needed_part"] = {axis: _part(row["needed"][axis], whole[axis]) for axis in AXES}


def _needed(row: Found) -> dict[str, float]:
    """The least budget that ends at the target, each with a schedule of its own; straight lines between those tried."""
    tried = [*row["shorter"].values(), {"final": row["final"], **row["training"]}]
    curve = {
        "steps": [*row["shorter"], row["steps"]],
        "losses": [one["final"] for one in tried],
        "seconds": {clock: [one[clock] for one in tried] for clock in ("cpu", "wall")},
    }
    return reached(curve, row["target"]) or dict.fromkeys(AXES, math.inf)


def _part(own: float, baseline: float) -> float:
    """Not a number where AdamW has learnt nothing, so that there is nothing to compare with."""
    return own / baseline if 0 < baseline < math.inf else math.nan


# ---- tables ----------------------------------------------------------------------------------------------------------


def _settings(settings: Found) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _loss(loss: float | None) -> str:
    return "diverged" if loss is None or math.isinf(loss) else f"{loss:.4g}"


def _reached(axis: str, unit: str, found: str = "reached", share: str = "part") -> Callable[[Found], str]:
    def column(row: Found) -> str:
        at, part = row[found][axis], row[share][axis]
        return f"{at:.0f}{unit} ({part:.0%})" if math.isfinite(at) else "not reached"

    return column


COLUMNS: dict[str, Callable[[Found], str]] = {
    "optimizer": lambda row: row["optimizer"],
    "tuned": lambda row: _settings(row["best"]) + (" (edge)" if row["at_edge"] else ""),
    "final loss": lambda row: _loss(row["final"]),
    "its range": lambda row: f"{_loss(min(row['finals']))} to {_loss(max(row['finals']))}",
    "seeds": lambda row: str(len(row["finals"])),
    "steps to AdamW's": _reached("steps", ""),
    "CPU s to it": _reached("cpu", " s"),
    "wall s to it": _reached("wall", " s"),
    "CPU s in all": lambda row: f"{row['training']['cpu']:.0f}",
    "optimizer's share": lambda row: f"{row['share']:.0%}",
}
SHORTER: dict[str, Callable[[Found], str]] = {
    "optimizer": lambda row: row["optimizer"],
    "final loss of runs with fewer steps": lambda row: "; ".join(
        f"{steps} steps: {_loss(run['final'])}{' (reached)' * (run['final'] <= row['target'])}"
        for steps, run in row["shorter"].items()
    ),
    "steps needed for AdamW's": _reached("steps", "", "needed", "needed_part"),
    "CPU s needed": _reached("cpu", " s", "needed", "needed_part"),
    "wall s needed": _reached("wall", " s", "needed", "needed_part"),
}
TRIALS: dict[str, Callable[[Found], str]] = {
    "optimizer": lambda row: row["optimizer"],
    "final loss of each trial, seed 0": lambda row: "; ".join(
        f"{_settings(trial['settings'])}: {_loss(trial['loss'])}" for trial in row["trials"]
    ),
}


def print_report(result: Found, *, in_markdown: bool = False) -> None:
    for name, rows in summary(result).items():
        print(f"\n{name}\n", flush=True)
        for columns in (COLUMNS, SHORTER, TRIALS) if any(row["shorter"] for row in rows) else (COLUMNS, TRIALS):
            if in_markdown:
                print(markdown(rows, columns) + "\n")
            else:
                show(rows, columns)


# ---- pictures --------------------------------------------------------------------------------------------------------


def figures(result: Found, folder: Path) -> None:
    """For each task the losses against steps, CPU seconds and passed seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    for (name, rows), path in zip(summary(result).items(), _paths(result, folder), strict=True):
        figure(name, rows, path)


def _paths(result: Found, folder: Path) -> Iterator[Path]:
    """Numbered where a task is there with other data or another budget, too."""
    tasks = [name.partition(":")[0] for name in summary(result)]
    for place, task in enumerate(tasks):
        before = tasks[:place].count(task)
        yield folder / f"{task}{f'_{before + 1}' if before else ''}.png"


def figure(name: str, rows: Sequence[Found], output: Path) -> None:
    """A line for the median of the seeds and a band for their range; the target is dashed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    picture = Figure(figsize=(11, 4), layout="constrained")
    axes = picture.subplots(1, len(AXES), sharey=True)
    for place, (axis, label) in zip(axes, AXES.items(), strict=True):
        for number, row in enumerate(rows):
            _draw(place, row, axis, number)
        place.axhline(rows[0]["target"], color="black", lw=0.8, ls="--")
        place.set_xlabel(label)
        place.set_yscale("log")
        for axes_of in (place.yaxis.set_major_formatter, place.yaxis.set_minor_formatter):
            axes_of(FuncFormatter(lambda loss, _: f"{loss:g}"))
        place.grid(lw=0.3, which="both")
    # What matters is near the target, neither the first losses nor those of a run that diverges.
    least = min(min(curve["losses"]) for row in rows for curve in row["curves"])
    axes[0].set_ylim(0.98 * least, min(3 * rows[0]["target"], 1.05 * rows[0]["curves"][0]["losses"][0]))
    axes[0].set_ylabel("validation loss (nats)")
    picture.suptitle(name, fontsize=9, x=0.01, ha="left")
    picture.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    picture.savefig(output, dpi=200)


def _draw(place: Any, row: Found, axis: str, number: int) -> None:
    """Draw the median of the seeds' curves, up to where the first of them ends."""
    curves = row["curves"]
    marks = min(len(curve["losses"]) for curve in curves)
    times = [curve["steps"] if axis == "steps" else curve["seconds"][axis] for curve in curves]
    x = [statistics.median(time[mark] for time in times) for mark in range(marks)]
    losses = [[curve["losses"][mark] for curve in curves] for mark in range(marks)]
    color = f"C{number}"
    look = number % len(STYLES)
    style = {"linestyle": STYLES[look], "marker": MARKS[look], "markersize": 3, "markevery": 3}
    place.plot(x, [statistics.median(some) for some in losses], color=color, lw=1.2, label=row["optimizer"], **style)
    place.fill_between(x, [min(some) for some in losses], [max(some) for some in losses], color=color, alpha=0.15, lw=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[1] / "results" / "tasks.json"
    parser.add_argument("results", type=Path, nargs="?", default=default)
    parser.add_argument("--figures", type=Path, help="a folder for pictures")
    options = parser.parse_args()
    result = json.loads(options.results.read_text())
    print_report(result, in_markdown=True)
    if options.figures:
        figures(result, options.figures)


if __name__ == "__main__":
    main()
