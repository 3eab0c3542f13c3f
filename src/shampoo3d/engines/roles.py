"""Roles of parameters, found in the modules that hold them: embeddings, output layers, kernels, fused matrices.

Embeddings and output layers have a row for each word of a vocabulary, and most words are rare: factors, in which all
rows take part, tell little about one of them, and cost most.
"""

import gc
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from shampoo3d.engines import native
from shampoo3d.engines.splits import fused_in
from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.blocks import Split
from shampoo3d.settings.hyperparams import ShampooHyperParams
from shampoo3d.settings.validation import short

Verdict = Callable[[str, Tensor], bool | None]
Embeddings = Iterable[Tensor | str] | Mapping[Tensor | str, bool] | Verdict


@dataclass
class Facts:
    """Sizes and names of embeddings and linear layers, on one rank, or on all that hold parts of a model.

    Attributes:
        tables: the rows and columns of embeddings.
        linear: the rows of each linear layer's weight, by its name in the model.
        told: True if a model names its output layer.
    """

    tables: set[tuple[int, int]] = field(default_factory=set)
    linear: dict[str, int] = field(default_factory=dict)
    told: bool = False

    @classmethod
    def joined(cls, parts: Iterable["Facts"]) -> "Facts":
        whole = cls()
        for part in parts:
            whole.tables |= part.tables
            whole.linear |= part.linear
            whole.told |= part.told
        return whole

    @property
    def vocabularies(self) -> set[int]:
        """The rows of the largest embedding, and of those that are far longer than wide: not of a few types."""
        most = max((rows for rows, _ in self.tables), default=0)
        return {rows for rows, columns in self.tables if rows == most or rows >= 4 * columns}

    @property
    def heads(self) -> set[str]:
        """Names of the linear layers with a row for each word.

        Others are as long by chance: layers that recur under numbered names, and layers within these.
        """
        alike = [] if self.told else [name for name, rows in self.linear.items() if rows in self.vocabularies]
        recurring = Counter(map(_unnumbered, alike))
        single = [name for name in alike if recurring[_unnumbered(name)] == 1]
        return {name for name in single if name == _unnumbered(name)} or {*single[-1:]}


def collected(given: Embeddings | None) -> Mapping[Tensor | str, bool] | Verdict | None:
    """Take a snapshot of the argument, in which names and parameters without a verdict are embeddings.

    Raises:
        TypeError: if it is neither names and parameters nor a function.
    """
    if given is None or callable(given):
        return given
    pairs: list[tuple[Any, Any]] | None = None
    if isinstance(given, Mapping):
        pairs = list(given.items())
    elif isinstance(given, Iterable) and not isinstance(given, (str, Tensor)):
        pairs = [(item, True) for item in given]
    if pairs is None or not all(isinstance(item, (str, Tensor)) and isinstance(of, bool) for item, of in pairs):
        raise TypeError(
            "embeddings must be names or parameters, each perhaps with True or False, or a function of both, got "
            f"{short(given)}"
        )
    return {native.bare(item) if isinstance(item, str) else item: of for item, of in pairs}


@dataclass
class Roles:
    """Roles of the parameters that the settings leave without factors, and what else modules tell of theirs.

    Attributes:
        given: the user's ``embeddings`` argument.
        verdicts: the user's answer for single parameters.
        found: the role of every parameter that has one, as known last.
        kernels: the parameters of convolutions.
        fused: the parameters that are several matrices, and how.
    """

    hp: ShampooHyperParams
    given: Mapping[Tensor | str, bool] | Verdict | None = None
    verdicts: dict[Tensor, bool] = field(default_factory=dict)
    found: dict[Tensor, str] = field(default_factory=dict)
    kernels: set[Tensor] = field(default_factory=set)
    fused: dict[Tensor, Split] = field(default_factory=dict)
    _models: list[nn.Module] = field(default_factory=list)
    _held: set[Tensor] = field(default_factory=set)  # the parameters of these models when roles were found last

    @property
    def ignored(self) -> bool:
        """True if the settings leave some role without factors."""
        return self.hp.ignore_embedding_layer or self.hp.ignore_output_layer

    def learn(self, names: Mapping[Tensor, str], models: Iterable[nn.Module]) -> None:
        """Register parameters; ``models``: the modules that they belong to, as far as they are known.

        Raises:
            ValueError: if embeddings were given that the settings do not leave without factors.
        """
        if not self.ignored and self.given is not None:
            raise ValueError(
                "embeddings was given, but hyperparams.ignore_embedding_layer is False: set it, or leave embeddings out"
            )
        if not self.hp.heeds_modules:
            return
        asked = {param: verdict for param, name in names.items() if (verdict := self._asked(param, name)) is not None}
        self.verdicts |= asked
        if names.keys() <= self._held and not asked:  # all groups of a model are found with its first one
            return
        self._add(models)
        if unheld := names.keys() - self._parameters():
            self._add(_roots_of(unheld))
        self._held = self._parameters()
        modules = self._modules()
        convolutions = (module for module in modules if isinstance(module, _ConvNd))
        self.kernels = {param for module in convolutions for param in module.parameters()}
        self.fused = fused_in(modules)
        self.find(self.facts({}))

    def _parameters(self) -> set[Tensor]:
        return {param for module in self._modules() for param in module._parameters.values() if param is not None}

    def _add(self, models: Iterable[nn.Module]) -> None:
        self._models += [model for model in models if model not in self._models]

    def _modules(self) -> set[nn.Module]:
        return {module for model in self._models for module in model.modules()}

    def _asked(self, param: Tensor, name: str) -> bool | None:
        if self.given is None or callable(self.given):
            return self.given(name, param) if self.given else None
        return self.given.get(param, self.given.get(name))

    def facts(self, shapes: Mapping[Tensor, Shape]) -> Facts:
        """Collect the facts of the modules here; ``shapes``: of logical matrices, where parameters have others."""
        modules = self._modules()
        embeddings: list[Any] = [module for module in modules if native.is_embedding(module)]
        tables = {(int(module.num_embeddings), int(module.embedding_dim)) for module in embeddings}
        linear = {name: shapes.get(p, p.shape)[0] for p, name in self._linear(modules).items()}
        return Facts(tables, linear, told=bool(_told(modules)))

    def _linear(self, modules: Iterable[nn.Module]) -> dict[Tensor, str]:
        names = {p: name for model in self._models for p, name in native.names_in(model).items()}
        weights = {module._parameters.get("weight") for module in modules if _is_linear(module)}
        return {p: name for p, name in names.items() if p in weights and not is_lazy(p) and p.dim()}

    def find(self, facts: Facts) -> None:
        """Find the roles of all parameters by what all ranks know."""
        modules = self._modules()
        found = {} if modules else dict(self.found)  # a copy knows no modules
        if self.hp.ignore_output_layer:
            heads, linear = facts.heads, self._linear(modules).items()
            found |= dict.fromkeys(_told(modules) | {p for p, name in linear if name in heads}, "output layer")
        if self.hp.ignore_embedding_layer:
            embeddings = (module for module in modules if native.is_embedding(module))
            found |= {p: "embedding" for module in embeddings for p in module.parameters(recurse=False)}
        found |= {param: "embedding, as given" for param, is_one in self.verdicts.items() if is_one}
        self.found = {p: role for p, role in found.items() if self.verdicts.get(p, True)}

    def of(self, param: Tensor) -> str:
        """Return the role of a parameter; empty if it has none."""
        return self.found.get(param, "")

    def without_models(self, params: Collection[Tensor]) -> "Roles":
        """Return a copy with what is known about these parameters."""
        found = {param: role for param, role in self.found.items() if param in params}
        kernels = {param for param in self.kernels if param in params}
        fused = {param: split for param, split in self.fused.items() if param in params}
        return replace(self, found=found, kernels=kernels, fused=fused, _models=[], _held=set())


def _told(modules: Iterable[nn.Module]) -> set[Tensor]:
    """Return what models of transformers name as their output embeddings."""
    models: list[Any] = [module for module in modules if hasattr(module, "get_output_embeddings")]
    heads = [model.get_output_embeddings() for model in models]
    return {weight for head in heads if isinstance(weight := getattr(head, "weight", None), Tensor)}


def _roots_of(params: Iterable[Tensor]) -> set[nn.Module]:
    """Find the outermost modules of this process that have one of the parameters, however they were given to us."""
    modules = [it for it in gc.get_objects() if issubclass(type(it), nn.Module) and "_modules" in vars(it)]
    parents = {id(child): module for module in modules for child in module._modules.values()}
    wanted, roots = {id(param) for param in params}, set()
    for module in modules:
        if any(id(param) in wanted for param in module._parameters.values()):
            climbed = {id(module)}
            while (parent := parents.get(id(module))) is not None and id(parent) not in climbed:
                module = parent
                climbed.add(id(module))
            roots.add(module)
    return roots


def _is_linear(module: nn.Module) -> bool:
    """Return whether it is ``nn.Linear`` or a tensor-parallel layer of that name, of which there are many."""
    return any("Linear" in kind.__name__ for kind in type(module).__mro__)


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "", name)
