"""Names, embeddings and fused matrices of the parameters, and the model that they belong to."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from shampoo3d.engines import deepspeed, native
from shampoo3d.engines.dtensor import local
from shampoo3d.engines.engine import GroupContent
from shampoo3d.engines.reading import engine
from shampoo3d.engines.roles import Roles
from shampoo3d.engines.splits import Splits, splits_of
from shampoo3d.planning.blocks import Split

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_supported(param: Tensor, name: str) -> None:
    """Raise ValueError, naming the parameter, if it is one that steps cannot update.

    One of a lazy module has neither shape nor strides before the module's first forward pass.
    """
    if is_lazy(param):
        return
    if type(param).__name__ == "FlatParameter" or getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            f"parameter {name!r} is flattened by FullyShardedDataParallel, which does not say where matrices begin: "
            "shard the model with torch.distributed.fsdp.fully_shard (FSDP2) instead"
        )
    if is_traceable_wrapper_subclass(param) and not isinstance(param, DTensor):
        raise ValueError(
            f"parameter {name!r} is a {type(param).__name__}, a tensor made of others, such as a quantised one: a step "
            "can only write into stored numbers; train an ordinary parameter, and freeze this one"
        )
    if param.dtype not in _DTYPES:
        kind = "complex" if param.is_complex() else "not supported"
        raise ValueError(f"parameter {name!r} is {kind} ({param.dtype}); supported: {', '.join(map(str, _DTYPES))}")
    if param.layout != torch.strided:
        raise ValueError(f"parameter {name!r} is not supported ({param.layout}); its layout must be dense")
    if _overlaps(param):
        raise ValueError(
            f"parameter {name!r} of shape {tuple(param.shape)} has strides {param.stride()}: elements that share "
            "memory cannot be updated independently; clone it"
        )


def _overlaps(param: Tensor) -> bool:
    """Return whether elements share memory: an axis with a stride no longer than what the shorter ones span."""
    span = 0
    for stride, n in sorted(zip(param.stride(), param.shape, strict=True)):
        if n > 1 and stride <= span:
            return param.numel() > 0
        span += stride * (n - 1)
    return False


def sharing_memory(names: Mapping[Tensor, str]) -> tuple[str, str] | None:
    """Return the names of two of these tensors that have elements in common, if there are any."""
    in_storage: defaultdict[Any, list[tuple[int, str, Tensor]]] = defaultdict(list)
    for tensor, name in names.items():
        values = local(tensor.detach())
        if values.numel() and not values.is_meta:
            key = values.untyped_storage().data_ptr(), values.dtype
            in_storage[key].append((int(values.storage_offset()), name, values))
    for members in in_storage.values():
        members.sort(key=lambda member: member[0])
        for number, (_, name, values) in enumerate(members):
            stop = _stop(values)
            for start, other, others in members[number + 1 :]:
                if start >= stop:
                    break
                elements = torch.zeros(max(stop, _stop(others)), dtype=torch.bool)
                elements.as_strided(values.shape, values.stride(), values.storage_offset()).fill_(True)
                if elements.as_strided(others.shape, others.stride(), start).any():
                    return name, other
    return None


def _stop(values: Tensor) -> int:
    """Return the end of the elements in their storage."""
    steps = zip(values.stride(), values.shape, strict=True)
    return int(values.storage_offset()) + 1 + sum(stride * (n - 1) for stride, n in steps)


@dataclass
class ParameterRegistry:
    """Parameters with their properties that come from the user or the model.

    Attributes:
        names: of every parameter, unique.
        roles: of the parameters that the settings leave without factors.
        splits: the user's ``splits`` argument; ``split``: the parameters that are several matrices, and how.
        models: the modules that the parameters belong to, as far as they could be found.
        originals: the model's parameters, by group, in the very lists that the groups were made with: an engine puts
            other tensors into the groups, but replaces a parameter of the model in these lists.
        groups: the parameter groups, of which an engine may show a part.
    """

    roles: Roles
    names: dict[Tensor, str] = field(default_factory=dict)
    splits: Splits | None = None
    split: dict[Tensor, Split] = field(default_factory=dict)
    models: list[nn.Module] = field(default_factory=list)
    originals: list[list[Tensor]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    _counted: set[Tensor] = field(default_factory=set)

    def learn(self, group: dict[str, Any]) -> None:
        """Register a new group of parameters; if that raises, nothing has been registered.

        Raises:
            TypeError, ValueError: naming a parameter that is not supported, or what is wrong with embeddings or splits.
        """
        params: list[Tensor] = group["params"]
        fresh = self._names_of(len(self.originals), params, group.get("param_names"))
        for param in (param for param in params if param.requires_grad):
            check_supported(param, fresh[param])
        split = splits_of(self.splits, fresh)
        self.roles.learn(fresh, self.models)
        self.split |= split
        self.names |= fresh
        self.originals.append(params)
        self.groups.append(group)

    @property
    def contents(self) -> list[GroupContent]:
        """The parameter groups with the tensors that are in them now."""
        pairs = enumerate(zip(self.groups, self.originals, strict=True))
        return [GroupContent(number, group["params"], params, self.names) for number, (group, params) in pairs]

    @property
    def flat(self) -> bool:
        """True if an engine has put flat slices into the groups."""
        return any(engine().is_flat(group) for group in self.contents)

    @property
    def absent(self) -> list[str]:
        """Names of the models' trainable parameters that are in no group."""
        pairs = [pair for model in self.models for pair in native.names_in(model).items()]
        known = {*self.names.values()}
        return [name for param, name in pairs if param.requires_grad and param not in self.names and name not in known]

    def follow(self, shown: list[dict[str, Any]]) -> None:
        """Take over the groups and their lists of parameters from those that ``param_groups`` has now.

        Dictionaries and lists are the user's, who may replace, add and remove them. An engine, though, may show some
        of the dictionaries at a time, and puts its own tensors into them.
        """
        pairs = zip(self.groups, shown, self.originals, strict=False)
        if len(self.groups) == len(shown) and all(a is b and b["params"] is params for a, b, params in pairs):
            return
        places = [self._place_of(group) for group in shown]
        if self.flat:
            if len(shown) == len(self.groups):
                places = [number if place is None else place for number, place in enumerate(places)]
            shown_at = {place: group for group, place in zip(shown, places, strict=True) if place is not None}
            self.groups = [shown_at.get(place, group) for place, group in enumerate(self.groups)]
        else:
            self.originals = [self._originals_of(group, place) for group, place in zip(shown, places, strict=True)]
            self.groups = list(shown)

    def _place_of(self, group: Mapping[str, Any]) -> int | None:
        """Find the number that a group had: its dictionary, its list or one of its parameters was there."""
        params = group["params"]
        of_dictionary = (place for place, before in enumerate(self.groups) if before is group)
        of_list = (place for place, before in enumerate(self.groups) if before["params"] is params)
        of_members = (place for place, before in enumerate(self.originals) if not {*before}.isdisjoint(params))
        return next(chain(of_dictionary, of_list, of_members), None)

    def _originals_of(self, group: Mapping[str, Any], place: int | None) -> list[Tensor]:
        """Return the list of the model's own parameters: that of the group, unless an engine has put copies into it."""
        params: list[Tensor] = group["params"]
        if place is None or not params:
            return params
        before = self.originals[place]
        of_model = {param for model in self.models for param in model.parameters()}
        if any(param in self.names or param in of_model for param in params):
            return params
        shapes = [param.shape for param in before if param.requires_grad and param.numel()]
        copies = shapes == [param.shape for param in params]
        matrices = any(param.dim() > 1 for param in before)
        slices = matrices and len(params) <= len(before) and all(param.dim() == 1 for param in params)
        return before if copies or slices else params

    def take_sharded(self) -> None:
        """Put into the groups the ``DTensor`` by which ``fully_shard`` has replaced a parameter of a known module."""
        for model in self.models:
            sharded = {name: param for param, name in native.names_in(model).items() if isinstance(param, DTensor)}
            for params in self.originals if sharded else ():
                for index, param in enumerate(params):
                    if not isinstance(param, DTensor):
                        params[index] = sharded.get(self.names.get(param, ""), param)

    def learn_replaced(self) -> None:
        """Register parameters that an engine or the user has put into the groups since they were registered."""
        for group, params in enumerate(self.originals):
            if fresh := [param for param in params if param not in self.names]:
                given = self.groups[group].get("param_names", ())
                called = dict(zip(params, given, strict=True)) if len(given) == len(params) else {}
                names = self._names_of(group, fresh, [called[param] for param in fresh] if called else None)
                self.roles.learn(names, self.models)
                self.split |= splits_of(self.splits, names)
                self.names |= names
        current = {param for params in self.originals for param in params}
        for param in self.split.keys() - current:
            if not callable(self.splits) and self.names[param] not in (self.splits or ()):
                raise ValueError(
                    f"splits has {self.names[param]!r} as a parameter, which an engine has replaced: use its name"
                )
        self.names = {param: name for param, name in self.names.items() if param in current}
        self.split = {param: split for param, split in self.split.items() if param in current}

    def count_experts(self) -> None:
        """Name the experts by their numbers over all ranks, once the engine has distributed them."""
        fresh = deepspeed.expert_names(self.names) if not self._counted else {}
        self.names |= fresh
        self._counted |= fresh.keys()

    def _names_of(self, group: int, params: Sequence[Tensor], given: Sequence[str] | None) -> dict[Tensor, str]:
        """Name the parameters uniquely: as given, as in the model, or by index."""
        in_model: dict[Tensor, str] = {}
        for model in reversed(self.models):
            in_model |= native.names_in(model)
        if given and all(name.startswith("module.") for name in given):  # of a DistributedDataParallel
            given = [name.removeprefix("module.") for name in given]
        used = {
            name
            for param, name in self.names.items()
            if not in_model or param in in_model or name not in in_model.values()
        }
        fresh: dict[Tensor, str] = {}
        for index, param in enumerate(params):
            name = native.bare(given[index]) if given else in_model.get(param, f"group{group}.param{index}")
            fresh[param] = name if name not in used else f"group{group}.{name}"
            used.add(fresh[param])
        return fresh

    def check_given(self, models: Iterable[nn.Module]) -> None:
        """Raise ValueError if embeddings or splits names no parameter, or one of these models has none of them.

        Called once all groups are known.
        """
        for model in models:
            if self.names and self.names.keys().isdisjoint(model.parameters()):
                raise ValueError(
                    f"model is a {type(model).__name__} that has none of the parameters, such as "
                    f"{next(iter(self.names.values()))!r}: give the module that they belong to"
                )
        names = set(self.names.values())
        for argument, given in (("embeddings", self.roles.given), ("splits", self.splits)):
            for item in () if given is None or callable(given) else given:
                if (item not in names) if isinstance(item, str) else (item not in self.names):
                    shown = repr(item) if isinstance(item, str) else f"a tensor of shape {tuple(item.shape)}"
                    raise ValueError(f"{argument} contains {shown}, which is not a parameter of this optimizer")
