"""Optimizers on real tasks: what loss they end with, and how soon they are where tuned AdamW ends.

python benchmarks/tasks/compare.py [--tasks gpt vit] [--optimizers AdamW 3D-Shampoo] [--seeds 3] [--text FILE]
    [--images FILE] [--path CLONE --peer "Meta=meta_shampoo:adam_graft"] [--figures FOLDER]

One process, one thread. Each run has the same weights, batches and schedule for a seed, whatever the optimizer. Rates
are tuned on seed 0 by the final validation loss, by the rule of `tuning.py`. A run is written when it ends, and is not
repeated where the same is asked for again, be it with more tasks, optimizers, rates or seeds: a comparison that was
stopped goes on. ``--again NAME`` repeats an optimizer's runs of these tasks.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from record import setting, write
from tasks.contenders import BASELINE, Contender, contenders, package_version, peer
from tasks.problems import ALL_NAMES, NAMES, Task, tasks
from tasks.report import figures, print_report
from tasks.training import EVALUATIONS, WARMUP, Outcome, train
from tasks.tuning import EXTENSIONS, central, tune

Found = dict[str, Any]


class Record:
    """The results so far, in a file: ``runs``, each with ``what`` was run, and ``tuned``, what was chosen of them."""

    def __init__(self, output: Path, again: Collection[tuple[str, str]] = ()) -> None:
        """Without what there was of the pairs of task and optimizer in ``again``."""
        self.output = output
        found: Found = json.loads(output.read_text()) if output.exists() else {"runs": [], "tuned": []}
        self.runs, self.tuned = (
            [one for one in found[part] if (one["what"]["task"], one["what"]["optimizer"]) not in again]
            for part in ("runs", "tuned")
        )
        self.setting = setting(
            device="CPU, one thread",
            warmup=WARMUP,
            evaluations=EVALUATIONS,
            extensions=EXTENSIONS,
            pytorch_optimizer=package_version(),
        )

    def outcome(self, task: Task, contender: Contender, settings: Found, seed: int) -> Found:
        """Return the result of the run that is there already, or else of a new one."""
        what = {**_about(task, contender), "settings": settings, "seed": seed}
        found = next((run for run in self.runs if run["what"] == what), None)
        if found is None:
            outcome = train(task, contender.make, settings, seed)
            _tell(what, outcome)
            where = {name: self.setting[name] for name in ("machine", "commit")}
            found = {"what": what, **where, **asdict(outcome)}
            self.runs.append(found)
            self.write()
        return found

    def tune(self, task: Task, contender: Contender) -> Found:
        """The best settings on seed 0."""

        def loss_of(settings: Found) -> float:
            final = self.outcome(task, contender, settings, seed=0)["final"]
            return math.inf if final is None else final

        tuned = tune(contender.rates, contender.alternative, loss_of)
        what = _about(task, contender)
        # What was chosen of an earlier grid, or for other settings under the same name, is superseded.
        self.tuned = [one for one in self.tuned if {**one["what"], "described": contender.settings} != what]
        self.tuned.append({"what": what, "best": tuned.best, "at_edge": tuned.at_edge, "trials": tuned.settings})
        self.write()
        return tuned.best

    def write(self) -> None:
        """Write a whole file, so that whoever stops the program finds the last results or the ones before."""
        part = self.output.with_suffix(".part")
        write(part, self.result)
        part.replace(self.output)

    @property
    def result(self) -> Found:
        return {"setting": self.setting, "tuned": self.tuned, "runs": self.runs}


def _about(task: Task, contender: Contender) -> Found:
    return {**task.facts, "optimizer": contender.name, "described": contender.settings}


def _tell(what: Found, outcome: Outcome) -> None:
    settings = ", ".join(f"{name} {value}" for name, value in what["settings"].items())
    loss = outcome.stopped if outcome.final is None else f"loss {outcome.final:.4f}"
    print(
        f"{what['task']}, {what['optimizer']}, {settings}, seed {what['seed']}: {loss}, "
        f"{outcome.training['cpu']:.1f} s ({outcome.optimizer['cpu']:.1f} s by the optimizer)",
        flush=True,
    )


def compare(task: Task, these: Sequence[Contender], seeds: int, record: Record, shorter: Sequence[float] = ()) -> None:
    """All are tuned; then the optimizers take turns, seed by seed, so that the machine's unrest is shared."""
    best = [(contender, record.tune(task, contender)) for contender in these]
    lengths = [task, *(task.shortened(round(part * task.steps)) for part in shorter)]
    for length, seed in itertools.product(lengths, range(seeds)):
        for contender, settings in best:
            record.outcome(length, contender, settings, seed)


def chosen(options: argparse.Namespace) -> list[Contender]:
    """AdamW, which sets the targets, and those asked for."""
    known = {contender.name: contender for contender in (*contenders(), *map(peer, options.peer))}
    names = [BASELINE, *(options.optimizers or known)]
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--optimizers: {', '.join(unknown)} not among {', '.join(known)}")
    found = [known[name] for name in dict.fromkeys(names)]
    return [replace(contender, rates=central(contender.rates, options.rates)) for contender in found]


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=ALL_NAMES, default=NAMES)
    parser.add_argument("--optimizers", nargs="+", help="all by default; AdamW is always among them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=int, default=5, help="learning rates of each grid, from its middle")
    parser.add_argument("--steps", type=int, help="instead of each task's own number")
    parser.add_argument(
        "--shorter",
        type=float,
        nargs="+",
        default=[],
        help="parts of the steps; runs with shorter schedules, not tuned",
    )
    parser.add_argument("--text", type=Path, help="a file to learn from, else what comes with Python")
    parser.add_argument("--images", type=Path, help="an .npz or .npz.xz of xtr, ytr, xte, yte, else scikit-learn's")
    parser.add_argument("--peer", action="append", default=[], help="NAME=MODULE:CALLABLE, see contenders.py")
    parser.add_argument("--path", action="append", default=[], help="a folder to import peers from")
    parser.add_argument("--again", nargs="+", default=[], help="optimizers whose runs in the file are not to be kept")
    parser.add_argument("--figures", type=Path, help="a folder for pictures")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results" / "tasks.json")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    torch.set_num_threads(1)
    sys.path[:0] = options.path
    if package_version() is None:
        print("pytorch_optimizer is not installed: SOAP and ScalableShampoo are left out")
    again = set(itertools.product(options.tasks, options.again))
    these, record = chosen(options), Record(options.output, again)
    for task in tasks(options.tasks, options.text, options.images):
        compare(task.shortened(options.steps or task.steps), these, options.seeds, record, options.shorter)
    print_report(record.result)
    if options.figures:
        figures(record.result, options.figures)


if __name__ == "__main__":
    main()
