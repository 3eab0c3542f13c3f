"""From parameter groups to replicas: reads how each parameter is stored, cuts, plans, binds, and agrees on it."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shampoo3d.engines import deepspeed, native
from shampoo3d.holdings import Binding, Replicas
from shampoo3d.hyperparams import ShampooHyperParams
from shampoo3d.layout import Storage, describe
from shampoo3d.plan import BlockId, make_plans
from shampoo3d.topology import Claims, Mesh

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Embeddings = Iterable[Tensor | str] | Callable[[str, Tensor], bool]


@dataclass
class Facts:
    """What is known of the parameters beside their groups.

    Attributes:
        names: of every parameter, unique.
        embeddings: those that ``ignore_embedding_layer`` leaves without preconditioner.
        models: the modules that the parameters came from, as far as they could be found.
        originals: the parameters as the user gave them, by group: wrappers may replace those in the groups.
    """

    hp: ShampooHyperParams
    names: dict[Tensor, str] = field(default_factory=dict)
    embeddings: set[Tensor] = field(default_factory=set)
    models: list[nn.Module] = field(default_factory=list)
    originals: list[list[Tensor]] = field(default_factory=list)

    def learn(
        self, group: int, params: Sequence[Tensor], names: Sequence[str] | None, embeddings: Embeddings | None
    ) -> None:
        """Take in a new group of parameters; where that raises, nothing has been learned.

        Raises:
            ValueError: naming a parameter that is not supported, or what is wrong with the embeddings.
        """
        fresh = self._names_of(group, params, names)
        for param, name in fresh.items():
            if native.is_sharded(param):
                raise ValueError(f"parameter {name!r} is a DTensor, as FSDP2 makes them, which is not supported yet")
            if param.dtype not in _DTYPES:
                kind = "complex" if param.is_complex() else "not supported"
                supported = ", ".join(map(str, _DTYPES))
                raise ValueError(f"parameter {name!r} is {kind} ({param.dtype}); supported: {supported}")
        self.embeddings |= self._embeddings_of(fresh, embeddings)
        self.names |= fresh
        self.originals.append(list(params))

    def _names_of(self, group: int, params: Sequence[Tensor], given: Sequence[str] | None) -> dict[Tensor, str]:
        """Names as given, as in the model, or by place; unique."""
        named = (item for model in reversed(self.models) for item in model.named_parameters())
        in_model: dict[Tensor, str] = {param: name for name, param in named}
        taken = set(self.names.values())
        fresh: dict[Tensor, str] = {}
        for place, param in enumerate(params):
            name = given[place] if given else in_model.get(param, f"group{group}.param{place}")
            fresh[param] = name if name not in taken else f"group{group}.{name}"
            taken.add(fresh[param])
        return fresh

    def _embeddings_of(self, fresh: Mapping[Tensor, str], given: Embeddings | None) -> set[Tensor]:
        """The embeddings that ``ignore_embedding_layer`` is about: by module type, and those that are given."""
        if not self.hp.ignore_embedding_layer:
            if given is not None:
                raise ValueError("embeddings was given, but hyperparams.ignore_embedding_layer is False")
            return set()
        if given is None and not self.models:
            raise ValueError(
                "ignore_embedding_layer=True needs to know the embeddings: pass model.parameters() itself, not a list, "
                "or model=, or embeddings= (names, parameters, or a function of name and parameter)"
            )
        found = {weight for model in self.models for weight in native.embedding_weights(model)}
        if callable(given):
            return found | {param for param, name in fresh.items() if given(name, param)}
        wanted = set(given or ())
        return found | {param for param, name in fresh.items() if name in wanted or param in wanted}

    def check_embeddings(self, given: Embeddings | None) -> None:
        """Raise ValueError if an embedding was given that is not among the parameters, once all groups are known."""
        if given is None or callable(given):
            return
        names = set(self.names.values())
        for item in given:
            if (item not in names) if isinstance(item, str) else (item not in self.names):
                what = repr(item) if isinstance(item, str) else f"a tensor of shape {tuple(item.shape)}"
                raise ValueError(f"embeddings contains {what}, which is not a parameter of this optimizer")


def locate(claims: Claims) -> Mesh:
    """This process's place among the ranks, checked against what the user said.

    Raises:
        ValueError: where a claim contradicts what was found.
    """
    mesh = deepspeed.locate() if deepspeed.is_running() else native.locate(claims.topology)
    claims.check(mesh)
    return mesh


def unwrapped(groups: Sequence[Mapping[str, Any]], facts: Facts) -> dict[Tensor, Tensor]:
    """For each tensor in the groups, the model's parameter behind it."""
    originals = [params for params in facts.originals if params]
    everything = [param for params in originals for param in params]
    deepspeed.refuse_zero(everything)
    behind: dict[Tensor, Tensor] = {}
    for place, group in enumerate(groups):
        params: list[Tensor] = group["params"]
        known = originals[place] if place < len(originals) else []
        if all(param in facts.names for param in params):
            behind |= {param: param for param in params}
        else:
            behind |= dict(zip(params, deepspeed.unwrap(params, known), strict=True))
    return behind


def assemble(
    groups: Sequence[Mapping[str, Any]],
    behind: Mapping[Tensor, Tensor],
    facts: Facts,
    mesh: Mesh,
    taking_part: Collection[Tensor],
    fixed: Mapping[BlockId, int],
) -> list[Replicas]:
    """Bind the parameters ``taking_part``, and plan among each set of ranks that store the same ones.

    ``fixed`` are the owners of blocks that were planned before, which stay.

    Raises:
        ValueError: naming a parameter that is tied to other pipeline stages, if there is no model to tell which.
    """
    tied: dict[Tensor, tuple[int, ...]] = {}
    for model in facts.models:
        tied |= deepspeed.tied_holders(model)
    by_holders: defaultdict[tuple[int, ...], list[Binding]] = defaultdict(list)
    for number, group in enumerate(groups):
        for param in group["params"]:
            if param in taking_part:
                if deepspeed.is_tied_copy(behind[param]) and behind[param] not in tied:
                    raise ValueError(
                        f"{facts.names[behind[param]]!r} is tied to other pipeline stages, and only the model tells to "
                        "which: pass model.parameters() itself, or model="
                    )
                storage = _storage(param, behind[param], group, facts, mesh, tied)
                matrix = describe(storage, facts.hp, mesh.everyone.size)
                by_holders[storage.holders].append(Binding(matrix, param, number, group["precondition"]))
    for holders, bindings in by_holders.items():
        if holders != mesh.data.ranks:  # these meet from stages whose parameters may come in another order
            bindings.sort(key=lambda binding: binding.matrix.name)
    held = {holders: [binding.matrix for binding in bindings] for holders, bindings in by_holders.items()}
    replicas = []
    for plan in make_plans(held, facts.hp, fixed):
        group_, tied_ = mesh.group(plan.ranks), plan.ranks != mesh.data.ranks
        replicas.append(Replicas.bind(group_, plan, by_holders[plan.ranks], mesh.rank, facts.hp, tied=tied_))
    return replicas


def is_trainable(param: Tensor) -> bool:
    """Whether it takes part in steps: it may get a gradient, or has one, and is not empty."""
    return param.numel() > 0 and (param.requires_grad or param.grad is not None)


def _storage(
    param: Tensor,
    original: Tensor,
    group: Mapping[str, Any],
    facts: Facts,
    mesh: Mesh,
    tied: Mapping[Tensor, tuple[int, ...]],
) -> Storage:
    excluded = "embedding" if original in facts.embeddings else ""
    if not group["precondition"]:
        excluded = "its parameter group has precondition=False"
    return Storage(
        name=facts.names[original],
        shape=tuple(param.shape),
        dtype=str(param.dtype).removeprefix("torch."),
        holders=tied.get(original, mesh.data.ranks),
        shard=native.tensor_parallel_shard(original, mesh.model.ranks.index(mesh.rank), mesh.model.size),
        excluded=excluded,
    )


def disagreement(replicas: Sequence[Replicas], hp: ShampooHyperParams) -> str:
    """How replicas differ in parameters, settings or values; empty if they do not. Collective among replicas."""
    complaint = ""
    for shared in replicas:
        if shared.group.size == 1:
            continue
        mine: dict[str, Any] = {"hyperparams": repr(hp), "number of parameters": len(shared.bindings)}
        for place, b in enumerate(shared.bindings):
            mine[f"parameter {place}"] = (b.matrix.name, b.matrix.storage.shape, b.matrix.storage.dtype)
        mine |= {f"blocks of {b.matrix.name}": [x.key for x in b.matrix.blocks] for b in shared.bindings}
        mine |= {f"sum and magnitude of {b.matrix.name}": repr(native.checksum(b.param)) for b in shared.bindings}
        mine["plan"] = shared.plan.digest()
        everyones: list[Any] = [None] * shared.group.size
        dist.all_gather_object(everyones, mine, group=shared.group.handle)
        for rank, theirs in zip(shared.group.ranks, everyones, strict=True):
            for what in everyones[0] | theirs:
                first, other = everyones[0].get(what), theirs.get(what)
                if first != other and not complaint:
                    complaint = (
                        "ranks of one data-parallel group must hold the same parameters, but "
                        f"{what} is {first} on rank {shared.group.ranks[0]} and {other} on rank {rank}; if these ranks "
                        "are no replicas of each other, give topology="
                    )
    return complaint
