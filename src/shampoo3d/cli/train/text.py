"""Real text as bytes, and batches of it that do not depend on how many processes read them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .settings import RunError, Settings

PARTS = 20
"""The text is cut into this many parts; the last tenth of each is kept for validation."""
VALIDATION_WINDOWS = 64
"""Sequences on which the validation loss is measured, rounded up to whole batches."""

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Text:
    """A text as indices into the sorted bytes that occur in it."""

    vocabulary: bytes
    train: Tensor
    validation: Tensor

    @classmethod
    def of(cls, raw: bytes) -> Text:
        vocabulary = bytes(sorted(set(raw)))
        index = bytes.maketrans(vocabulary, bytes(range(len(vocabulary))))
        tokens = torch.frombuffer(bytearray(raw.translate(index)), dtype=torch.uint8)
        parts = tokens[: len(tokens) // PARTS * PARTS].view(PARTS, -1)
        cut = parts.shape[1] * 9 // 10
        return cls(vocabulary, parts[:, :cut].flatten(), parts[:, cut:].flatten())


def read_text(path: Path | None, context: int) -> Text:
    """Read the text at `path`, by default the manual that comes with Python.

    Raises:
        RunError: it cannot be read, or is too short for windows of `context`.
    """
    if path is None:
        from pydoc_data.topics import topics

        raw = "\n".join(topics[name] for name in sorted(topics)).encode()
    else:
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise RunError(f"--text {path} cannot be read: {error.strerror}") from None
    # A part gives a tenth of its bytes to validation, which must hold one window and its last target.
    needed = 10 * (context + 1) + PARTS * 10
    if len(raw) < needed:
        raise RunError(f"the text has {len(raw)} bytes, --context {context} needs at least {needed}")
    return Text.of(raw)


def training_batches(text: Text, settings: Settings, step: int, data_rank: int) -> Iterator[Batch]:
    """Return the micro-batches of one step for one data rank: a pure function of the arguments.

    The sequences of a step are drawn for all ranks at once, then dealt out: every topology trains on the same ones.
    """
    windows = len(text.train) - settings.context
    starts = random.Random(f"{settings.seed}/{step}").choices(range(windows), k=settings.batch)
    return _deal(text.train, starts, settings, data_rank)


def validation_batches(text: Text, settings: Settings, data_rank: int) -> tuple[Iterator[Batch], int]:
    """Return one rank's micro-batches of evenly spaced validation windows, and their number."""
    rounds = -(-VALIDATION_WINDOWS // settings.batch)
    count = rounds * settings.batch
    last = len(text.validation) - settings.context - 1
    starts = [last * i // max(count - 1, 1) for i in range(count)]
    return _deal(text.validation, starts, settings, data_rank), rounds * settings.micro_batches


def _deal(tokens: Tensor, starts: Sequence[int], settings: Settings, data_rank: int) -> Iterator[Batch]:
    span = torch.arange(settings.context + 1)
    mine = torch.tensor(starts).view(settings.data, -1, settings.micro_batch)[data_rank]
    for micro_batch in mine:
        window = tokens[micro_batch[:, None] + span].long()
        yield window[:, :-1].contiguous(), window[:, 1:].contiguous()
