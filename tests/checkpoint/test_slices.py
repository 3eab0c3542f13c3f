"""State that only this rank keeps fits the layout that it was saved in, and no other."""

import pytest

from common import HYPERPARAMS, parameters, train
from shampoo3d import Shampoo
from shampoo3d.checkpoint.slices import check_own, layout_of


def test_another_plan_is_refused() -> None:
    first, second = (Shampoo(parameters(shapes), hyperparams=HYPERPARAMS) for shapes in ([(6, 5)], [(5, 6)]))
    train(first)
    train(second)
    with pytest.raises(ValueError, match="saved under another layout"):
        check_own(second._teams, {}, {"layout": layout_of(first._teams)}, {})
