"""Events of ranks laid out in time: who works, who waits for whom. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .clock import Event, Start, Work
from .hardware import Hardware

NAMES = {"gradients": "gradients out", "updates": "updates back", "weights": "weights to replicas"}
"""Collectives as phases of a step; others have the name of their kind."""


@dataclass(frozen=True)
class Span:
    """Seconds from the start of a step in which a rank is in a phase."""

    phase: str
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A step of some ranks.

    Attributes:
        spans: of each rank, in order.
        travelled: seconds in which a rank's collectives were under way.
        beside: seconds of a rank's roots that are computed beside what follows the step.
    """

    spans: Mapping[int, Sequence[Span]]
    travelled: Mapping[int, float]
    beside: Mapping[int, float]

    @property
    def seconds(self) -> float:
        return max(self.end(rank) for rank in self.spans)

    def end(self, rank: int) -> float:
        """Return when a rank has taken the step."""
        return max((span.end for span in self.spans[rank]), default=0.0)

    def phases(self, rank: int) -> dict[str, float]:
        """Add up the seconds of a rank by phase."""
        found: defaultdict[str, float] = defaultdict(float)
        for span in self.spans[rank]:
            found[span.phase] += span.end - span.start
        return found

    def busy(self, rank: int) -> float:
        """Return the seconds in which a rank computes."""
        return sum(seconds for phase, seconds in self.phases(rank).items() if not phase.startswith(WAITING))


WAITING = "waiting: "


@dataclass
class _Rank:
    """A rank on its way through its events: the time of its host and of its device."""

    events: Sequence[Event]
    host: float = 0.0
    device: float = 0.0
    next: int = 0
    spans: list[Span] = field(default_factory=list)
    travelled: float = 0.0
    beside: float = 0.0

    def until(self, phase: str, start: float, end: float) -> None:
        if end > start:
            self.spans.append(Span(phase, start, end))
        self.device = max(self.device, end)


def replay(events: Mapping[int, Sequence[Event]], hardware: Hardware) -> Timeline:
    """Lay out the events of ranks in time.

    A collective begins when all of its ranks that are simulated have come to it, and the one before has left their
    links. Where nothing overlaps, it begins when all of them wait for it.
    """
    ranks = {rank: _Rank(of) for rank, of in events.items()}
    here: defaultdict[tuple[str, tuple[int, ...], int], dict[int, tuple[float, float]]] = defaultdict(dict)
    ends: dict[tuple[str, tuple[int, ...], int], float] = {}
    free: dict[int, float] = dict.fromkeys(ranks, 0.0)

    def arrive(number: int, start: Start) -> None:
        """Let a rank come to a collective; the last one sets its end."""
        key = start.kind, start.group, start.number
        here[key][number] = ranks[number].device, start.seconds
        members = [rank for rank in start.group if rank in ranks]
        if key not in ends and len(here[key]) == len(members):
            begin = max(max(time for time, _ in here[key].values()), *(free[rank] for rank in members))
            longest = max(seconds for _, seconds in here[key].values())
            ends[key] = begin + longest
            for rank in members:
                free[rank] = ends[key]
                ranks[rank].travelled += longest

    def advance(number: int, rank: _Rank) -> bool:
        """Let a rank go on as far as it can, and return whether it did."""
        began = rank.next
        while rank.next < len(rank.events):
            event = rank.events[rank.next]
            if isinstance(event, Work):
                _work(rank, event, hardware)
            elif isinstance(event, Start):
                if hardware.overlap:
                    arrive(number, event)
            else:
                start = event.start
                key = start.kind, start.group, start.number
                if not hardware.overlap and number not in here[key]:
                    arrive(number, start)
                if key not in ends:
                    break
                rank.until(WAITING + NAMES.get(start.kind, start.kind), rank.device, ends[key])
                rank.host = rank.host if hardware.queue else rank.device
            rank.next += 1
        return rank.next > began

    while [number for number, rank in ranks.items() if advance(number, rank)]:
        pass
    if stuck := [number for number, rank in ranks.items() if rank.next < len(rank.events)]:
        raise AssertionError(f"ranks {stuck[:8]} wait for collectives that others do not take part in")
    return Timeline(
        {number: rank.spans for number, rank in ranks.items()},
        {number: rank.travelled for number, rank in ranks.items()},
        {number: rank.beside for number, rank in ranks.items()},
    )


def _work(rank: _Rank, work: Work, hardware: Hardware) -> None:
    """Compute: a host that launches may be ahead of its device, but not behind."""
    host, device, _ = work.spent
    if work.beside:
        rank.beside += max(host, device) if hardware.queue else host + device
        return
    start = max(rank.host, rank.device)
    rank.host += host
    end = max(start + device, rank.host) if hardware.queue else start + host + device
    rank.until(work.phase, start if not hardware.queue else max(rank.device, start), end)
    if not hardware.queue:
        rank.host = rank.device
