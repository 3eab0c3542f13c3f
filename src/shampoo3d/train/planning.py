"""Who will own what in a run, found without starting it."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

import torch
from deepspeed.pipe import TiedLayerSpec
from deepspeed.runtime.utils import partition_balanced
from torch import nn

from shampoo3d.engines.native import embedding_weights
from shampoo3d.layout import Matrix, Storage, describe
from shampoo3d.plan import Plan, make_plans

from . import gpt
from .settings import Settings
from .trainer import shampoo_settings


def foresee(settings: Settings, vocabulary: int) -> list[Plan]:
    """The plans that the ranks of a run with these settings will make."""
    hp = shampoo_settings(settings)
    matrices: defaultdict[tuple[int, ...], dict[str, Matrix]] = defaultdict(dict)
    for storage in _storages(settings, vocabulary, hp.ignore_embedding_layer):
        matrices[storage.holders].setdefault(storage.name, describe(storage, hp, settings.world))
    plans = make_plans({ranks: list(held.values()) for ranks, held in matrices.items()}, hp)
    return sorted(plans, key=lambda plan: plan.ranks)


def _storages(settings: Settings, vocabulary: int, ignore_embeddings: bool) -> list[Storage]:
    """How the parameters of all layers are stored, under the names that PipelineModule gives them."""
    specs = gpt.layers(settings, vocabulary)
    stages = partition_balanced([float(spec.typename is gpt.Block) for spec in specs], settings.pipe)
    layers = [(stage, place) for stage, ends in enumerate(pairwise(stages)) for place in range(*ends)]
    sharing: defaultdict[str, set[int]] = defaultdict(set)
    for stage, place in layers:
        sharing[_prefix(specs[place], place)].update(range(stage * settings.data, (stage + 1) * settings.data))
    storages = []
    for place, spec in enumerate(specs):
        prefix = _prefix(spec, place)
        with torch.device("meta"):
            module: nn.Module = spec.build()
        embeddings = embedding_weights(module) if ignore_embeddings else set()
        for name, param in module.named_parameters():
            excluded = "embedding" if param in embeddings else ""
            dtype = str(param.dtype).removeprefix("torch.")
            holders = tuple(sorted(sharing[prefix]))
            storages.append(Storage(f"{prefix}.{name}", tuple(param.shape), dtype, holders, None, excluded))
    return storages


def _prefix(spec: Any, place: int) -> str:
    return f"tied_modules.{spec.key}" if isinstance(spec, TiedLayerSpec) else str(place)
