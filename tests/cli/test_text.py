"""Text and batches: pure functions of seed and step, the same for every topology."""

from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shampoo3d.cli.train.settings import RunError, Settings
from shampoo3d.cli.train.text import PARTS, Text, read_text, training_batches, validation_batches

RAW = bytes(range(97, 123)) * 200


def settings(**changes: object) -> Settings:
    values = {"context": 16, "batch": 12, "data": 1, "micro_batches": 1, "layers": 4, "pipe": 1, "seed": 3}
    return Settings(output=Path("unused"), **values | changes)  # type: ignore[arg-type]


def step_of(text: Text, run: Settings, step: int) -> Tensor:
    """The sequences of a step over all ranks, with the target of their last byte."""
    batches = chain(*(training_batches(text, run, step, rank) for rank in range(run.data)))
    return torch.cat([torch.cat([x, y[:, -1:]], 1) for x, y in batches])


@pytest.mark.parametrize(("data", "micro_batches"), [(1, 4), (2, 1), (2, 3), (3, 4)])
def test_every_topology_trains_on_the_same_sequences(data: int, micro_batches: int) -> None:
    text = Text.of(RAW)
    other = settings(data=data, micro_batches=micro_batches)
    for step in (1, 2, 100):
        torch.testing.assert_close(step_of(text, other, step), step_of(text, settings(), step))


def test_targets_are_the_next_bytes() -> None:
    text = Text.of(RAW)
    for inputs, targets in training_batches(text, settings(micro_batches=2), 1, 0):
        assert inputs.shape == targets.shape == (6, 16)
        assert inputs.dtype == targets.dtype == torch.int64
        torch.testing.assert_close(inputs[:, 1:], targets[:, :-1])


def test_steps_and_seeds_differ_and_repeat() -> None:
    text = Text.of(RAW)
    first = step_of(text, settings(), 1)
    assert torch.equal(first, step_of(text, settings(), 1))
    assert not torch.equal(first, step_of(text, settings(), 2))
    assert not torch.equal(first, step_of(text, settings(seed=4), 1))


def test_validation_text_is_a_tenth_that_training_never_sees() -> None:
    raw = bytes(i % 251 for i in range(1000 * PARTS))
    text = Text.of(raw)
    assert len(text.train) == 9 * len(text.validation)
    parts = torch.cat([text.train.view(PARTS, -1), text.validation.view(PARTS, -1)], 1)
    assert bytes(text.vocabulary[i] for i in parts.flatten().tolist()) == raw


def test_validation_windows_are_the_same_for_every_topology_and_reach_the_end() -> None:
    text = Text.of(RAW)

    def windows(run: Settings) -> Tensor:
        return torch.cat([y for rank in range(run.data) for _, y in validation_batches(text, run, rank)[0]])

    whole = windows(settings())
    assert len(whole) == 72  # 64 rounded up to batches of 12
    assert torch.equal(whole[-1], text.validation[-16:].long())
    torch.testing.assert_close(windows(settings(data=3, micro_batches=2)), whole)
    assert validation_batches(text, settings(data=3, micro_batches=2), 0)[1] == 12


def test_default_text_is_real_and_large() -> None:
    text = read_text(None, 128)
    assert len(text.train) > 300_000
    assert 60 < len(text.vocabulary) < 256


def test_short_text_is_refused_with_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * 369)
    with pytest.raises(RunError, match="has 369 bytes, --context 16 needs at least 370"):
        read_text(path, 16)
    path.write_bytes(b"ab" * 185)
    text = read_text(path, 16)
    assert next(validation_batches(text, settings(), 0)[0])[0].shape == (12, 16)
    assert next(training_batches(text, settings(), 1, 0))[0].shape == (12, 16)


def test_unreadable_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"--text .*no\.txt cannot be read: No such file"):
        read_text(tmp_path / "no.txt", 16)
