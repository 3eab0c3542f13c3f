"""Errors of collectives in which not all ranks take part: the collective, its ranks, and what was under way."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


class RankLostError(RuntimeError):
    """Failure of a collective, since a rank died, hangs or raised an error of its own; raised where it was awaited.

    Attributes:
        during: what was under way, the collective first.
    """

    def __init__(self, collective: str, ranks: Sequence[int], cause: str) -> None:
        super().__init__(collective, tuple(ranks), cause)
        self.during = [collective]

    def __str__(self) -> str:
        _, ranks, cause = self.args
        shown = ", ".join(map(str, ranks if len(ranks) <= 16 else [*ranks[:8], "...", *ranks[-8:]]))
        return (
            f"{' '.join(self.during)}: not all of the ranks {shown} took part, since one died, hangs or raised an "
            f"error of its own ({cause}); start again from the last checkpoint"
        )


class CallsDifferError(RuntimeError):
    """Meeting of ranks that are in different calls; raised on all of them, before anything changed."""


@contextmanager
def awaiting(collective: str, ranks: Sequence[int]) -> Iterator[None]:
    """Turn errors of a collective, RuntimeErrors of any backend, into RankLostErrors; wrap nothing else in it."""
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(collective, ranks, str(error)) from error


@contextmanager
def during(when: str | Callable[[], str]) -> Iterator[None]:
    """Add to a RankLostError what its collective was part of; a function is called only if a rank is lost."""
    try:
        yield
    except RankLostError as error:
        error.during.append(when if isinstance(when, str) else when())
        raise
