"""All that is to be known of a GPU, by one command in about seven minutes; exit status 1 if any part failed.

python benchmarks/gpu.py [--seconds 420] [--page docs/gpu.md] [--path CLONE --peer "Meta=meta_shampoo:same"]
python benchmarks/gpu.py --toy                    everything on the CPU at toy sizes, as also where there is no CUDA
python benchmarks/gpu.py --only steps             one part, in this process
python benchmarks/gpu.py --from-json benchmarks/results/gpu.json --page docs/gpu.md     the page only

Each part has a share of the time, and leaves out repetitions and then measurements to keep to it; on a GPU it has a
process of its own. Results are written as they come, and a part that fails stops no other one.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
from gpu_parts import allocated, graph, rates, reads, results, steps, training
from gpu_parts.bench import FULL, TOY
from gpu_parts.page import page
from gpu_parts.running import Part, failures, run
from peers import peer

PARTS = {
    "results": Part(results.results, 40, results),
    "waiting": Part(reads.reads, 25, reads),
    **{f"graph, {name}": Part(partial(graph.graph, name=name), 12, graph) for name in ("classic", "default", "soap")},
    "memory": Part(allocated.forecast, 30, allocated),
    "rates": Part(rates.rates, 50, rates),
    "steps": Part(steps.steps, 140, steps),
    "training": Part(training.training, 100, training),
}
HERE = Path(__file__).resolve()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=420.0, help="in which it ought to be done")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--toy", action="store_true", help="toy sizes on the CPU")
    sizes.add_argument("--full", action="store_true", help="refuse to run without CUDA, rather than at toy sizes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--peer", action="append", default=[], help="NAME=MODULE:CALLABLE, see meta_shampoo.py")
    parser.add_argument("--path", action="append", default=[], help="a folder to import peers from")
    parser.add_argument("--output", type=Path, help="results/gpu.json here, or of a toy runs/gpu-toy.json")
    parser.add_argument("--page", type=Path, help="a page in Markdown to write")
    parser.add_argument("--from-json", type=Path, help="measure nothing: make the page of these results")
    options = parser.parse_args()
    options.toy = options.toy or not torch.cuda.is_available()
    if options.full and options.toy:
        parser.error("--full: there is no CUDA")
    options.device = torch.device("cpu" if options.toy else "cuda:0")
    options.size = TOY if options.toy else FULL
    if options.output is None:
        options.output = (
            HERE.parents[1] / "runs" / "gpu-toy.json" if options.toy else HERE.parent / "results" / "gpu.json"
        )
    return options


def main() -> None:
    options = arguments()
    if options.from_json:
        result = json.loads(options.from_json.read_text())
    else:
        if options.toy:
            torch.set_num_threads(1)
        sys.path[:0] = options.path
        for named in options.peer:  # a wrong one is to be told at once
            peer(named)
        lists = (("--peer", options.peer), ("--path", options.path))
        passed_on = ["--toy" if options.toy else "--full"] + [
            f"{name}={value}" for name, values in lists for value in values
        ]
        result = run(PARTS, HERE, options, passed_on)
        print(f"{options.output} written")
    if options.page:
        options.page.write_text(page(result, PARTS))
    failed = list(failures(result))
    sys.exit("\n".join(["FAILED", *failed]) if failed else 0)


if __name__ == "__main__":
    main()
