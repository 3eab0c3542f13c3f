"""Tables, targets and a figure of the results of ``benchmarks/step.py``.

python benchmarks/step_report.py [benchmarks/results/step.json] [--figure step.png]     prints the tables in Markdown
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peers import LOOP, LOOP_BLOCKS, OURS, OURS_REDUCED, PYTORCH_OPTIMIZER

Found = dict[str, Any]

COLUMNS: dict[str, Callable[[Found], str]] = {
    "width": lambda row: str(row["width"]),
    "block": lambda row: str(row["block"] or "-"),
    "every": lambda row: str(row["refresh"] or "-"),
    "optimizer": lambda row: row["optimizer"],
    "median ms": lambda row: f"{row['median'] * 1e3:.1f}",
    "mean ms": lambda row: f"{row['mean'] * 1e3:.1f}",
    "worst ms": lambda row: f"{row['worst'] * 1e3:.1f}",
    "heaviest / mean": lambda row: f"{row['heaviest']:.2f}",
    "all threads ms": lambda row: f"{row['process'] * 1e3:.1f}",
}
PRODUCTS: dict[str, Callable[[Found], str]] = {
    "width": lambda row: str(row["width"]),
    "block": lambda row: str(row["block"]),
    "GFLOP": lambda row: f"{row['gflop']:.2f}",
    "bmm GFLOP/s": lambda row: f"{row['bmm_gflops_per_second']:.0f}",
    "bmm ms": lambda row: f"{row['bmm_seconds'] * 1e3:.1f}",
    "statistics + application ms": lambda row: f"{row['stack_seconds'] * 1e3:.1f}",
    "of the bound": lambda row: f"{row['stack_fraction']:.0%}",
    "plain step ms": lambda row: f"{row['plain_step_seconds'] * 1e3:.1f}",
    "of the bound ": lambda row: f"{row['plain_step_fraction']:.0%}",
}


def markdown(rows: Iterable[Found], columns: dict[str, Callable[[Found], str]]) -> str:
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[column(row) for column in columns.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(rows: Sequence[Found], columns: dict[str, Callable[[Found], str]]) -> None:
    """On the terminal: with rich where it is installed."""
    if find_spec("rich") is None:
        print(markdown(rows, columns), flush=True)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*(column(row) for column in columns.values()))
    Console(width=140).print(table)


# ---- targets ---------------------------------------------------------------------------------------------------------


def targets(result: Found) -> list[Found]:
    """Targets, as far as they were measured."""
    found = []
    for bound in result["products"]:
        if bound["width"] in (256, 512) and bound["block"] == 256:
            name = f"statistics and application, width {bound['width']}, block 256, of the bound of products"
            found.append(_target(name, bound["stack_fraction"], least=0.6))
    rows = {(row["width"], row["block"], row["refresh"], row["optimizer"]): row for row in result["rows"]}
    for (*case, name), row in rows.items():
        if case == [256, 256, 10] and (name == PYTORCH_OPTIMIZER or name.startswith("Meta")):
            for variant in (OURS, OURS_REDUCED):
                times = row["mean"] / rows[256, 256, 10, variant]["mean"]
                told = f"mean step of {name} over that of {variant}, width 256, block 256"
                found.append(_target(told, times, least=2.5) if variant == OURS else _told(told, times))
    for block in LOOP_BLOCKS:
        loop, batched = (rows.get((256, block, 10, name)) for name in (LOOP, OURS))
        if loop and batched:
            name = f"mean step of the per-block loop over ours, width 256, block {block}"
            found.append(_target(name, loop["mean"] / batched["mean"], least=4.0))
    for (width, block, refresh, name), row in rows.items():
        if refresh == 10 and (name == OURS or name.startswith("Meta")):
            at = f"of {name} over its mean, width {width}, block {block}"
            heaviest = f"heaviest turn of the cycle {at}"
            value = row["heaviest"]
            found.append(_target(heaviest, value, most=1.3) if name == OURS else _told(heaviest, value))
            found.append(_told(f"slowest single step {at}", row["worst"] / row["mean"]))
    return found


def _target(name: str, value: float, least: float | None = None, most: float | None = None) -> Found:
    met = value >= least if least is not None else value <= (most or 0.0)
    return {"name": name, "measured": value, "least": least, "most": most, "met": met}


def _told(name: str, value: float) -> Found:
    return {"name": name, "measured": value, "least": None, "most": None, "met": None}


def show_targets(found: Iterable[Found]) -> None:
    for one in found:
        bound = next((f"{word} {one[word]}" for word in ("least", "most") if one[word] is not None), "for comparison")
        verdict = {True: "met", False: "NOT MET", None: ""}[one["met"]]
        print(f"{one['name']}: {one['measured']:.2f} ({bound.replace('least', 'at least').replace('most', 'at most')}) "
              f"{verdict}")  # fmt: skip


# ---- a figure --------------------------------------------------------------------------------------------------------


def figure(result: Found, output: Path, block: int = 256, refresh: int = 10) -> None:
    """Mean seconds per step of every optimizer against the width, and its worst step as a whisker."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["block"] in (block, None) and row["refresh"] in (refresh, None)]
    names, widths = ([*dict.fromkeys(row[key] for row in rows)] for key in ("optimizer", "width"))
    picture = Figure(figsize=(10, 5), layout="constrained")
    axes = picture.subplots()
    for number, name in enumerate(names):
        mine = [row for row in rows if row["optimizer"] == name]
        places = [widths.index(row["width"]) + 0.8 * ((number + 0.5) / len(names) - 0.5) for row in mine]
        means, worst = ([row[key] for row in mine] for key in ("mean", "worst"))
        up = [high - mean for high, mean in zip(worst, means, strict=True)]
        axes.errorbar(places, means, [[0.0] * len(up), up], fmt="os^D"[number % 4], lw=1, label=name)
    axes.set_xticks(range(len(widths)), [f"width {width}" for width in widths])
    axes.set_yscale("log")
    axes.grid(axis="y", lw=0.3)
    axes.set_ylabel(f"{result['setting']['seconds']} seconds per step; whisker: the worst step")
    axes.set_title(f"block {block}, roots every {refresh} steps")
    picture.legend(loc="outside right upper", fontsize=8)
    picture.savefig(output, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=Path(__file__).parent / "results" / "step.json")
    parser.add_argument("--figure", type=Path, help="draw it, too")
    options = parser.parse_args()
    result = json.loads(options.results.read_text())
    print(markdown(result["rows"], COLUMNS), markdown(result["products"], PRODUCTS), sep="\n\n")
    show_targets(result["targets"])
    if options.figure:
        figure(result, options.figure)


if __name__ == "__main__":
    main()
