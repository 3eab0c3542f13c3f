"""The rule by which every optimizer is tuned, and when a loss was reached."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.contenders import Settings

EXTENSIONS = 2


@dataclass(frozen=True)
class Trial:
    settings: dict[str, Any]
    loss: float  # infinite where training stopped


@dataclass(frozen=True)
class Tuned:
    """All trials, the best of them, and whether its rate is the least or the largest that was tried."""

    trials: list[Trial]
    best: dict[str, Any]
    at_edge: bool

    @property
    def settings(self) -> list[dict[str, Any]]:
        return [trial.settings for trial in self.trials]


def tune(rates: Sequence[float], alternative: Settings | None, loss_of: Callable[[dict[str, Any]], float]) -> Tuned:
    """Try all rates; while the best is the first or the last, one beyond it, twice at most; then ``alternative``."""
    tried = {rate: Trial({"lr": rate}, loss_of({"lr": rate})) for rate in sorted(rates)}
    factor = math.exp(math.log(max(rates) / min(rates)) / (len(rates) - 1))
    for _ in range(EXTENSIONS):
        beyond = _beyond(tried, factor)
        if beyond is None:
            break
        tried[beyond] = Trial({"lr": beyond}, loss_of({"lr": beyond}))
    at_edge = _beyond(tried, factor) is not None
    trials = [tried[rate] for rate in sorted(tried)]
    if alternative:
        settings = {**_best(trials).settings, **alternative}
        trials.append(Trial(settings, loss_of(settings)))
    return Tuned(trials, _best(trials).settings, at_edge)


def _beyond(tried: Mapping[float, Trial], factor: float) -> float | None:
    """The next rate on the side where the best is the last one; where all have failed, downwards."""
    best = min(sorted(tried), key=lambda rate: tried[rate].loss)
    if best == min(tried):
        return float(f"{best / factor:.3g}")
    return float(f"{best * factor:.3g}") if best == max(tried) else None


def _best(trials: Sequence[Trial]) -> Trial:
    return min(trials, key=lambda trial: trial.loss)


def central(rates: Sequence[float], count: int) -> tuple[float, ...]:
    """So many rates from the middle of the grid."""
    spare = len(rates) - count
    if count < 2 or spare < 0:
        raise ValueError(f"a grid of {len(rates)} rates has no middle of {count}: take 2 to {len(rates)}")
    return tuple(rates[spare // 2 : spare // 2 + count])


def reached(curve: Mapping[str, Any], target: float) -> dict[str, float] | None:
    """Steps and seconds at which a curve first is at ``target`` or below; straight lines between what was measured."""
    axes = {"steps": curve["steps"], **curve["seconds"]}
    losses = curve["losses"]
    for after, loss in enumerate(losses):
        if loss <= target:
            before = max(after - 1, 0)
            part = (losses[before] - target) / (losses[before] - loss) if losses[before] > loss else 0.0
            part = part if math.isfinite(part) else 1.0  # what came before diverged
            return {name: at[before] + part * (at[after] - at[before]) for name, at in axes.items()}
    return None


def median_reached(curves: Sequence[Mapping[str, Any]], target: float, axis: str) -> float:
    """Over seeds, where those that never reach it count as infinite; infinite if that is the median."""
    at = sorted((reached(curve, target) or {axis: math.inf})[axis] for curve in curves)
    low, high = at[(len(at) - 1) // 2], at[len(at) // 2]
    return (low + high) / 2
