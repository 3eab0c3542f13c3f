"""Numbers of recorded steps on several ranks: the squares of all ranks add up to those of one process."""

import math
from functools import partial
from typing import Any

import pytest
import torch

from shampoo3d import Shampoo, ShampooHyperParams

from .fsdp import Sharding, with_torch
from .harness import run
from .models import Shape
from .training import Session, one_process

SHAPE = Shape()
MAKE = partial(Shampoo, lr=0.01, hyperparams=ShampooHyperParams.classic(block_size=6, matrix_eps=1e-4))


def _told(session: Session) -> dict[str, float]:
    optimizer = session.optimizer
    assert isinstance(optimizer, Shampoo)
    optimizer.watch(2)
    session.train(0, 4)
    return optimizer.report().scalars()


def _on_ranks(sharding: Sharding) -> Any:
    return _told(with_torch(SHAPE, sharding, MAKE, torch.float64))


@pytest.mark.parametrize("sharding", [Sharding(replicas=2), Sharding(shards=2)], ids=str)
def test_ranks_share_the_numbers_of_one_process(sharding: Sharding) -> None:
    ranks = run(_on_ranks, 2, sharding)
    for key, value in _told(one_process(SHAPE, MAKE)).items():
        quantity, here = key.split("/")[1], [told[key] for told in ranks if key in told]
        if quantity.endswith("_norm"):
            assert math.hypot(*here) == pytest.approx(value, rel=1e-9), key
        elif quantity in ("largest_eigenvalue", "condition", "root_age"):
            assert max(here) == pytest.approx(value, rel=1e-7), key
        elif quantity in ("step", "skipped_steps"):
            assert here == [value, value]
    for told in ranks:
        assert sum(bytes_ for key, bytes_ in told.items() if "received_bytes" in key) > 0
