"""Forecasts as tables, as sentences, and as plain data for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from rich.table import Table

from shampoo3d.checkpoint.manifest import flatten_settings

from .forecast import Forecast, Kind, cheapest

COUNTS = ("blocks",)
PIPELINE = (
    "the numbered layers are cut evenly by their parameters; what is before and after them is on the first and last "
    "stage, a tied embedding on the first only"
)
TENSOR = (
    "as in Megatron, queries, keys, values, gates and first layers are divided by outputs, second layers by inputs, "
    "embeddings by words, as their names tell; all else is on every tensor-parallel rank"
)

EXPERTS = (
    "data-parallel neighbours hold other experts each, as in DeepSpeed; those at the same place of each such set hold "
    "the same ones{}"
)


class Summary(NamedTuple):
    """A number of each rank: the least, the mean, the most and the rank that has it."""

    least: float
    mean: float
    most: float
    rank: int

    @classmethod
    def of(cls, numbers: Mapping[int, float]) -> Summary:
        worst = max(numbers, key=numbers.__getitem__)
        return cls(min(numbers.values()), sum(numbers.values()) / len(numbers), numbers[worst], worst)


def summaries(forecast: Forecast) -> dict[str, Summary]:
    """Summarize over the ranks what they do, keep and receive."""
    found = {name: Summary.of(numbers) for name, numbers in forecast.by_rank.items()}
    received = forecast.received
    for name in next(iter(received.values())):
        found[f"received {name}"] = Summary.of({rank: of[name] for rank, of in received.items()})
    return found


def as_data(forecast: Forecast, *, compare: bool) -> dict[str, Any]:
    """Return all that the tables show, in numbers."""
    request = forecast.request
    return {
        "request": asdict(request),
        "settings": flatten_settings(forecast.hp),
        "ranks": request.world,
        "parameters": forecast.elements,
        "active parameters": forecast.active,
        "per rank": {name: summary._asdict() for name, summary in summaries(forecast).items()},
        "ranks whose traffic was counted": forecast.looked_at,
        "memory": {rank: asdict(peak) | {"total": peak.total} for rank, peak in forecast.peaks.items()},
        "max / mean": forecast.imbalance,
        "idle ranks": forecast.idle,
        "share of a step": forecast.share,
        "fits": None if request.limit is None else forecast.fits,
        "would fit": [
            {"data": of.request.data, "block size": of.hp.block_size, "state": of.state[of.worst]}
            for of in forecast.remedies
        ],
        "compared": _compared(forecast) if compare else [],
        "kinds": [
            {"name": of.name, "count": of.count, "elements": of.elements, "divided": of.divided, **asdict(of.row)}
            for of in forecast.kinds
        ],
    }


def _compared(forecast: Forecast) -> list[dict[str, Any]]:
    best = cheapest(forecast.compared)
    return [
        {
            "block size": of.hp.block_size,
            "cost": max(of.cost.values()),
            "share of a step": of.share,
            "max / mean": of.imbalance,
            "idle ranks": of.idle,
            "state": of.state[of.worst],
            "fits": of.fits,
            "cheapest": of is best,
        }
        for of in forecast.compared
    ]


def shown(forecast: Forecast, *, compare: bool) -> list[Table | str]:
    """Return what is shown of the forecast, and whether it fits; if asked, next to other block sizes."""
    request = forecast.request
    dtypes = ", ".join(dict.fromkeys(param.dtype for param in forecast.parameters))
    title = (
        f"{request.model}: {forecast.elements:,} parameters in {len(forecast.parameters)} tensors, {dtypes}; "
        f"{request.layout}: {request.world} ranks"
    )
    tables = [_rank_table(forecast), _memory_table(forecast), kinds_table(forecast.kinds)]
    return [title, *tables, *([compare_table(forecast)] if compare else []), *remarks(forecast)]


def _rank_table(forecast: Forecast) -> Table:
    table = _table("per rank", "least", "mean", "most", "on rank")
    for name, summary in summaries(forecast).items():
        if name == "cost":
            numbers = [f"{number:.3g}" for number in summary[:3]]
        else:
            numbers = [f"{number:,.0f}" if name in COUNTS else amount(number) for number in summary[:3]]
        if summary.most:
            table.add_row("multiply-adds of a step" if name == "cost" else name, *numbers, str(summary.rank))
    return table


def _memory_table(forecast: Forecast) -> Table:
    names = ("statistics", "roots", "momenta", "buffers", "transient", "total")
    table = _table("rank", *names, title=f"at most during a step, on {forecast.request.device}")
    for rank, peak in forecast.peaks.items():
        table.add_row(str(rank), *(amount(getattr(peak, name)) for name in names))
    return table


def kinds_table(kinds: Iterable[Kind]) -> Table:
    """Make a table with one row for parameters that are alike."""
    table = _table("parameters", "number", "shape", "elements", "moved by", "blocks of each", "factors", "divided")
    for of in kinds:
        row = of.row
        moved_by = row.moved_by + (f" ({row.reason})" if row.reason else "")
        blocks = f"{row.blocks} of {_sides(row.largest)}" if row.factors else "-"
        factors = ", ".join(map(str, row.factors)) or "-"
        divided = "-" if of.divided is None else f"axis {of.divided}"
        table.add_row(
            *(of.name, str(of.count), _sides(row.shape), f"{of.elements:,}", moved_by, blocks, factors, divided)
        )
    return table


def compare_table(forecast: Forecast) -> Table:
    """Make a table with one row per block size; the cheapest that fits is marked."""
    best = cheapest(forecast.compared)
    table = _table("block size", "multiply-adds", "share of a step", "max / mean", "idle ranks", "state", "")
    for of in forecast.compared:
        mark = "cheapest" if of is best else "" if of.fits else "does not fit"
        numbers = (f"{max(of.cost.values()):.3g}", _share(of), f"{of.imbalance:.2f}", str(of.idle))
        table.add_row(str(of.hp.block_size), *numbers, amount(of.state[of.worst]), mark)
    return table


def remarks(forecast: Forecast) -> list[str]:
    """Say in sentences what the tables leave out: settings, balance, what is assumed, whether it fits."""
    request, hp = forecast.request, forecast.hp
    lines = [
        f"settings: {request.preset}, block size {hp.block_size}, roots {hp.intervals}",
        f"max / mean of the work: {forecast.imbalance:.2f}; ranks without a block that has factors: {forecast.idle}",
    ]
    if forecast.share is None:
        lines.append("share of a step: not known for convolutions, whose parameters compute once for each pixel")
    else:
        active = "" if forecast.active == forecast.elements else f" ({forecast.active:,.0f} of them for each)"
        lines.append(
            f"share of a step of {request.tokens:,} tokens: {_share(forecast)}, by multiply-adds: 3 per token and "
            f"parameter{active} for training, evenly over the ranks, and those of the optimizer on the rank with most"
        )
    if request.world > 1 and not any(any(of.values()) for of in forecast.received.values()):
        lines.append("nothing is received from other ranks: owners store their blocks")
    if len(forecast.looked_at) < request.world:
        lines.append(f"what is received was counted on {len(forecast.looked_at)} of {request.world} ranks")
    lines += [f"assumed for the pipeline: {PIPELINE}"] if request.pipe > 1 else []
    lines += [f"assumed for tensor parallelism: {TENSOR}"] if request.tensor > 1 else []
    if request.expert > 1:
        tensor = ", each divided by tensor parallelism (enable_expert_tensor_parallelism)" if request.tensor > 1 else ""
        lines.append(f"assumed for expert parallelism: {EXPERTS.format(tensor)}")
    return lines + _fit(forecast)


def _fit(forecast: Forecast) -> list[str]:
    """Say whether the state fits, and what would make it fit."""
    request, most = forecast.request, forecast.state[forecast.worst]
    if request.limit is None:
        return []
    if forecast.fits:
        total = max(peak.total for peak in forecast.peaks.values())
        besides = "" if total <= request.limit else f", but not with what a step takes besides: {amount(total)}"
        answer = f"fits {request.fits}: yes, {amount(most)} of state{besides}"
        return [f"{answer}; weights, gradients and activations are not counted"]
    ways = [
        f"{' '.join(_changes(forecast, other))} ({amount(other.state[other.worst])})" for other in forecast.remedies
    ]
    would = f"it would with {' or with '.join(ways)}" if ways else "nor with more data ranks or other blocks"
    return [f"fits {request.fits}: no, {amount(most)} of state; {would}"]


def _changes(forecast: Forecast, other: Forecast) -> list[str]:
    names = ("data", "block_size")
    pairs = [(name, getattr(other.request, name)) for name in names]
    return [f"--{name.replace('_', '-')} {value}" for name, value in pairs if value != getattr(forecast.request, name)]


def _share(forecast: Forecast) -> str:
    return "-" if forecast.share is None else f"{100 * forecast.share:.2g} %"


def amount(size: float) -> str:
    """Show a number of bytes in units of 1000."""
    power = min(4, (len(str(int(size))) - 1) // 3)
    return f"{size:,.0f} B" if power == 0 else f"{size / 1000**power:,.4g} {'kMGT'[power - 1]}B"


def _sides(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "()"


def _table(*header: str, title: str | None = None) -> Table:
    table = Table(*header, title=title)
    table.columns[0].overflow = "fold"  # names are long
    for column in table.columns[1:]:
        column.justify = "right"
    return table
