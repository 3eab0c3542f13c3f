"""`shampoo3d checkpoint inspect` and `convert`, as a user calls them."""

from pathlib import Path

import pytest
import torch
from test_checkpoint_folder import HP, made, train

from command_line import called
from common import snapshot


def test_inspect_tells_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(made(), range(3)).save_checkpoint(tmp_path / "saved")
    code, out, _ = called(f"checkpoint inspect {tmp_path / 'saved'}", capsys)
    assert code == 0
    for told in (
        "format 1",
        "step 3, 4 parameters",
        f"block_size={HP.block_size}",
        "lr=0.01",
        "layer.2.weight",
        "4x3x2",
    ):
        assert told in out


def test_inspect_names_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(made(), range(2)).save_checkpoint(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.distcp")).unlink()
    code, _, err = called(f"checkpoint inspect {tmp_path / 'saved'}", capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert "the file __0_0.distcp is missing" in err
    code, _, err = called(f"checkpoint inspect {tmp_path / 'other'}", capsys)
    assert (code, "there is no checkpoint" in err) == (2, True)


def test_convert_makes_a_folder_of_a_state_dict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = train(made(), range(3))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    code, out, _ = called(f"checkpoint convert {tmp_path / 'state.pt'} {tmp_path / 'folder'}", capsys)
    assert (code, "step 3, 4 parameters" in out) == (0, True)
    resumed = made()
    with torch.no_grad():
        for ours, theirs in zip(*(o.param_groups[0]["params"] for o in (resumed, optimizer)), strict=True):
            ours.copy_(theirs)
    resumed.load_checkpoint(tmp_path / "folder", weights=False)
    a, b = (snapshot(train(o, range(3, 6)))["weights"] for o in (resumed, optimizer))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    code, _, err = called(f"checkpoint convert {tmp_path / 'state.pt'} {tmp_path / 'folder'}", capsys)
    assert (code, "exists already" in err) == (2, True)


def test_convert_refuses_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"optimizer": made}, tmp_path / "state.pt")
    code, _, err = called(f"checkpoint convert {tmp_path / 'state.pt'} {tmp_path / 'folder'}", capsys)
    assert (code, "something else than tensors" in err) == (2, True)
