"""The optimizer from DeepSpeed's configuration; no DeepSpeed is needed to make it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from shampoo3d import Distribution, ShampooHyperParams
from shampoo3d.integrations.deepspeed import from_config
from test_refusals import refused


def config(params: Any, **entry: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "Shampoo3D", "params": params} | entry, "train_batch_size": 8}


def test_all_settings_have_one_set_of_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6))
    given = {"lr": 0.01, "weight_decay": 0.1, "preset": "soap", "block_size": 64, "asynchronous": True}
    given |= {"root_copies": 2, "ignore_embedding_layer": True, "embeddings": ["0.weight"], "splits": {"1.weight": 3}}
    whole = config(given)
    (tmp_path / "config.json").write_text(json.dumps(whole))
    for of in (whole, tmp_path / "config.json", str(tmp_path / "config.json")):
        optimizer, rest = from_config(of, model)
        assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.01, 0.1)
        assert optimizer.distribution == Distribution(root_copies=2)
        assert optimizer.hyperparams == ShampooHyperParams.soap(
            block_size=64,
            ignore_embedding_layer=True,
            computation=replace(ShampooHyperParams.soap().computation, asynchronous=True),
        )
        assert rest.pop("zero_allow_untested_optimizer") is True
        assert rest.pop("zero_force_ds_cpu_optimizer") is False
        assert rest == {"train_batch_size": 8}
    assert whole == config(given)


def test_groups_may_be_given() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(2, 2)
    groups = [{"params": first.parameters(), "lr": 0.5}, {"params": second.parameters()}]
    optimizer, _ = from_config(config({"lr": 0.1}), nn.Sequential(first, second), groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    assert optimizer.hyperparams == ShampooHyperParams.default()


REFUSED: dict[str, tuple[Any, str]] = {
    "of AdamW": (config({}, type="AdamW"), 'config must have "optimizer": {"type": "Shampoo3D"'),
    "none": ({"train_batch_size": 8}, 'config must have "optimizer"'),
    "misspelt": (
        config({"block_sise": 8}),
        "optimizer has no setting 'block_sise'; did you mean 'block_size'?",
    ),
    "misspelt argument": (config({"weigth_decay": 8}), "did you mean 'weight_decay'?"),
    "out of bounds": (config({"beta2": 2.0}), "beta2 must be finite and > 0 and <= 1, got 2.0"),
    "for a trainer to fill in": (
        config({"lr": "auto"}),
        "optimizer has lr='auto', which only a Trainer fills in: give a value",
    ),
    "preset": (config({"preset": "fast"}), "hyperparams must name a preset"),
    "shared": (config({"root_copies": 0}), "root_copies must be >= 1, got 0"),
    "no configuration": (3, "config must be a configuration or the path of its file, got 3"),
}


@pytest.mark.parametrize(("given", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(given: Any, text: str) -> None:
    refused(lambda: from_config(given, nn.Linear(3, 2)), text)
