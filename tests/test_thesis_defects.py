"""Defects of the thesis code that must not come back: each has a test that is named after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from common import assert_equal, clones, paths, random_states, saved_and_loaded, tensors_in, train
from shampoo3d import Shampoo, ShampooHyperParams

# ---- construction ----


def test_construction_needs_no_shapes_no_names_and_no_rank() -> None:
    train(Shampoo(nn.Linear(3, 2).parameters()))


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 4))
        self.gain = nn.Parameter(torch.ones(()))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear without bias": lambda: nn.Linear(4, 3, bias=False),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "bare parameters": Bare,
    "convolution": lambda: nn.Conv2d(3, 4, 3),
    "layer norm": lambda: nn.LayerNorm(5),
    "recurrent": lambda: nn.LSTM(3, 4),
    "transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16),
}


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES.keys())
def test_modules_with_other_than_one_weight_and_one_bias(module: Callable[[], nn.Module]) -> None:
    """The thesis code paired parameters with modules one to one; every parameter must be found and must move."""
    model = module()
    before = clones(model.parameters())
    optimizer = Shampoo(model.parameters())
    train(optimizer)
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert list(paths(optimizer)) == [name for name, _ in model.named_parameters()]


def test_the_hyperparameters_are_not_written_to() -> None:
    for hyperparams in (ShampooHyperParams(), ShampooHyperParams(fair_blocks=True, block_size=2)):
        before = repr(hyperparams)
        train(Shampoo(nn.Linear(4, 4).parameters(), hyperparams=hyperparams))
        assert repr(hyperparams) == before


def test_several_groups_and_a_frozen_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.requires_grad_(False)
    frozen = model[1].weight.detach().clone()
    optimizer = Shampoo([{"params": layer.named_parameters(prefix=str(k))} for k, layer in enumerate(model)])
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    assert torch.equal(model[1].weight, frozen)
    assert list(paths(optimizer)) == [name for name, _ in model.named_parameters()]


def test_names_do_not_restart_with_each_group() -> None:
    optimizer = Shampoo([{"params": [nn.Parameter(torch.ones(2, 2))]} for _ in range(3)])
    train(optimizer)
    assert len(paths(optimizer)) == 3


# ---- embeddings ----


class Vision(nn.Module):
    """`patch_embed` is no embedding, `wte` is one."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential()
        self.patch_embed.proj = nn.Conv2d(3, 4, 2)
        self.wte = nn.Embedding(7, 4)
        self.bag = nn.EmbeddingBag(5, 4)
        self.embed_head = nn.Linear(4, 6, bias=False)


IGNORE = ShampooHyperParams(ignore_embedding_layer=True)


EXPECTED = {
    "patch_embed.proj.weight": "preconditioned",
    "patch_embed.proj.bias": "grafted only",
    "wte.weight": "excluded",
    "bag.weight": "excluded",
    "embed_head.weight": "preconditioned",
}


WAYS: dict[str, Callable[[Vision], Shampoo]] = {
    "model.parameters()": lambda m: Shampoo(m.parameters(), hyperparams=IGNORE),
    "model.named_parameters()": lambda m: Shampoo(m.named_parameters(), hyperparams=IGNORE),
    "model=": lambda m: Shampoo(list(m.named_parameters()), hyperparams=IGNORE, model=m),
    "list, model=": lambda m: Shampoo(list(m.parameters()), hyperparams=IGNORE, model=m),
    "names": lambda m: Shampoo(list(m.named_parameters()), hyperparams=IGNORE, embeddings=["wte.weight", "bag.weight"]),
    "tensors": lambda m: Shampoo(
        list(m.named_parameters()), hyperparams=IGNORE, embeddings=[m.wte.weight, m.bag.weight]
    ),
    "predicate": lambda m: Shampoo(
        list(m.named_parameters()), hyperparams=IGNORE, embeddings=lambda name, p: name.startswith(("wte", "bag"))
    ),
    "predicate on the tensor": lambda m: Shampoo(
        list(m.named_parameters()), hyperparams=IGNORE, embeddings=lambda name, p: p.shape in ((7, 4), (5, 4))
    ),
    "groups, names": lambda m: Shampoo(
        [{"params": [pair]} for pair in m.named_parameters()],
        hyperparams=IGNORE,
        embeddings=iter(["bag.weight", "wte.weight"]),
    ),
    "groups, tensors": lambda m: Shampoo(
        [{"params": [pair]} for pair in m.named_parameters()],
        hyperparams=IGNORE,
        embeddings=iter([m.bag.weight, m.wte.weight]),
    ),
    "groups, model=": lambda m: Shampoo(
        [{"params": m.patch_embed.parameters()}, {"params": [m.wte.weight, m.bag.weight, m.embed_head.weight]}],
        hyperparams=IGNORE,
        model=m,
    ),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_embeddings_are_found_by_type_or_told_never_by_substring(way: Callable[[Vision], Shampoo]) -> None:
    optimizer = way(Vision())
    train(optimizer)
    assert paths(optimizer) == EXPECTED


def test_embeddings_are_preconditioned_when_not_ignored() -> None:
    optimizer = Shampoo(Vision().parameters(), hyperparams="classic")
    train(optimizer)
    assert paths(optimizer)["wte.weight"] == "preconditioned"


PARAMS: dict[str, Callable[[Vision], Any]] = {
    "list": lambda m: list(m.parameters()),
    "named list": lambda m: list(m.named_parameters()),
    "groups": lambda m: [{"params": list(m.parameters())}],
    "generator expression": lambda m: (p for p in m.parameters() if p.requires_grad),
    "filter": lambda m: filter(lambda p: p.requires_grad, m.parameters()),
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_embeddings_are_found_however_parameters_are_given(params: Callable[[Vision], Any]) -> None:
    model = Vision()
    optimizer = Shampoo(params(model), hyperparams=IGNORE)
    train(optimizer)
    assert list(paths(optimizer).values()) == list(EXPECTED.values())


@pytest.mark.parametrize("told", [["wpe.weight"], ["wte"], [torch.ones(7, 4)]], ids=["other", "prefix", "tensor"])
def test_an_embedding_that_is_not_there_is_an_error(told: list[Any]) -> None:
    with pytest.raises(ValueError, match="embeddings"):
        Shampoo(Vision().named_parameters(), hyperparams=IGNORE, embeddings=told)


def test_a_tied_output_layer_is_an_embedding() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    optimizer = Shampoo(model.parameters(), hyperparams=IGNORE)
    train(optimizer)
    assert paths(optimizer) == {"0.weight": "excluded"}


# ---- steps and checkpoints ----


def test_the_closure_is_called() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones(2, 2)
    calls: list[int] = []
    assert Shampoo([p]).step(lambda: calls.append(1) or 7.5) == 7.5
    assert calls == [1]


def test_the_global_random_state_is_untouched() -> None:
    torch.manual_seed(1)
    before = random_states()
    train(Shampoo([nn.Parameter(torch.zeros(8, 6))]))
    assert_equal(random_states(), before)


def test_the_state_is_complete_and_holds_no_objects() -> None:
    """The thesis code pickled the whole model into each state, and kept states on owners only."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    optimizer = Shampoo(model.parameters(), hyperparams="classic")
    train(optimizer)
    state = saved_and_loaded(optimizer.state_dict())["state"]
    assert set(state) == {0, 1, 2, 3}
    expected = 8 * sum(n * n for n in (6, 5, 5, 4)) + 4 * sum(p.numel() for p in model.parameters())
    assert sum(x.nbytes for x in tensors_in(state)) == expected
