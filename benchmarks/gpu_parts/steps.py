"""Seconds of a step on the weights of GPT-2's layers, ours against others, and its share of a training step.

Table "steps": the matrices and vectors of all layers. Embeddings are left out for all, since the presets leave them to
Adam. Each optimizer alone on the device, steps one by one ("slowest") and in a row ("mean"), which hides launches.
Table "training": the whole model with its embeddings; passes in bfloat16 (autocast) of some micro-batches, then a step;
"share" is the part of this time that is not that of the passes alone.
"""

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from typing import Any

import torch
from gpu_parts.bench import FAULT, PRESETS, Bench, Found, Row, Shape, first_line, put_gradients
from peers import LR, OURS, OURS_REDUCED, Contender, Params, contenders, optional_contenders, peer
from step import Clock
from torch import nn
from torch.nn.functional import cross_entropy

from shampoo3d import Shampoo, ShampooHyperParams

EXPONENT = 4  # of those that are set up as in ``benchmarks/step.py``
LEAST_STEPS = 3
MEASURED_CYCLES = 2
DEAR = 0.1
"""Part of all time that no case may take of which it is known beforehand."""
DEFAULT = "3D-Shampoo default"
AUTO, BESIDE, SOAP = f"{DEFAULT}, block auto", f"{DEFAULT}, asynchronous", "3D-Shampoo soap"
ADAMW = "torch AdamW"
WHOLE = (ADAMW, DEFAULT, AUTO, BESIDE, SOAP)
"""Optimizers that know what to do with embeddings: training steps of whole models are measured with them."""


def preset(
    params: Params, block: int | str, refresh: int, exponent: int, *, name: str, beside: bool = False
) -> Shampoo:
    """Make a preset without fresh first steps, which cost more than later ones and are few."""
    hp: ShampooHyperParams = PRESETS[name](block_size=block, preconditioning_compute_steps=refresh)
    computation = replace(hp.computation, fresh_steps=0, asynchronous=beside)
    return Shampoo(params, LR, hyperparams=replace(hp, computation=computation))


def auto(params: Params, block: int, refresh: int, exponent: int) -> Shampoo:
    """Make the default preset with the blocks that it chooses."""
    return preset(params, "auto", refresh, exponent, name="default")


def ours() -> Iterator[Contender]:
    yield Contender(DEFAULT, "preset, fresh_steps=0", partial(preset, name="default"))
    yield Contender(AUTO, "block_size='auto'", auto, blocks=False, everywhere=False)
    beside = partial(preset, name="default", beside=True)
    yield Contender(BESIDE, "roots beside the training", beside, threads=True, everywhere=False)
    yield Contender(SOAP, "preset", partial(preset, name="soap"))


def own(bench: Bench) -> list[Contender]:
    """Return PyTorch's optimizers and ours."""
    known = {contender.name: contender for contender in contenders()}
    return [known[ADAMW], known["torch Muon"], *ours(), known[OURS], known[OURS_REDUCED]]


def foreign(bench: Bench) -> list[Contender]:
    return [*map(peer, bench.peers), *optional_contenders()]


# ---- steps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    model: Shape
    contender: Contender
    block: int
    refresh: int

    @property
    def about(self) -> Row:
        c = self.contender
        about: Row = {"model": self.model.name, "optimizer": c.name}
        return about | {"block": self.block if c.blocks else "-", "roots every": self.refresh if c.refreshes else "-"}


class Prices:
    """Seconds that optimizers took for each parameter, so that dear ones do not take the time of all."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.known: dict[str, float] = {}

    def affords(self, name: str, parameters: int) -> bool:
        return self.known.get(name, 0.0) * parameters < min(self.bench.left(), DEAR * self.bench.seconds)

    def learn(self, name: str, parameters: int, seconds: float) -> None:
        self.known[name] = max(self.known.get(name, 0.0), seconds / parameters)


def measured(case: Case, params: Params, bench: Bench) -> Row:
    """Seconds of the first steps, up to all roots, and of later ones: one by one, and in a row."""
    clock, limit = Clock(bench.device), DEAR * bench.seconds
    optimizer = case.contender.make(params, case.block, case.refresh, EXPONENT)
    first = [clock(optimizer.step)]
    while len(first) < case.refresh + 1 and sum(first) < limit:
        first.append(clock(optimizer.step))
    single: list[float] = []
    while len(single) < max(case.refresh, LEAST_STEPS) and (len(single) < LEAST_STEPS or sum(single) < limit):
        single.append(clock(optimizer.step))
    count = len(single) * (MEASURED_CYCLES if sum(single) < limit / 4 else 1)
    in_a_row = clock(lambda: [optimizer.step() for _ in range(count)]) / count if sum(single) < limit else None
    return {
        "mean ms": 1e3 * (in_a_row or statistics.mean(single)),
        "median ms": 1e3 * statistics.median(single),
        "slowest ms": 1e3 * max(single),
        "first ms": 1e3 * first[0],
        "steps": count,
    }


def freed(bench: Bench) -> None:
    """Give back what the last optimizer had."""
    gc.collect()
    if bench.cuda:
        torch.cuda.empty_cache()


def steps(bench: Bench) -> Found:
    """Seconds of a step against those of other optimizers, and its share of a training step."""
    block, refresh = bench.size.blocks[0], bench.size.refreshes[0]
    models, prices = bench.size.models, Prices(bench)
    adamw: dict[str, float] = {}
    for contender in (*own(bench), *foreign(bench)):
        yield "optimizers", {"optimizer": contender.name, "settings": contender.settings}
    if find_spec("pytorch_optimizer") is None:
        yield "left out", {"optimizer": "those of pytorch_optimizer", "why": "it is not installed"}
    for model in models:
        yield from compared([Case(model, contender, block, refresh) for contender in own(bench)], prices, adamw)
        yield from whatever_happens(training(model, prices), model)
    places = [(b, r) for r in bench.size.refreshes for b in bench.size.blocks if (b, r) != (block, refresh)]
    ours_everywhere = [c for c in own(bench) if c.everywhere and c.refreshes]
    for contender in ours_everywhere[:1]:
        yield from compared([Case(model, contender, *at) for model in models for at in places], prices, adamw)
    for model in models[:1]:
        yield from compared([Case(model, contender, block, refresh) for contender in foreign(bench)], prices, adamw)
    for contender in ours_everywhere[1:]:
        yield from compared([Case(model, contender, *at) for model in models for at in places], prices, adamw)
    for model in models[1:]:
        yield from compared([Case(model, contender, block, refresh) for contender in foreign(bench)], prices, adamw)


def whatever_happens(found: Found, model: Shape) -> Found:
    """Go on with what comes after; too little memory is no fault."""
    try:
        yield from found
    except Exception as error:  # the steps alone are still to be measured
        verdict = "not measured" if isinstance(error, torch.OutOfMemoryError) else FAULT
        row = {"model": model.name, "optimizer": "training", "why": first_line(error), "verdict": verdict}
        yield "left out", row


def compared(cases: Sequence[Case], prices: Prices, adamw: dict[str, float]) -> Found:
    """Measure one case after the other; ``adamw`` has its milliseconds for each model, once it was measured."""
    bench = prices.bench
    for shape, alike in groupby(cases, key=lambda case: case.model):
        freed(bench)
        params = list(shape.make(bench.device).blocks.parameters())
        put_gradients(params)
        count = sum(param.numel() for param in params)
        for case in alike:
            name = case.contender.name
            if not prices.affords(name, count):
                yield "left out", {**case.about, "why": f"too long, {max(0.0, bench.left()):.0f} s are left"}
                continue
            before = bench.left()
            try:
                row = measured(case, params, bench)
            except Exception as error:  # other people's too: the others are still to be measured
                mine = name.startswith("3D-Shampoo") and not isinstance(error, torch.OutOfMemoryError)
                yield "left out", {**case.about, "why": first_line(error), "verdict": FAULT if mine else "not measured"}
            else:
                least = adamw.setdefault(case.model.name, row["mean ms"])  # the first of each model is AdamW
                yield "steps", {**case.about, **row, "times AdamW": row["mean ms"] / least}
            prices.learn(name, count, before - bench.left())
            freed(bench)


# ---- training steps --------------------------------------------------------------------------------------------------


def passes(model: nn.Module, tokens: torch.Tensor, targets: torch.Tensor, times: int) -> None:
    """Forward and backward of as many micro-batches, into gradients that begin anew."""
    model.zero_grad()
    for _ in range(times):
        with torch.autocast(tokens.device.type, torch.bfloat16):
            loss = cross_entropy(model(tokens).flatten(0, 1), targets.flatten()) / times
        loss.backward()


def training(shape: Shape, prices: Prices) -> Found:
    """Measure training steps of the whole model with each optimizer."""
    bench = prices.bench
    sequences, times = bench.size.sequences
    block, refresh = bench.size.blocks[0], bench.size.refreshes[0]
    freed(bench)
    model = shape.make(bench.device)
    parameters = sum(param.numel() for param in model.blocks.parameters())
    tokens, targets = torch.randint(shape.vocabulary, (2, sequences, shape.context), device=bench.device)
    forward = partial(passes, model, tokens, targets, times)
    alone = Clock(bench.device).median(forward, bench.size.repeats)
    for contender in (c for c in own(bench) if c.name in WHOLE):
        row = {"model": shape.name, "optimizer": contender.name, "tokens": sequences * times * shape.context}
        if not prices.affords(contender.name, parameters):
            yield "left out", {**row, "why": f"training too long, {max(0.0, bench.left()):.0f} s are left"}
            continue
        optimizer = contender.make(list(model.parameters()), block, refresh, EXPONENT)
        together = _training_seconds(forward, optimizer, refresh, bench)
        row |= {"passes ms": 1e3 * alone, "passes and step ms": 1e3 * together}
        yield "training", {**row, "step ms": 1e3 * (together - alone), "share": 1 - alone / together}
        del optimizer
        freed(bench)


def _training_seconds(forward: Callable[[], None], optimizer: Any, refresh: int, bench: Bench) -> float:
    """Seconds of a training step, over whole cycles of roots, after one."""

    def work(count: int) -> None:
        for _ in range(count):
            forward()
            optimizer.step()

    work(refresh + 1)
    count = refresh * (MEASURED_CYCLES if bench.left() > bench.seconds / 2 else 1)
    return Clock(bench.device)(partial(work, count)) / count
