"""Numbers of steps that are watched, by flat names, and warnings of those out of bounds."""

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

import torch

from shampoo3d.numerics.background import upload
from shampoo3d.numerics.schedule import root_age
from shampoo3d.numerics.spectrum import residuals, spectrum
from shampoo3d.runtime.bindings import Binding, StepCounts, index
from shampoo3d.runtime.exchange import Exchange
from shampoo3d.runtime.recording import Recording, recorded
from shampoo3d.runtime.team import Batch, Team

MOST_RATIO = 0.1
"""The update over the weight from which on a matrix is another one within ten steps; 0.001 is usual with Adam."""
WARM_UP = 100
"""The steps after which no weight that began at zero, and grows steadily, has a ratio above 0.01."""
LENGTHS = ("gradient", "direction", "update", "weight")


class Watch:
    """Recordings of every so-many-th step, and the numbers of the last one that is on the host."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._teams: Sequence[Team] = ()
        self._newest: Recording | None = None
        self._older: Recording | None = None  # another step was launched since
        self._numbers: dict[str, float] = {}
        self._told: set[str] = set()

    @contextmanager
    def over(self, teams: Sequence[Team], exchanges: Sequence[Exchange], steps: StepCounts) -> Iterator[None]:
        """Record the step within, if it is its turn; nothing waits for a device."""
        self._older, self._newest = self._newest or self._older, None
        t = max(steps.values(), default=0)
        if not t or t % self.every:
            yield
            return
        self._bind(teams)
        recording, before = Recording(self._rows, steps, teams[0].device), _received(exchanges)
        with recorded(recording):
            yield
            for batch, bindings in self._kept.items():
                rows = index([self._rows[binding] for binding in bindings], batch.stack.device)
                recording.bound("largest", rows, spectrum(batch.stack))
                recording.fail(batch.stack.root_failures)
            recording.ages = self._ages(steps)
            self._find_residuals(recording)
        after = _received(exchanges)
        recording.received = {kind: after[kind] - before[kind] for kind in after}
        recording.send()
        self._newest = recording

    def _bind(self, teams: Sequence[Team]) -> None:
        """Find the matrices of which elements or factors are kept here, once after each binding."""
        if self._teams is teams:
            return
        self._teams, self._older = teams, None
        self._rows = {binding: row for row, binding in enumerate(of for team in teams for of in team.bindings)}
        self._home = {of: None for team in teams for bucket in team.buckets for of in bucket.bindings}
        self._kept: dict[Batch, list[Binding]] = {}
        self._turns: defaultdict[Binding, dict[int, tuple[Batch, int]]] = defaultdict(dict)
        for team in teams:
            for batch in (batch for batch in team.batches if not batch.guests):
                self._kept[batch] = [team.binding_of(slot) for slot in batch.slots]
                for row, (binding, slot) in enumerate(zip(self._kept[batch], batch.slots, strict=True)):
                    self._turns[binding].setdefault(team.plan.blocks[slot].offset, (batch, row))

    def _find_residuals(self, recording: Recording) -> None:
        """Find the residual of one block of each matrix, one of those whose roots are the oldest."""
        oldest: defaultdict[Batch, list[tuple[int, Binding]]] = defaultdict(list)
        for binding, (_, offset) in recording.ages.items():
            batch, row = self._turns[binding][offset]
            oldest[batch].append((row, binding))
        for batch, found in oldest.items():
            device = batch.stack.device
            rows, bindings = zip(*found, strict=True)
            told = residuals(
                batch.stack, upload(rows, torch.int64, device), [recording.steps[of.group_tensor] for of in bindings]
            )
            matrices = upload([self._rows[of] for of in bindings], torch.int64, device)
            recording.bound("residual", matrices, told[:, None])

    def numbers(self) -> Mapping[str, float]:
        """Return the numbers of the last recorded step; on an accelerator, of the last one before the last launched.

        So the host waits for no step of which it has launched none since. What is out of bounds is warned of, once.
        """
        newest = self._newest is not None and self._newest.arrived
        recording = self._newest if newest else self._older
        if recording is not None:
            self._older = None
            self._newest = None if newest else self._newest
            self._learn(recording)
        return self._numbers

    def _learn(self, recording: Recording) -> None:
        if (read := recording.read()) is None:
            return
        rows, failures = read
        steps = {of.matrix.name: recording.steps.get(of.group_tensor, 0) for of in self._rows}
        norms = {
            kind: {
                name: total**0.5 for name, total in _by_name(((of, rows[of][kind]) for of in self._home), sum).items()
            }
            for kind in LENGTHS
        }
        ratios = {name: _ratio(update, norms["weight"][name]) for name, update in norms["update"].items()}
        largest, smallest, condition, residual = (
            _by_name(((of, rows[of][column]) for of in self._turns), max)
            for column in ("largest", "smallest", "condition", "residual")
        )
        smallest = {name: -value for name, value in smallest.items()}
        condition = {name: math.exp(min(value, 700.0)) for name, value in condition.items()}
        found: dict[str, float] = {"step": max(steps.values()), "failed_roots": failures}
        for kind, of in norms.items():
            found |= _named(f"{kind}_norm", of) | {f"{kind}_norm/total": math.hypot(*of.values())}
        total = _ratio(found["update_norm/total"], found["weight_norm/total"])
        found |= _named("update_ratio", ratios, max) | {"update_ratio/total": total}
        ages = ((of, age) for of, (age, _) in recording.ages.items())
        found |= _named("root_age", _by_name(ages, max), max)
        found |= _named("largest_eigenvalue", largest, max) | _named("smallest_eigenvalue", smallest, min)
        found |= _named("condition", condition, max)
        found |= _named("root_residual", {name: value for name, value in residual.items() if value >= 0}, max)
        seconds = recording.stopwatch.seconds()
        found |= _named("seconds", seconds) | {"seconds/total": sum(seconds.values())}
        found |= _named("received_bytes", recording.received)
        self._numbers = {f"shampoo/{name}": float(value) for name, value in found.items()}
        self._judge(steps, ratios, largest, smallest, failures)

    def _ages(self, steps: StepCounts) -> dict[Binding, tuple[int, int]]:
        """Return the age of the oldest roots of each matrix that took part in a step, and their turn."""
        hp, known = self._teams[0].hp, cache(root_age)
        taking_part = ((of, turns, t) for of, turns in self._turns.items() if (t := steps.get(of.group_tensor, 0)))
        return {of: max((known(t, hp, offset), offset) for offset in turns) for of, turns, t in taking_part}

    def _judge(
        self,
        steps: Mapping[str, int],
        ratios: Mapping[str, float],
        largest: Mapping[str, float],
        smallest: Mapping[str, float],
        failures: int,
    ) -> None:
        """Warn of what is out of bounds, of each kind once for a parameter. Vectors may well lie near zero."""
        for name in largest:
            t, ratio = steps[name], ratios.get(name, 0.0)
            if t > WARM_UP and ratio > MOST_RATIO:
                self._warn(
                    f"ratio {name}",
                    f"step {t} changed {name!r} by {ratio:.2g} of its norm, where 0.001 is usual and more than "
                    f"{MOST_RATIO} replaces it within few steps: take a smaller lr for it, or a longer warm-up",
                )
            if not (smallest[name] >= 0.0 and largest[name] < math.inf):
                self._warn(
                    f"eigenvalue {name}",
                    f"the statistics of {name!r} have diagonal entries from {smallest[name]:.3g} to {largest[name]:.3g}"
                    ", which no sums of squares are: load an earlier checkpoint, and let nonfinite_gradient be 'skip'",
                )
        if failures:
            self._warn(
                "roots",
                f"{failures} roots could not be computed or used, and previous ones stay: take a larger matrix_eps",
            )

    def _warn(self, key: str, text: str) -> None:
        if key not in self._told:
            self._told.add(key)
            warnings.warn(f"3D-Shampoo: {text}", RuntimeWarning, stacklevel=6)  # where report() was called


def _received(exchanges: Iterable[Exchange]) -> Counter[str]:
    return sum((exchange.received for exchange in exchanges), Counter())


def _by_name(values: Iterable[tuple[Binding, float]], joined: Callable[[Iterable[float]], float]) -> dict[str, float]:
    """Join values of matrices of one name: tied weights have it in two teams."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for binding, value in values:
        found[binding.matrix.name].append(value)
    return {name: joined(of) for name, of in found.items()}


def _ratio(update: float, weight: float) -> float:
    """Return the update over the weight: infinite from a weight of zero, unless it stays there."""
    return update / weight if weight else math.inf * update if update else 0.0


def _named(
    quantity: str, values: Mapping[str, float], worst: Callable[[Iterable[float]], float] | None = None
) -> dict[str, float]:
    """Name the values of a quantity, with the worst one of all if it is asked for and there is one."""
    named = {f"{quantity}/{name}": value for name, value in values.items()}
    return named | {f"{quantity}/{worst.__name__}": worst(values.values())} if worst and values else named
