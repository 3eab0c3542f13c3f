"""Names, embeddings and fused matrices of the parameters, and the model that they belong to."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shampoo3d.engines import deepspeed, native
from shampoo3d.engines.splits import Splits, splits_of
from shampoo3d.planning.blocks import Split
from shampoo3d.settings.hyperparams import ShampooHyperParams

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Embeddings = Iterable[Tensor | str] | Callable[[str, Tensor], bool]


def collected(given: Embeddings | None) -> Embeddings | None:
    """Take a snapshot of the argument.

    Raises:
        TypeError: if it is neither names and parameters nor a function.
    """
    if given is None or callable(given):
        return given
    items = tuple(given) if isinstance(given, Iterable) and not isinstance(given, (str, Tensor)) else None
    if items is None or not all(isinstance(item, (str, Tensor)) for item in items):
        raise TypeError(f"embeddings must be names or parameters, or a function of both, got {given!r}")
    return items


@dataclass
class ParameterRegistry:
    """Parameters with their properties that come from the user or the model.

    Attributes:
        names: of every parameter, unique.
        embeddings: those that ``ignore_embedding_layer`` leaves without preconditioner.
        given: the user's ``embeddings`` argument.
        splits: the user's ``splits`` argument; ``split``: the parameters that are several matrices, and how.
        models: the modules that the parameters belong to, as far as they could be found.
        originals: the model's parameters, by group, in the very lists that the groups were made with: an engine puts
            other tensors into the groups, but replaces a parameter of the model in these lists.
    """

    hp: ShampooHyperParams
    names: dict[Tensor, str] = field(default_factory=dict)
    embeddings: set[Tensor] = field(default_factory=set)
    given: Embeddings | None = None
    splits: Splits | None = None
    split: dict[Tensor, Split] = field(default_factory=dict)
    models: list[nn.Module] = field(default_factory=list)
    originals: list[list[Tensor]] = field(default_factory=list)
    _counted: set[Tensor] = field(default_factory=set)

    def learn(self, params: list[Tensor], names: Sequence[str] | None) -> None:
        """Register a new group of parameters; if that raises, nothing has been registered.

        Raises:
            TypeError, ValueError: naming a parameter that is not supported, or what is wrong with embeddings or splits.
        """
        fresh = self._names_of(len(self.originals), params, names)
        for param, name in fresh.items():
            if param.dtype not in _DTYPES:
                kind = "complex" if param.is_complex() else "not supported"
                supported = ", ".join(map(str, _DTYPES))
                raise ValueError(f"parameter {name!r} is {kind} ({param.dtype}); supported: {supported}")
            if param.layout != torch.strided:
                raise ValueError(f"parameter {name!r} is not supported ({param.layout}); its layout must be dense")
            if param.numel() and any(
                stride == 0 and n > 1 for stride, n in zip(param.stride(), param.shape, strict=True)
            ):
                raise ValueError(
                    f"parameter {name!r} of shape {tuple(param.shape)} has strides {param.stride()}: elements that "
                    "share memory cannot be updated independently; clone it"
                )
        embeddings, split = self._embeddings_of(fresh), splits_of(self.splits, fresh)
        self.embeddings |= embeddings
        self.split |= split
        self.names |= fresh
        self.originals.append(params)

    def learn_replaced(self) -> None:
        """Register parameters by which an engine has replaced others since the optimizer was made."""
        for group, params in enumerate(self.originals):
            if fresh := [param for param in params if param not in self.names]:
                names = self._names_of(group, fresh, None)
                self.embeddings |= self._embeddings_of(names)
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
        self.embeddings &= current

    def count_experts(self) -> None:
        """Name the experts by their numbers over all ranks, once the engine has distributed them."""
        fresh = deepspeed.expert_names(self.names) if not self._counted else {}
        self.names |= fresh
        self._counted |= fresh.keys()

    def _names_of(self, group: int, params: Sequence[Tensor], given: Sequence[str] | None) -> dict[Tensor, str]:
        """Name the parameters uniquely: as given, as in the model, or by index."""
        named = (item for model in reversed(self.models) for item in model.named_parameters())
        in_model: dict[Tensor, str] = {param: name for name, param in named}
        used = {
            name
            for param, name in self.names.items()
            if not in_model or param in in_model or name not in in_model.values()
        }
        fresh: dict[Tensor, str] = {}
        for index, param in enumerate(params):
            name = given[index] if given else in_model.get(param, f"group{group}.param{index}")
            fresh[param] = name if name not in used else f"group{group}.{name}"
            used.add(fresh[param])
        return fresh

    def _embeddings_of(self, fresh: Mapping[Tensor, str]) -> set[Tensor]:
        """Find the embeddings that ``ignore_embedding_layer`` concerns: by module type, and those that are given."""
        given = self.given
        if not self.hp.ignore_embedding_layer:
            if given is not None:
                raise ValueError("embeddings was given, but hyperparams.ignore_embedding_layer is False")
            return set()
        if given is None and not self.models:
            raise ValueError(
                "ignore_embedding_layer=True needs to know the embeddings: pass model.parameters() itself, not a list, "
                "or model=, or embeddings= (names, parameters, or a function of name and parameter)"
            )
        embeddings = {weight for model in self.models for weight in native.embedding_weights(model)}
        if callable(given):
            return embeddings | {param for param, name in fresh.items() if given(name, param)}
        wanted = set(given or ())
        return embeddings | {param for param, name in fresh.items() if name in wanted or param in wanted}

    def check_given(self) -> None:
        """Raise ValueError if embeddings or splits names no parameter; called once all groups are known."""
        names = set(self.names.values())
        for argument, given in (("embeddings", self.given), ("splits", self.splits)):
            for item in () if given is None or callable(given) else given:
                if (item not in names) if isinstance(item, str) else (item not in self.names):
                    shown = repr(item) if isinstance(item, str) else f"a tensor of shape {tuple(item.shape)}"
                    raise ValueError(f"{argument} contains {shown}, which is not a parameter of this optimizer")
