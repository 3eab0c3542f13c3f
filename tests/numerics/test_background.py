"""Work beside the main line."""

import threading

import pytest
import torch

from shampoo3d.numerics.background import Background, any_or_unknown, set_entries

CPU = torch.device("cpu")


def test_it_runs_beside_and_in_the_order_given() -> None:
    go, done = threading.Event(), []

    def first() -> str:
        assert go.wait(60)
        done.append(1)
        return threading.current_thread().name

    one = Background(first, CPU)
    two = Background(lambda: done.append(2), CPU)
    assert not done  # the caller goes on meanwhile
    go.set()
    two.result()
    assert done == [1, 2]
    assert one.result() != threading.current_thread().name


def test_it_computes_as_the_caller_would() -> None:
    leaf = torch.ones(3, requires_grad=True)
    work = Background(lambda: (torch.get_num_threads(), (leaf * 2).requires_grad), CPU)
    assert work.result() == (torch.get_num_threads(), False)


def test_what_it_raises_is_raised() -> None:
    def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match=r"^no$"):
        Background(fails, CPU).result()


def test_without_data_everything_may_be() -> None:
    """And work is done at once, by the caller, whose counter of tensors no thread would tell."""
    mask = torch.zeros(3, dtype=torch.bool)
    assert (any_or_unknown(mask), set_entries(mask).tolist()) == (False, [])
    assert (any_or_unknown(mask.to("meta")), set_entries(mask.to("meta")).shape) == (True, (3,))
    assert Background(threading.current_thread, mask.to("meta").device).result() is threading.current_thread()
