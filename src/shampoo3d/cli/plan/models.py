"""Shapes of a model's parameters: from a name, a configuration, a function that builds it, or a checkpoint."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shampoo3d.checkpoint.manifest import CheckpointError, Manifest, holds_checkpoint
from shampoo3d.cli.train.settings import RunError
from shampoo3d.engines.deepspeed import is_expert
from shampoo3d.engines.native import names_in
from shampoo3d.engines.roles import Roles
from shampoo3d.planning.layout import ITEM_BYTES
from shampoo3d.settings.hyperparams import ShampooHyperParams

from .builtin import BUILT_IN, EMBEDDING, Parameter


def parameters_of(model: str) -> list[Parameter]:
    """Return the parameters of MODEL, in the order that the model has them.

    Raises:
        RunError: naming the model, and what it may be.
    """
    path = Path(model)
    if model in BUILT_IN:
        found = list(BUILT_IN[model]())
    elif path.is_dir() and holds_checkpoint(path):
        found = _of_checkpoint(path)
    elif path.is_dir() and (path / "config.json").exists():
        found = _of_config(path / "config.json")
    elif path.is_file():
        found = _of_config(path)
    elif ":" in model and not path.exists():
        found = _of_function(model)
    else:
        raise RunError(
            f"MODEL {model} is neither one of {', '.join(BUILT_IN)} nor a config.json of transformers, a function as "
            "package.module:function, or a folder that save_checkpoint wrote"
        )
    if not found:
        raise RunError(f"MODEL {model} has no parameters that are trained")
    return found


def of_module(module: nn.Module, active: Mapping[str, float] | None = None) -> list[Parameter]:
    """Return the parameters of a module that are trained; tied ones once.

    Args:
        active: the share of parameters that computes for a token, by a part of their names.
    """
    names = {param: name for param, name in names_in(module).items() if param.requires_grad and param.numel()}
    roles = Roles(ShampooHyperParams.default())  # which finds all of them, whatever settings make of them
    roles.learn(names, [module])
    inputs_first = {
        id(weight)
        for inside in module.modules()
        if type(inside).__name__ == "Conv1D" and isinstance(weight := getattr(inside, "weight", None), Tensor)
    }
    found = []
    for param, name in names.items():
        dtype = str(param.dtype).removeprefix("torch.")
        if dtype not in ITEM_BYTES:
            raise RunError(f"parameter {name!r} is {dtype}; supported: {', '.join(ITEM_BYTES)}")
        if is_expert(param) and (spread := getattr(param, "group_name", "")) != "ep_size_1":
            raise RunError(
                f"parameter {name!r} is of an expert that {spread} spreads over ranks already, so that MODEL lacks the "
                "others: build it with ep_size=1, and say the number of ranks by --expert"
            )
        share = next((share for part, share in (active or {}).items() if part in name), 1.0)
        kernel, role, split = param in roles.kernels, roles.of(param), roles.fused.get(param, ())
        found.append(Parameter(name, tuple(param.shape), role, kernel, id(param) in inputs_first, share, dtype, split))
    return found


def _of_checkpoint(folder: Path) -> list[Parameter]:
    """Read names and shapes from a checkpoint: matrices without factors are taken for embeddings."""
    try:
        manifest = Manifest.read(folder)
    except CheckpointError as error:
        raise RunError(str(error)) from None
    return [
        Parameter(
            name,
            of.shape,
            EMBEDDING if len(of.shape) == 2 and min(of.shape) > 1 and not of.axes else "",
            kernel=len(of.shape) > 2 and len(of.merged) == 2,
            dtype=of.dtype,
        )
        for name, of in manifest.parameters.items()
    ]


def _of_config(path: Path) -> list[Parameter]:
    """Build the model of a configuration of transformers without data."""
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    except ImportError:
        raise RunError(f"MODEL {path} needs transformers: pip install transformers") from None
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        config: Any = AutoConfig.for_model(**values)
        causal = not values.get("architectures") or any("CausalLM" in name for name in values["architectures"])
        with torch.device("meta"):
            try:
                model = (AutoModelForCausalLM if causal else AutoModel).from_config(config)
            except ValueError:  # a configuration that has no language model
                model = AutoModel.from_config(config)
    except Exception as error:
        raise RunError(f"MODEL {path} is no configuration that transformers can build: {_line(error)}") from None
    experts = next(
        (n for name in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(config, name, 0))), 0
    )
    chosen = getattr(config, "num_experts_per_tok", 0)
    return of_module(model, {".experts.": chosen / experts} if experts and chosen else None)


def _of_function(model: str) -> list[Parameter]:
    """Call the function that builds the model, on the meta device."""
    place, _, name = model.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        with torch.device("meta"):
            module = getattr(importlib.import_module(place), name)()
    except Exception as error:
        raise RunError(f"MODEL {model}: {type(error).__name__}: {_line(error)}") from None
    finally:
        sys.path.remove(str(Path.cwd()))
    if not isinstance(module, nn.Module):
        raise RunError(f"MODEL {model} must return a torch.nn.Module, got {type(module).__name__}")
    return of_module(module)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
