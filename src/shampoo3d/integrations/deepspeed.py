"""The optimizer from DeepSpeed's configuration, whose own list of optimizers cannot be extended."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from shampoo3d.optimizer import Shampoo
from shampoo3d.settings.distribution import Distribution
from shampoo3d.settings.names import HOMES, check_names
from shampoo3d.settings.validation import check_kind

TYPE = "Shampoo3D"
_ARGUMENTS = ("lr", "momentum", "weight_decay", "maximize", "embeddings", "splits")
_SHARED = tuple(field.name for field in fields(Distribution))


def from_config(
    config: str | os.PathLike[str] | Mapping[str, Any], model: nn.Module, params: Iterable[Any] | None = None
) -> tuple[Shampoo, dict[str, Any]]:
    """Make the optimizer that a configuration describes; call it before ``deepspeed.initialize``, which gets both.

    Args:
        config: DeepSpeed's configuration or the file that has it. Its entry ``"optimizer"`` is ``{"type": "Shampoo3D",
            "params": {...}}`` with ``preset`` and, by their names, arguments of :class:`shampoo3d.Shampoo` and settings
            of ``ShampooHyperParams``, ``Variant``, ``Computation`` and ``Distribution``.
        model: the module to train, before or after ``deepspeed.zero.Init``, or a ``PipelineModule``.
        params: its parameters or groups of them, if not all in one group.

    Returns:
        The optimizer, and the configuration for ``deepspeed.initialize``: without the entry, and with those that allow
        an optimizer that is not DeepSpeed's own.

    Raises:
        TypeError, ValueError: naming the setting and its bound, or an unknown name with the nearest.
    """
    check_kind("config", config, (str, os.PathLike, Mapping), "a configuration or the path of its file")
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    whole = dict(config) if isinstance(config, Mapping) else json.loads(Path(config).read_text())
    entry = whole.pop("optimizer", None)
    if not isinstance(entry, Mapping) or entry.get("type") != TYPE:
        raise ValueError(f'config must have "optimizer": {{"type": "{TYPE}", "params": {{...}}}}, got {entry!r}')
    given = dict(entry.get("params", {}))
    check_names("config's optimizer", given, [*_ARGUMENTS, *_SHARED, *HOMES, "preset"])
    if unfilled := [name for name, value in given.items() if value == "auto"]:
        raise ValueError(f"config's optimizer has {unfilled[0]}='auto', which only a Trainer fills in: give a value")
    arguments = {name: given.pop(name) for name in _ARGUMENTS if name in given}
    distribution = Distribution(**{name: given.pop(name) for name in _SHARED if name in given})
    optimizer = Shampoo(
        params or model.parameters(), model=model, hyperparams=given, distribution=distribution, **arguments
    )
    whole["zero_allow_untested_optimizer"] = True
    whole["zero_force_ds_cpu_optimizer"] = False
    return optimizer, whole
