"""Small models that DeepSpeed or Megatron cut in their own ways, trained on several ranks and in one plain process.

- `AutoTensorParallel`: DeepSpeed shards an ordinary model in `initialize`: unevenly, each projection of a fused matrix
  for itself, and one embedding by replacing it.
- `Stripes`: shards by Megatron's attributes with `partition_stride` > 1: of each projection of a fused matrix, a part.
- `Experts`: mixtures of experts that live on different ranks under the same names.
"""

import contextlib
import functools
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .harness import run
from .models import ColumnParallel, RowParallel, Shards, loss_of
from .training import Mpu, Topology, prepare_deepspeed

VOCABULARY, LENGTH, WIDTH, HEAD, TABLE, BATCH, ACCUMULATED = 11, 5, 12, 3, 9, 16, 2
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


# ---- models ----


class Transformer(nn.Module):
    """One layer with grouped-query attention and a gated MLP, whose parts may be narrower than they are made here.

    The tanh of the keys gives their biases a gradient, which would else be rounding errors.
    """

    def __init__(self, keys: int, hidden: int, column: Any = nn.Linear, row: Any = nn.Linear) -> None:
        super().__init__()
        self.shares = (WIDTH, keys, keys)
        self.tokens, self.table = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, TABLE)
        self.project = nn.Linear(TABLE, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = column(WIDTH, sum(self.shares)), row(WIDTH, WIDTH)
        self.up, self.down = column(WIDTH, 2 * hidden), row(hidden, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.project(self.table(tokens))
        x = x + self.out(self.attend(self.qkv(self.norm1(x))))
        gate, value = self.up(self.norm2(x)).chunk(2, dim=-1)
        return self.head(x + self.down(torch.tanh(gate) * value))

    def attend(self, fused: Tensor) -> Tensor:
        sizes = [fused.shape[-1] * share // sum(self.shares) for share in self.shares]
        q, k, v = (part.unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in fused.split(sizes, dim=-1))
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
        future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        scores = (q @ torch.tanh(k).transpose(2, 3)).masked_fill(future, float("-inf"))
        return (scores.softmax(3) @ v).transpose(1, 2).flatten(2)


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 10), nn.Tanh(), nn.Linear(10, WIDTH))


class Mixture(nn.Module):
    """The result of `deepspeed.moe.layer.MoE` if no token is dropped: each token's best expert, times its weight."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weight, best = self.gate(x).softmax(-1).max(-1, keepdim=True)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return weight * outputs.gather(-1, best.unsqueeze(-2).expand(*x.shape, 1)).squeeze(-1)


class MixtureModel(nn.Module):
    """Two mixtures, which may be spread over different numbers of ranks."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.norm1, self.first, self.norm2, self.second = nn.LayerNorm(WIDTH), first, nn.LayerNorm(WIDTH), second
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        x = x + self.first(self.norm1(x))
        return self.head(x + self.second(self.norm2(x)))


# ---- layouts ----


@dataclass(frozen=True)
class Layout:
    """Layout of a model over `world` ranks under a ZeRO stage."""

    stage: int = 0
    world: int = 4
    double: bool = False

    @property
    def precision(self) -> str:
        return "float64" if self.double else "float32"

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)

    def __str__(self) -> str:
        return f"{type(self).__name__}-stage{self.stage}-world{self.world}" + "-double" * self.double

    def whole(self) -> nn.Module:
        """The logical model."""
        raise NotImplementedError

    def local(self) -> nn.Module:
        """Return the arguments that this rank gives to DeepSpeed."""
        raise NotImplementedError

    def logical(self, name: str) -> str:
        """The name in the logical model of the parameter that has this name here."""
        return name

    def held(self, name: str, full: Tensor) -> Tensor:
        """The part of the logical parameter that this rank trains."""
        return full

    def given(self, name: str, full: Tensor) -> Tensor:
        """The part that the local model has before DeepSpeed sees it."""
        return self.held(name, full)

    def groups(self, module: nn.Module) -> Any:
        """Return the parameters that the optimizer is given."""
        return module.parameters()

    def config(self) -> dict[str, Any]:
        return {}

    def mpu(self) -> Any:
        return None

    def replica(self) -> tuple[int, int]:
        """This rank's place among those that see different data, and their number."""
        return dist.get_rank(), self.world


@dataclass(frozen=True)
class TensorParallel(Layout):
    """Every matrix over 2 neighbouring ranks."""

    @property
    def shard(self) -> int:
        return dist.get_rank() % 2

    def replica(self) -> tuple[int, int]:
        return dist.get_rank() // 2, self.world // 2

    def striped(self, full: Tensor, dim: int, stripes: list[int]) -> Tensor:
        """Return this rank's half of each stripe of the axis, the first one the larger."""
        return torch.cat([stripe.tensor_split(2, dim)[self.shard] for stripe in full.split(stripes, dim)], dim)


@dataclass(frozen=True)
class AutoTensorParallel(TensorParallel):
    """DeepSpeed's AutoTP. `zero_init` builds the model cut already; `double` spares the embedding that AutoTP would
    replace by one in float32."""

    zero_init: bool = False

    SIZES = (6, 15)
    COLUMN: ClassVar[dict[str, list[int]]] = {"qkv": [12, 6, 6], "up": [15, 15], "head": [VOCABULARY]}
    ROW: ClassVar[dict[str, list[int]]] = {"out": [WIDTH], "down": [15]}
    SLICED: ClassVar[dict[str, list[int]]] = {"table": [TABLE], "project": [TABLE]}

    def __str__(self) -> str:
        return super().__str__() + "-zero.Init" * self.zero_init

    def whole(self) -> nn.Module:
        return Transformer(*self.SIZES)

    local = whole

    def given(self, name: str, full: Tensor) -> Tensor:
        return full

    def held(self, name: str, full: Tensor) -> Tensor:
        module, kind = name.split(".")
        if module in self.COLUMN:
            return self.striped(full, 0, self.COLUMN[module])
        if module in self.rows() and kind == "weight":
            return self.striped(full, 1, self.rows()[module])
        return full

    def rows(self) -> dict[str, list[int]]:
        return self.ROW | ({} if self.double else self.SLICED)

    def config(self) -> dict[str, Any]:
        def spec(kind: str, *modules: str, **options: Any) -> dict[str, Any]:
            return {"patterns": [rf".*{module}\.weight$" for module in modules], "partition_type": kind, **options}

        specs = [
            *(spec("column", module, shape=[self.COLUMN[module], -1], partition_dim=0) for module in ("qkv", "up")),
            spec("column", "head", gather_output=True),
            spec("row", *self.rows()),
        ]
        partition = {"use_default_specs": False, "layer_specs": specs}
        return {"tensor_parallel": {"autotp_size": 2, "partition_config": partition}}


@dataclass(frozen=True)
class Stripes(TensorParallel):
    """Megatron's tensor parallelism, with strides 3 and 2 in the fused matrices."""

    SIZES = (WIDTH, WIDTH)
    STRIDES: ClassVar[dict[str, int]] = {"qkv": 3, "up": 2}

    def whole(self) -> nn.Module:
        return Transformer(*self.SIZES)

    def local(self) -> nn.Module:
        shards = Shards(self.shard, 2, self.mpu().model)
        column, row = (functools.partial(kind, shards=shards) for kind in (ColumnParallel, RowParallel))
        module: Any = Transformer(*self.SIZES, column, row)
        for name, stride in self.STRIDES.items():
            for parameter in getattr(module, name).parameters():
                parameter.partition_stride = stride
        return module

    def held(self, name: str, full: Tensor) -> Tensor:
        stride = self.STRIDES.get(name.split(".")[0])
        if stride:
            return self.striped(full, 0, [len(full) // stride] * stride)
        return self.striped(full, 1, [WIDTH]) if name in ("out.weight", "down.weight") else full

    def mpu(self) -> Any:
        return Mpu(Topology(data=self.world // 2, model=2))


@dataclass(frozen=True)
class Experts(Layout):
    """Two mixtures of 4 experts, each spread over its number of ranks."""

    spread: tuple[int, int] = (2, 2)
    EXPERTS: ClassVar[int] = 4

    def __str__(self) -> str:
        return super().__str__() + f"-spread{self.spread[0]}{self.spread[1]}"

    def whole(self) -> nn.Module:
        return MixtureModel(Mixture(self.EXPERTS), Mixture(self.EXPERTS))

    def local(self) -> nn.Module:
        return MixtureModel(*(SpreadMixture(self.EXPERTS, ranks) for ranks in self.spread))

    def logical(self, name: str) -> str:
        """Each rank's experts are numbered from 0: the k-th of rank r is expert k + r x (experts per rank)."""
        found = re.fullmatch(r"(first|second)\.moe\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(.*)", name)
        if found is None:
            return name.replace("moe.deepspeed_moe.gate.wg", "gate")
        ranks = self.spread[found[1] == "second"]
        first = dist.get_rank() % ranks * (self.EXPERTS // ranks)
        return f"{found[1]}.experts.{first + int(found[2])}.{found[3]}"

    def groups(self, module: nn.Module) -> Any:
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

        return split({"params": list(module.parameters()), "name": "all"}) if self.stage else module.parameters()


class SpreadMixture(nn.Module):
    """DeepSpeed's mixture, in which every token reaches its expert and nothing is random."""

    def __init__(self, experts: int, ranks: int) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        self.moe = MoE(WIDTH, expert(), experts, ranks, drop_tokens=False, use_rts=False, min_capacity=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x)[0]


# ---- training ----


def full_weights(layout: Layout) -> dict[str, Tensor]:
    """The start of every run. Each expert is another; gates are large, so that no token is between two experts."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, parameter in layout.whole().named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = 0.1 if parameter.ndim == 1 else 1.0 if "gate" in name else parameter.shape[1] ** -0.5
        weights[name] = (noise * scale + (parameter.ndim == 1 and "norm" in name)).to(layout.dtype)
    return weights


def micro_batches(step: int, replica: int, replicas: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2000 + step)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    for part in tokens.chunk(replicas)[replica].chunk(ACCUMULATED):
        yield part[:, :-1], part[:, 1:]


def one_process(layout: Layout, make_optimizer: MakeOptimizer, steps: int) -> dict[str, Tensor]:
    """The weights to which one plain process comes."""
    module = layout.whole().to(layout.dtype)
    module.load_state_dict(full_weights(layout))
    optimizer = make_optimizer(module.parameters())
    for step in range(steps):
        optimizer.zero_grad()
        for inputs, labels in micro_batches(step, 0, 1):
            (loss_of(module(inputs), labels) / ACCUMULATED).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def start(layout: Layout, make_optimizer: MakeOptimizer) -> Any:
    """DeepSpeed's engine on this rank; the optimizer is given the parameters before DeepSpeed sees them."""
    deepspeed = prepare_deepspeed()
    config = {
        "train_micro_batch_size_per_gpu": BATCH // layout.replica()[1] // ACCUMULATED,
        "gradient_accumulation_steps": ACCUMULATED,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": layout.stage},
        "zero_allow_untested_optimizer": True,
        **layout.config(),
    }
    cut = getattr(layout, "zero_init", False)
    with deepspeed.zero.Init(config_dict_or_path=config) if cut else contextlib.nullcontext():
        module = layout.local().to(layout.dtype)
    weights = full_weights(layout)
    with gathered(module.parameters(), write=True), torch.no_grad():
        for name, parameter in module.named_parameters():
            logical = layout.logical(name)
            parameter.copy_(layout.given(logical, weights[logical]))
    optimizer = make_optimizer(layout.groups(module))
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, mpu=layout.mpu(), config=config)
    if layout.double:
        engine.communication_data_type = torch.float64
    return engine


def gathered(params: Iterable[nn.Parameter], write: bool = False) -> contextlib.AbstractContextManager[Any]:
    """At stage 3, the parameters whole within the context."""
    import deepspeed

    cut = [param for param in params if hasattr(param, "ds_id")]
    return deepspeed.zero.GatheredParameters(cut, modifier_rank=0 if write else None)


def train(layout: Layout, engine: Any, first: int, last: int) -> None:
    for step in range(first, last):
        for inputs, labels in micro_batches(step, *layout.replica()):
            engine.backward(loss_of(engine(inputs), labels))
            engine.step()


def distances(layout: Layout, module: nn.Module, reference: dict[str, Tensor]) -> dict[str, float]:
    """Return each parameter's relative distance from its part of the reference, by its logical name."""
    found = {}
    with gathered(module.parameters()):
        for name, parameter in module.named_parameters():
            logical = layout.logical(name)
            expected = layout.held(logical, reference[logical])
            assert parameter.shape == expected.shape, name
            found[logical] = float((parameter.detach() - expected).norm() / expected.norm().clamp(min=1e-30))
    return found


def _trained(
    layout: Layout, make_optimizer: MakeOptimizer, steps: int, reference: dict[str, Tensor]
) -> dict[str, float]:
    engine = start(layout, make_optimizer)
    train(layout, engine, 0, steps)
    return distances(layout, engine.module, reference)


@functools.cache
def _reference(arguments: bytes) -> dict[str, Tensor]:
    return one_process(*pickle.loads(arguments))


def worst_distance(layout: Layout, make_optimizer: MakeOptimizer, steps: int) -> float:
    """Train on all ranks and in one process; the largest relative distance of any parameter on any rank."""
    reference = _reference(pickle.dumps((layout, make_optimizer, steps)))
    found = run(_trained, layout.world, layout, make_optimizer, steps, reference)
    assert set().union(*found) == set(reference)
    return max(max(rank.values()) for rank in found)
