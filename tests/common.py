"""Parameters, gradients and steps that are the same in every test, and exact comparison of the results."""

from __future__ import annotations

import copy
import io
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from reference import Array, Reference, Settings
from shampoo3d import LayerwiseGrafting, Shampoo, ShampooHyperParams
from shampoo3d.planning.blocks import Span, Split
from shampoo3d.planning.layout import Matrix, Sharding
from shampoo3d.planning.shards import Holder, Holders, Piece, Shard
from shampoo3d.settings.variant import Variant

HYPERPARAMS = ShampooHyperParams(matrix_eps=1e-4, block_size=4, weight_decay=0.01)
SETTINGS = Settings(matrix_eps=1e-4, block_size=4, weight_decay=0.01)
SHAPES = [(6, 5), (7,), (4, 3, 2), ()]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
REFUSED = (ValueError, TypeError, RuntimeError, KeyError)
TOLERANCE = 1e-10

# ---- parameters and gradients ----


def draw(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(shapes: Sequence[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(draw(shape, seed, dtype)) for seed, shape in enumerate(shapes)]


def names_of(params: Sequence[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"layer.{k}.weight", p) for k, p in enumerate(params)]


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def paths(optimizer: Shampoo) -> dict[str, str]:
    return {row.name: row.path for row in optimizer.report().rows}


def put_gradients(params: Iterable[Tensor], t: int) -> None:
    """Set the same gradient for the same (t, index in the list) in every test; frozen parameters get none."""
    for k, p in enumerate(params):
        p.grad = draw(p.shape, 1000 * t + k, p.dtype) if p.requires_grad else None


# ---- steps ----


def train(optimizer: Shampoo, steps: Iterable[int] = range(3)) -> None:
    for t in steps:
        put_gradients(params_of(optimizer), t)
        optimizer.step()


def arrays(tensors: Iterable[Tensor | None]) -> list[Array | None]:
    return [None if x is None else x.detach().double().numpy().copy() for x in tensors]


def gradients(params: Iterable[Tensor]) -> list[Array | None]:
    return arrays(p.grad for p in params)


def step_both(optimizer: Shampoo, reference: Reference, tolerance: float = TOLERANCE) -> None:
    """Take one step with the present gradients, after which both agree."""
    params = params_of(optimizer)
    reference.step(gradients(params))
    optimizer.step()
    error = reference.error(arrays(params))
    assert error < tolerance, f"relative error {error:.1e} after {[p.t for p in reference.parameters]} steps"


def advance(optimizer: Shampoo, reference: Reference, steps: Iterable[int]) -> None:
    for t in steps:
        put_gradients(params_of(optimizer), t)
        step_both(optimizer, reference)


# ---- shapes of well-known models ----


def transformer(layers: int, width: int, vocabulary: int, *others: tuple[int, ...]) -> list[tuple[int, ...]]:
    layer = [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width), (4 * width,)]
    layer += [(width, 4 * width), *[(width,)] * 5]
    return [(vocabulary, width), *others, *layers * layer, (width,), (width,)]


def resnet_50() -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,), (1000, 2048), (1000,)]
    wide = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        shapes += [(4 * width, wide, 1, 1), (4 * width,), (4 * width,)]
        for _ in range(blocks):
            shapes += [(width, wide, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1), *[(width,)] * 6]
            wide = 4 * width
    return shapes


LLAMA_LAYER: list[tuple[int, ...]] = [
    *[(4096, 4096)] * 4,
    (11008, 4096),
    (11008, 4096),
    (4096, 11008),
    (4096,),
    (4096,),
]
MODELS: dict[str, list[tuple[int, ...]]] = {
    "GPT-2 small": transformer(12, 768, 50257, (1024, 768)),
    "GPT-2 medium": transformer(24, 1024, 50257, (1024, 1024)),
    "Llama 7B": [(32000, 4096), (32000, 4096), (4096,), *32 * LLAMA_LAYER],
    "ResNet-50": resnet_50(),
    "ViT-B/16": transformer(12, 768, 1000, (768, 3, 16, 16), (1, 197, 768)),
}

# ---- layouts, as random as can be, and their storage, element by element ----

Numbers = NDArray[np.int64]


def replicated(name: str, shape: Sequence[int], ranks: Iterable[int] = (0,), **settings: Any) -> Sharding:
    holders = Holders(Holder(rank, Shard.whole(tuple(shape))) for rank in ranks)
    return Sharding(name, tuple(shape), "float32", holders, **settings)


def stored(shard: Shard, shape: Sequence[int]) -> Numbers:
    """Return the numbers of the elements of a matrix that a shard stores, in the order of storage."""
    rows = [[i for a, b in spans for i in range(a, b)] for spans in shard.spans]
    spanned = np.arange(np.prod(shape, dtype=int)).reshape(shape)[np.ix_(*rows)]
    return spanned.reshape(-1)[shard.first : shard.last]


def positions(piece: Piece) -> Numbers:
    """Return the positions of a piece's elements in the storage of its shard, by the definition of strides."""
    index = np.indices(piece.box.shape)
    return piece.offset + sum(i * stride for i, stride in zip(index, piece.strides, strict=True))


def numbers_of(matrix: Matrix) -> Numbers:
    """Number the elements of a matrix, in the shape of the merged matrix."""
    return np.arange(np.prod(matrix.shape, dtype=int)).reshape(matrix.merged)


RANDOM = st.integers(0, 2**32 - 1).map(random.Random)
"""Seeds of plain generators, for layouts: hypothesis prefers small cases, which seldom combine all features."""


def dealt(chance: random.Random, length: int, parts: int) -> list[list[Span]]:
    """Deal out an axis: to each part ranges of it, in any order, some of them neighbours; to some parts nothing."""
    labels = [(chance.randrange(parts), chance.random() < 0.2) for _ in range(length)]
    if chance.random() < 0.5:
        labels.sort()
    spans: list[list[Span]] = [[] for _ in range(parts)]
    for (part, _), run in itertools.groupby(range(length), key=labels.__getitem__):
        numbers = list(run)
        spans[part].append((numbers[0], numbers[-1] + 1))
    for ranges in spans:
        chance.shuffle(ranges)
    return [ranges or [(0, 0)] for ranges in spans]


def partition(chance: random.Random, shape: Sequence[int], count: int) -> list[Shard]:
    """Draw shards that store each element once between them: axes dealt out, then cut at any element as ZeRO does."""
    sides: list[list[list[Span]]] = [[[(0, n)] for n in shape]]
    for axis in chance.sample(range(len(shape)), len(shape)):
        ways = chance.choice([k for k in range(1, count + 1) if count % k == 0])
        count //= ways
        if ways > 1 or chance.random() < 0.1:
            axes = dealt(chance, shape[axis], ways)
            sides = [[*side[:axis], spans, *side[axis + 1 :]] for side in sides for spans in axes]
    shards = []
    for spanned in map(Shard.of, sides):
        n = spanned.elements
        cuts = [chance.choice([0, n, chance.randint(0, n), chance.randint(0, n)]) for _ in range(count - 1)]
        shards += [Shard(spanned.spans, a, b) for a, b in itertools.pairwise([0, *sorted(cuts), n])]
    return shards


def a_shape(chance: random.Random) -> tuple[int, ...]:
    return tuple(chance.randint(1, 6) for _ in range(chance.choice([0, 1, 2, 2, 2, 3, 3, 4])))


def a_team(chance: random.Random) -> list[int]:
    return sorted(chance.sample(range(20), chance.randint(1, 6)))


def a_storage(chance: random.Random, ranks: Sequence[int], name: str = "w", copies: int = 1) -> Sharding:
    """Draw a matrix stored by these ranks: once, once in each of two shard groups, or by replicas, evenly or not.

    With ``copies``, a divisor of the number of ranks, each shard has so many times as many replicas.
    """
    shape, order = a_shape(chance), chance.sample(ranks, len(ranks))
    sharded = copies == 1 and chance.random() < 0.6
    shard_groups = chance.randint(1, min(2, len(ranks))) if sharded else 1
    holders = []
    for team in (order[i::shard_groups] for i in range(shard_groups)):
        different = len(team) // copies
        count = different if sharded else chance.randint(1, different)
        shards = partition(chance, shape, count)
        holders += [Holder(rank, shards[i % different % count], min(team)) for i, rank in enumerate(team)]
    holders.sort(key=lambda holder: holder.rank)
    dtype, excluded = chance.choice(["float32", "float64", "bfloat16"]), "embedding" * (chance.random() < 0.2)
    divided = chance.choice([None, *range(len(shape))])
    return Sharding(
        name, shape, dtype, Holders(holders), sharded, divided, excluded, "bfloat16", a_split(chance, shape)
    )


def a_split(chance: random.Random, shape: Sequence[int]) -> Split:
    """Draw several matrices along some axes, by their number or by their lengths."""
    split: dict[int, int | tuple[int, ...]] = {}
    for axis, n in enumerate(shape):
        edges = sorted({0, n, chance.randint(0, n), chance.randint(0, n)})
        lengths = tuple(b - a for a, b in itertools.pairwise(edges))
        if chance.random() < 0.2:
            split[axis] = chance.choice([lengths, *[k for k in range(1, n + 1) if n % k == 0]])
    return tuple(split.items())


def some_hyperparams(chance: random.Random) -> ShampooHyperParams:
    return ShampooHyperParams(
        block_size=chance.randint(0, 5),
        best_effort_shape_interpretation=chance.random() < 0.5,
        fair_blocks=chance.random() < 0.3,
        start_preconditioning_step=chance.randint(1, 2),
        variant=Variant(
            sides=chance.choice(["all", "all", "first", "last", "shortest"]),
            largest_dimension=(bound := chance.choice([0, 0, 1, 2, 3, 4])),
            long_axes="diagonal" if bound and chance.random() < 0.5 else "none",
        ),
    )


def grafted(graft: LayerwiseGrafting) -> dict[str, Any]:
    """Return settings of the graft, with the average that Adam's needs."""
    return {"graft_type": graft, "variant": Variant(beta1=0.9 if graft is LayerwiseGrafting.ADAM else 0.0)}


# ---- cases ----


def covering(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Choose from the product of all axes, greedily, until any two values of two axes meet in some case."""
    sides = [list(values) for values in axes]
    pairs = {
        case: set(itertools.combinations(enumerate(case), 2))
        for case in itertools.product(*(range(len(s)) for s in sides))
    }
    missing: set[Any] = set().union(*pairs.values())
    chosen: list[tuple[int, ...]] = []
    while missing:
        chosen.append(max(pairs, key=lambda case: len(pairs[case] & missing)))
        missing -= pairs[chosen[-1]]
    return [tuple(side[i] for side, i in zip(sides, case, strict=True)) for case in chosen]


# ---- comparison ----


def clones(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [x.detach().clone() for x in tensors]


def snapshot(optimizer: Shampoo) -> dict[str, Any]:
    """Copy everything that a step could change."""
    return {"weights": clones(params_of(optimizer)), "state": copy.deepcopy(optimizer.state_dict())}


def random_states() -> list[Any]:
    """Return the states of all global generators; none may be touched."""
    name, keys, *position = np.random.get_state()
    return [torch.get_rng_state(), random.getstate(), name, keys.tolist(), position]


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from leaves(value)
    else:
        yield tree


def tensors_in(tree: Any) -> list[Tensor]:
    return [x for x in leaves(tree) if isinstance(x, Tensor)]


def assert_equal(a: Any, b: Any, at: str = "") -> None:
    """Compare bitwise, through dicts and sequences, dtypes included."""
    assert type(a) is type(b) or isinstance(a, Tensor), f"{at}: {type(a)} and {type(b)}"
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype, at
        assert torch.equal(a, b), f"{at} differs"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), f"{at}: {a.keys() ^ b.keys()}"
        for key in a:
            assert_equal(a[key], b[key], f"{at}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), at
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{at}[{k}]")
    else:
        assert a == b, at


def beside(fast: Sequence[tuple[Any, ...]], more: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Parameters of a test: the fast cases, and slow ones beside them, each a value per argument."""
    return [*fast, *(pytest.param(*case, marks=pytest.mark.slow) for case in more if case not in fast)]


def slow_but(fast: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Parameters of a test, slow but for some."""
    chosen = list(fast)
    return [pytest.param(value, marks=[pytest.mark.slow] * (value not in chosen)) for value in values]
