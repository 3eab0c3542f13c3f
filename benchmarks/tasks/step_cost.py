"""Cost of a training step with each optimizer: side by side in one process, in turns, on one thread.

python benchmarks/tasks/step_cost.py [--tasks gpt vit] [--text FILE] [--images FILE]

The seconds of `compare.py` are of runs at different times of a machine that may be busy; these are not. Settings are
those that `compare.py` has chosen, if it has.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from record import setting, write
from step_report import markdown
from tasks.contenders import BASELINE, Contender, Settings, contenders
from tasks.problems import ALL_NAMES, NAMES, Task, tasks
from tasks.training import Stopwatch, training_step

OPTIMIZERS = (BASELINE, "3D-Shampoo", "Muon", "SOAP")
ROUNDS, STEPS, WARMUP = 5, 10, 12

Found = dict[str, Any]
Tuned = Mapping[tuple[str, str], Settings]
"""The best settings by task and optimizer."""
RESULTS = Path(__file__).parents[1] / "results"


class Trained:
    """A model with its optimizer, and milliseconds per step of each round."""

    def __init__(self, task: Task, contender: Contender, settings: Settings) -> None:
        self.task, self.model = task, task.make(0)
        self.optimizer = contender.make(self.model, **{"lr": min(contender.rates), **settings})
        self.batches = task.batches(0)
        self.whole: list[float] = []
        self.step: list[float] = []

    def train(self, steps: int) -> None:
        whole, step = Stopwatch(), Stopwatch()
        for _ in range(steps):
            batch = next(self.batches)
            with whole.running():
                training_step(self.task, self.model, self.optimizer, batch, step)
        self.whole.append(1e3 * whole.seconds["cpu"] / steps)
        self.step.append(1e3 * step.seconds["cpu"] / steps)


def measured(
    task: Task, these: Sequence[Contender], tuned: Tuned, rounds: int = ROUNDS, steps: int = STEPS
) -> list[Found]:
    """Medians over rounds, the first of which is not counted: it has the first roots and bases in it."""
    trained = {one.name: Trained(task, one, tuned.get((task.name, one.name), {})) for one in these}
    for number in range(rounds + 1):
        for one in trained.values():
            one.train(steps if number else WARMUP)
    # Forward and backward are the same for all: what differs there is where memory happened to lie.
    passes = statistics.median(
        w - s for one in trained.values() for w, s in zip(one.whole[1:], one.step[1:], strict=True)
    )
    step = {name: statistics.median(one.step[1:]) for name, one in trained.items()}
    adamw = passes + step[these[0].name]
    return [
        {
            "task": task.name,
            "optimizer": name,
            "passes_ms": round(passes, 2),
            "optimizer_ms": round(ms, 2),
            "of_adamw": round((passes + ms) / adamw, 3),
        }
        for name, ms in step.items()
    ]


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=ALL_NAMES, default=NAMES)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS / "tasks_step_cost.json")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    known = {contender.name: contender for contender in contenders()}
    these = [known[name] for name in OPTIMIZERS if name in known]
    path = RESULTS / "tasks.json"
    chosen = json.loads(path.read_text())["tuned"] if path.exists() else []
    tuned = {(one["what"]["task"], one["what"]["optimizer"]): one["best"] for one in chosen}
    rows = [row for task in tasks(options.tasks, options.text, options.images) for row in measured(task, these, tuned)]
    write(options.output, {"setting": setting(device="CPU, one thread"), "rows": rows})
    print(markdown(rows, {name: lambda row, name=name: str(row[name]) for name in rows[0]}))


if __name__ == "__main__":
    main()
