"""What is said when not all ranks take part in a collective: in which one, when, and among whom."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


class RankLostError(RuntimeError):
    """A collective failed, since a rank died, hangs or raised an error of its own; raised where it was waited for.

    Attributes:
        during: what was under way, the collective first.
    """

    def __init__(self, what: str, ranks: Sequence[int], words: str) -> None:
        super().__init__(what, tuple(ranks), words)
        self.during = [what]

    def __str__(self) -> str:
        _, ranks, words = self.args
        shown = ", ".join(map(str, ranks if len(ranks) <= 16 else [*ranks[:8], "...", *ranks[-8:]]))
        return (
            f"{' '.join(self.during)}: not all of the ranks {shown} took part, since one died, hangs or raised an "
            f"error of its own ({words}); start again from the last checkpoint"
        )


@contextmanager
def awaiting(what: str, ranks: Sequence[int]) -> Iterator[None]:
    """Around a collective and nothing else, whose errors, of whatever backend, are all RuntimeErrors."""
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(what, ranks, str(error)) from error


@contextmanager
def during(when: str | Callable[[], str]) -> Iterator[None]:
    """Around collectives: what they are part of. A function is asked only if a rank is lost."""
    try:
        yield
    except RankLostError as error:
        error.during.append(when if isinstance(when, str) else when())
        raise
