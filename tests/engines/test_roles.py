"""Embeddings and output layers: found in the modules that hold them, in whatever way the parameters are given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from shampoo3d import Shampoo
from shampoo3d.engines.roles import Facts

WORDS, WIDTH = 40, 6


class Model(nn.Module):
    """Words, positions and types, blocks, and an output layer, with numbers that may coincide."""

    def __init__(
        self, words: int = WORDS, width: int = WIDTH, positions: int = 9, blocks: int = 2, types: int = 2
    ) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(positions, width)
        self.types = nn.Embedding(2, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"query": nn.Linear(width, width), "up": nn.Linear(width, 4 * width)}) for _ in range(blocks)
        )
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, 2)
        self.head = nn.Linear(width, words, bias=False)


class Tied(Model):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.words.weight


class Named(Model):
    """A model as of transformers, which says what its output layer is; here one that nobody would guess."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(WIDTH, 8)

    def get_output_embeddings(self) -> nn.Module:
        return self.projection


EMBEDDINGS = {"words.weight": "embedding", "positions.weight": "embedding", "types.weight": "embedding"}
HEAD = {"head.weight": "output layer"}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "a head": (Model, EMBEDDINGS | HEAD),
    "tied": (Tied, EMBEDDINGS),
    "named": (Named, EMBEDDINGS | {"projection.weight": "output layer"}),
    "as many positions as a layer is wide": (lambda: Model(positions=4 * WIDTH), EMBEDDINGS | HEAD),
    "one block of that": (lambda: Model(positions=4 * WIDTH, blocks=1), EMBEDDINGS | HEAD),
    "as many words as a layer is wide": (lambda: Model(words=4 * WIDTH, blocks=1), EMBEDDINGS | HEAD),
    "a sequence": (
        lambda: nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, 8), nn.Linear(8, WORDS)),
        {"0.weight": "embedding", "2.weight": "output layer"},
    ),
    "no words": (lambda: nn.Sequential(nn.Linear(5, WIDTH), nn.Linear(WIDTH, 5)), {}),
}


def pairs_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, as by weight decay."""
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() > 1]
    return [{"params": matrices}, {"params": [(n, p) for n, p in model.named_parameters() if p.dim() < 2], "lr": 0.1}]


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "its parameters": lambda model: model.parameters(),
    "a list": lambda model: list(model.parameters()),
    "groups": pairs_of,
    "wrapped": lambda model: list(nn.DataParallel(model).parameters()),
}


def roles(optimizer: Shampoo, model: nn.Module) -> dict[str, str]:
    """The reasons that a report gives, by the names in the model."""
    for param in model.parameters():
        param.grad = param.detach().clone()
    optimizer.step()
    names = {id(param): name for name, param in model.named_parameters()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    rows = zip(params, optimizer.report().rows, strict=True)
    return {names[id(param)]: row.reason for param, row in rows if row.path == "excluded"}


@pytest.mark.parametrize(("make", "expected"), MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_roles(make: Callable[[], nn.Module], expected: dict[str, str], way: Callable[[nn.Module], Any]) -> None:
    model = make()
    assert roles(Shampoo(way(model)), model) == expected
    assert roles(Shampoo(way(model), hyperparams="soap"), model) == expected
    assert roles(Shampoo(way(model), hyperparams="classic"), model) == {}


GIVEN: dict[str, tuple[Any, dict[str, str]]] = {
    "one more": (["pooler.weight"], EMBEDDINGS | HEAD | {"pooler.weight": "embedding, as given"}),
    "not these": (
        {"head.weight": False, "positions.weight": False},
        dict.fromkeys(("words.weight", "types.weight"), "embedding"),
    ),
    "a function": (
        lambda name, _: {"pooler.weight": True, "head.weight": False}.get(name),
        EMBEDDINGS | {"pooler.weight": "embedding, as given"},
    ),
}


@pytest.mark.parametrize(("given", "expected"), GIVEN.values(), ids=GIVEN.keys())
def test_the_user_has_the_last_word(given: Any, expected: dict[str, str]) -> None:
    model = Model()
    assert roles(Shampoo(model.parameters(), embeddings=given), model) == expected


def test_a_copy_keeps_the_roles() -> None:
    model = Model()
    optimizer = Shampoo(model.parameters())
    model, optimizer = copy.deepcopy((model, optimizer))
    assert roles(optimizer, model) == EMBEDDINGS | HEAD


def test_ranks_decide_by_what_all_of_them_know() -> None:
    """Stages of a pipeline: the first one has the words, the last one the output layer."""
    first = Facts({(WORDS, WIDTH), (2, WIDTH)}, {"blocks.0.up.weight": WORDS})
    middle = Facts(set(), {"blocks.1.up.weight": WORDS})
    last = Facts(set(), {"head.weight": WORDS, "other.weight": 2})
    assert Facts.joined([first, middle, last]).heads == {"head.weight"}
    assert Facts.joined([first, middle, last, Facts(told=True)]).heads == set()
    assert last.heads == set()


def test_a_parameter_of_no_module_has_no_role() -> None:
    bare: list[Tensor] = [nn.Parameter(p.detach().clone()) for p in Model().parameters()]
    assert not any(Shampoo(bare)._registry.roles.found.values())
