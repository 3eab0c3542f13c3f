"""Folders of checkpoints in one process: whole or not there, damage is named, nothing in them is executed."""

import json
import pickle
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from common import HYPERPARAMS, assert_equal, draw, parameters, put_gradients, snapshot
from shampoo3d import CheckpointError, LayerwiseGrafting, Shampoo, ShampooHyperParams, Variant, latest_checkpoint
from shampoo3d.checkpoint.manifest import MANIFEST, partial

HP = replace(HYPERPARAMS, graft_type=LayerwiseGrafting.ADAGRAD)
EXECUTED: list[str] = []


def made(hp: ShampooHyperParams = HP, **changes: Any) -> Shampoo:
    named = [(f"layer.{number}.weight", param) for number, param in enumerate(parameters())]
    return Shampoo(named, hyperparams=hp, **{"lr": 0.01} | changes)


def train(optimizer: Shampoo, steps: range) -> Shampoo:
    for step in steps:
        put_gradients(optimizer.param_groups[0]["params"], step)
        optimizer.step()
    return optimizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train(made(), range(3)).save_checkpoint(tmp_path / "saved")
    return tmp_path / "saved"


def test_it_goes_on_bit_for_bit(folder: Path) -> None:
    uninterrupted, resumed = train(made(), range(6)), made(lr=0.5)
    loaded = resumed.load_checkpoint(folder)
    assert (loaded.step, loaded.changed, loaded.begun, loaded.left, loaded.reblocked) == (3, {}, (), (), {})
    assert resumed.param_groups[0]["lr"] == 0.01
    assert_equal(snapshot(train(resumed, range(3, 6))), snapshot(uninterrupted))


def test_skipped_steps_are_counted_on(tmp_path: Path) -> None:
    optimizer = train(made(), range(2))
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.full_like(param, torch.nan)
    optimizer.step()
    optimizer.save_checkpoint(tmp_path / "saved")
    resumed = made()
    resumed.load_checkpoint(tmp_path / "saved")
    assert resumed.skipped_steps == optimizer.skipped_steps == 1


def test_weights_that_are_not_contiguous_are_loaded(folder: Path) -> None:
    """Their flat tensor is a copy, which is written back."""
    resumed = made()
    params = resumed.param_groups[0]["params"]
    for param in params:
        param.data = torch.zeros(param.shape[::-1], dtype=param.dtype).permute(tuple(reversed(range(param.ndim))))
    resumed.load_checkpoint(folder)
    expected = train(made(), range(3)).param_groups[0]["params"]
    assert_equal([param.detach() for param in params], [param.detach() for param in expected])


def test_weights_may_stay(folder: Path) -> None:
    resumed = made()
    start = [param.detach().clone() for param in resumed.param_groups[0]["params"]]
    resumed.load_checkpoint(folder, weights=False)
    assert_equal([param.detach() for param in resumed.param_groups[0]["params"]], start)


def test_before_the_first_step_there_is_something_to_save(tmp_path: Path) -> None:
    made().save_checkpoint(tmp_path / "new")
    resumed = made()
    assert resumed.load_checkpoint(tmp_path / "new").step == 0
    assert_equal(snapshot(train(resumed, range(3))), snapshot(train(made(), range(3))))


def test_frozen_parameters_begin_when_they_are_unfrozen(tmp_path: Path) -> None:
    optimizer = made()
    frozen = optimizer.param_groups[0]["params"][0].requires_grad_(False)
    train(optimizer, range(3)).save_checkpoint(tmp_path / "saved")
    resumed = made()
    assert resumed.load_checkpoint(tmp_path / "saved").begun == ("layer.0.weight",)
    frozen.requires_grad_(True)
    assert_equal(snapshot(train(resumed, range(3, 6))), snapshot(train(optimizer, range(3, 6))))


def test_a_folder_is_not_written_twice(folder: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(CheckpointError, match="saved exists already"):
        made().save_checkpoint(folder)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_what_a_save_left_is_named_and_does_not_hinder_the_next(folder: Path) -> None:
    unfinished = folder.with_name("next")
    shutil.copytree(folder, partial(unfinished))
    (partial(unfinished) / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"next was never finished.*next\.partial.*take an earlier one"):
        made().load_checkpoint(unfinished)
    train(made(), range(4)).save_checkpoint(unfinished)
    assert not partial(unfinished).exists()
    assert made().load_checkpoint(unfinished).step == 4


def test_a_disk_that_refuses_leaves_no_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    optimizer = train(made(), range(2))
    before = snapshot(optimizer)
    with pytest.raises(CheckpointError, match=r"other could not be written.*No space left"):
        optimizer.save_checkpoint(folder.with_name("other"))
    assert not folder.with_name("other").exists()
    assert_equal(snapshot(optimizer), before)


def test_the_latest_is_the_finished_one_of_the_highest_step(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    optimizer = made()
    for step in range(8, 11):  # as names, "step-9" comes after "step-10"
        train(optimizer, range(step, step + 1)).save_checkpoint(tmp_path / f"step-{step}")
    (tmp_path / "step-11.partial").mkdir()
    shutil.copy(tmp_path / "step-10" / MANIFEST, tmp_path / "step-11.partial" / MANIFEST)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-10"


# ---- settings that changed ----


def test_changed_settings_are_kept_where_they_can_be(folder: Path) -> None:
    loaded = made(replace(HP, preconditioning_compute_steps=5, diagonal_eps=1e-3)).load_checkpoint(folder)
    assert loaded.changed == {"preconditioning_compute_steps": (1, 5), "diagonal_eps": (1e-6, 1e-3)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graft_type": LayerwiseGrafting.SGD}, "graft_type was 'ADAGRAD' and is 'SGD'"),
        ({"inverse_exponent_override": 2}, "inverse_exponent_override was 0 and is 2"),
        ({"beta2": 0.9}, "beta2 was 1.0 and is 0.9"),
        ({"start_preconditioning_step": 3}, "start_preconditioning_step was 1 and is 3"),
        ({"variant": Variant(beta1=0.5)}, "variant.beta1 was 0.0 and is 0.5"),
        ({"variant": Variant(statistics="kl")}, "variant.statistics was 'gradient' and is 'kl'"),
        ({"variant": Variant(sides="first")}, r"'layer.0.weight' has axes with factors 0, and had 0x1"),
        ({"block_size": 2}, r"cut into other blocks.*'layer.0.weight'.*reblock=True"),
    ],
)
def test_what_would_mean_something_else_is_refused(changes: Any, message: str, folder: Path) -> None:
    optimizer = made(replace(HP, **changes), momentum=0.0)
    assert_refused(optimizer, folder, message)


def test_another_model_is_refused(folder: Path) -> None:
    named = [("layer.0.weight", nn.Parameter(draw((6, 5), 0))), ("new", nn.Parameter(draw((2, 2), 1)))]
    other = Shampoo(named, 0.01, hyperparams="classic")
    with pytest.raises(CheckpointError, match=r"nothing for 1 parameters: \['new'\]; 3 of its parameters are not in"):
        other.load_checkpoint(folder)
    names = ["layer.0.weight", "layer.1.weight", "layer.2.weight", "layer.3.weight"]
    wide = Shampoo([(name, nn.Parameter(draw((6, 6), 0))) for name in names], 0.01, hyperparams=HP)
    with pytest.raises(CheckpointError, match=r"'layer.0.weight' has shape 6x6, and had 6x5"):
        wide.load_checkpoint(folder)
    single = [(f"layer.{number}.weight", param) for number, param in enumerate(parameters(dtype=torch.float32))]
    with pytest.raises(CheckpointError, match=r"has state of float32, and had float64"):
        Shampoo(single, 0.01, hyperparams=HP).load_checkpoint(folder)


def test_a_part_of_the_model_loads_if_that_is_wanted(folder: Path) -> None:
    named = [("layer.0.weight", nn.Parameter(draw((6, 5), 7))), ("new", nn.Parameter(draw((2, 2), 1)))]
    other = Shampoo(named, 0.01, hyperparams=HP)
    loaded = other.load_checkpoint(folder, strict=False)
    assert (loaded.begun, len(loaded.left)) == (("new",), 3)
    assert torch.equal(named[0][1], train(made(), range(3)).param_groups[0]["params"][0])
    assert torch.equal(named[1][1], draw((2, 2), 1))


# ---- damage ----


def assert_refused(optimizer: Shampoo, folder: Path, message: str) -> None:
    train(optimizer, range(2))
    before = snapshot(optimizer)
    with pytest.raises(CheckpointError, match=message):
        optimizer.load_checkpoint(folder)
    assert_equal(snapshot(optimizer), before)
    assert not EXECUTED
    train(optimizer, range(2, 4))


def data_of(folder: Path) -> Path:
    return next(folder.glob("*.distcp"))


def edited(folder: Path, change: Callable[[Any], None]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def resealed(folder: Path) -> None:
    """Give the files that were changed new checksums, as somebody who means harm would."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}
    edited(folder, lambda m: m.update(files={name: [len(data), zlib.crc32(data)] for name, data in files.items()}))


def executed() -> None:
    EXECUTED.append("code")


class Harm:
    def __reduce__(self) -> Any:
        return executed, ()


def cut_short(folder: Path) -> None:
    data_of(folder).write_bytes(data_of(folder).read_bytes()[:-100])


def cut_short_and_resealed(folder: Path) -> None:
    data_of(folder).write_bytes(data_of(folder).read_bytes()[:5000])
    resealed(folder)


def with_a_bit_turned(folder: Path) -> None:
    data = bytearray(data_of(folder).read_bytes())
    data[len(data) // 2] ^= 1
    data_of(folder).write_bytes(data)


def without_a_file(folder: Path) -> None:
    data_of(folder).unlink()


def without_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()


def with_code_in_the_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Harm()))
    resealed(folder)


def with_an_attribute_in_the_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"cbuiltins\ngetattr\n(ctorch\nSize\nS'count'\ntR.")
    resealed(folder)


def with_code_in_the_tensors(folder: Path) -> None:
    """Every tensor's place is taken by a pickle of the same length that holds code."""
    harm = folder.with_name("harm")
    torch.save(Harm(), harm)
    metadata = FileSystemReader(folder).read_metadata()
    data = bytearray(data_of(folder).read_bytes())
    for stored in metadata.storage_data.values():
        if stored.length >= harm.stat().st_size:
            data[stored.offset : stored.offset + stored.length] = harm.read_bytes().ljust(stored.length, b"\0")
    data_of(folder).write_bytes(data)
    resealed(folder)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    metadata = FileSystemReader(folder).read_metadata()
    tensors: dict[str, Any] = {
        key: torch.zeros(of.size, dtype=of.properties.dtype) for key, of in metadata.state_dict_metadata.items()
    }
    change(tensors)
    data_of(folder).unlink()
    (folder / ".metadata").unlink()
    save(tensors, storage_writer=FileSystemWriter(folder), no_dist=True)
    resealed(folder)


def with_a_tensor_of_another_shape(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.update({"layer.0.weight/momentum": torch.zeros(6, 4)}))


def with_a_tensor_of_another_dtype(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.update({"layer.0.weight/momentum": torch.zeros(6, 5)}))


def with_a_tensor_missing(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.pop("layer.2.weight/graft_accumulator"))


def with_an_object_for_a_tensor(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.update({"layer.0.weight/momentum": "words"}))


DAMAGE: dict[Callable[[Path], None], str] = {
    cut_short: r"__0_0.distcp has \d+ bytes, and had \d+",
    cut_short_and_resealed: "could not be read: on rank 0: __0_0.distcp is damaged at layer",
    with_a_bit_turned: "the content of __0_0.distcp is not what was written",
    without_a_file: "the file __0_0.distcp is missing",
    without_metadata: "the file .metadata is missing",
    with_code_in_the_metadata: r"refuses \w*test_checkpoint_folder.executed",
    with_an_attribute_in_the_metadata: "refuses builtins.getattr of",
    with_code_in_the_tensors: "holds something else than tensors",
    with_a_tensor_of_another_shape: r"layer.0.weight/momentum is \(6, 4\), and \(6, 5\) is needed",
    with_a_tensor_of_another_dtype: r"layer.0.weight/momentum is torch.float32, and torch.float64 is needed",
    with_a_tensor_missing: "has no layer.2.weight/graft_accumulator",
    with_an_object_for_a_tensor: "has no layer.0.weight/momentum",
}


class PicklerOfPython311(pickle.Pickler):
    """Writes members of enumerations as Python 3.11.0 to 3.11.3 does."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_metadata_of_the_first_pythons_311_is_read(folder: Path) -> None:
    file = BytesIO()
    PicklerOfPython311(file).dump(FileSystemReader(folder).read_metadata())
    assert b"getattr" in file.getvalue()
    (folder / ".metadata").write_bytes(file.getvalue())
    resealed(folder)
    assert made().load_checkpoint(folder).step == 3


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_and_nothing_executed(damage: Callable[[Path], None], folder: Path) -> None:
    damage(folder)
    assert_refused(made(), folder, DAMAGE[damage])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=99), "has format 99; this version reads 1 to"),
        (lambda m: m.pop("format"), r"manifest.json is damaged: no valid 'format'"),
        (lambda m: m.pop("parameters"), "manifest.json is damaged"),
        (lambda m: m["parameters"]["layer.0.weight"].update(step="three"), "manifest.json is damaged"),
        (lambda m: m["parameters"]["layer.0.weight"].pop("cuts"), "manifest.json is damaged"),
        (lambda m: m.update(files={"../harm": [1, 1]}), "'../harm' is not the name of a file"),
        (lambda m: m["groups"][0].update(lr=-1.0), "lr must be"),
        (lambda m: m["groups"][0].update(block_size=3), "no parameter-group option 'block_size'"),
        (lambda m: m.update(groups=[]), "has 0 parameter groups, the optimizer has 1"),
    ],
)
def test_a_damaged_manifest_is_refused(change: Callable[[Any], None], message: str, folder: Path) -> None:
    edited(folder, change)
    assert_refused(made(), folder, message)


def test_a_manifest_that_is_cut_short_is_refused(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:200])
    assert_refused(made(), folder, "manifest.json is damaged")


def test_other_tools_read_the_tensors(folder: Path) -> None:
    metadata = FileSystemReader(folder).read_metadata()
    assert {"layer.0.weight/weight", "layer.0.weight/3x3/L0", "layer.1.weight/momentum"} <= set(
        metadata.state_dict_metadata
    )
    for stored in metadata.storage_data.values():
        data = data_of(folder).read_bytes()[stored.offset : stored.offset + stored.length]
        folder.with_name("tensor").write_bytes(data)
        assert isinstance(torch.load(folder.with_name("tensor"), weights_only=True), Tensor)


# ---- formats that were released ----


@pytest.mark.parametrize("version", [1])
def test_folders_of_every_format_load(version: int) -> None:
    resumed = Shampoo([("W", nn.Parameter(draw((3, 2), 5))), ("b", nn.Parameter(draw((2,), 6)))], 0.5, hyperparams=HP)
    loaded = resumed.load_checkpoint(Path(__file__).parent / "data" / f"checkpoint-format-{version}")
    assert (loaded.step, resumed.param_groups[0]["lr"]) == (3, 0.01)
    fresh = [("W", nn.Parameter(draw((3, 2), 0))), ("b", nn.Parameter(draw((2,), 1)))]
    uninterrupted = train(Shampoo(fresh, 0.01, hyperparams=HP), range(6))
    for a, b in zip(snapshot(train(resumed, range(3, 6)))["weights"], snapshot(uninterrupted)["weights"], strict=True):
        assert torch.allclose(a, b, rtol=1e-9)  # another LAPACK rounds otherwise


def test_settings_that_a_folder_does_not_know_had_their_neutral_value(tmp_path: Path) -> None:
    """Folders that were saved before anything but lengths could be borrowed."""
    hp = ShampooHyperParams(graft_type=LayerwiseGrafting.ADAM, variant=Variant(beta1=0.9, vectors="diagonal"))
    train(made(hp), range(3)).save_checkpoint(tmp_path / "saved")
    path = tmp_path / "saved" / MANIFEST
    manifest = json.loads(path.read_text())
    for name in ("variant.borrow", "variant.look_ahead"):
        del manifest["hyperparams"][name]
    path.write_text(json.dumps(manifest))
    assert made(hp).load_checkpoint(tmp_path / "saved").changed == {}
    with pytest.raises(CheckpointError, match=r"variant\.borrow was 'length' and is 'decrease'"):
        made(replace(hp, variant=replace(hp.variant, borrow="decrease"))).load_checkpoint(tmp_path / "saved")
