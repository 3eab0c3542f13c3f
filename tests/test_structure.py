"""The separation of rooms that docs/design.md describes, read off the imports."""

import ast
from pathlib import Path

import pytest

import shampoo3d

SOURCE = Path(shampoo3d.__file__).parent
MATHEMATICS = [
    *("background", "blocks", "eigenbasis", "grafting", "hyperparams", "momenta", "precision", "preconditioner"),
    *("soap", "symmetric", "variant"),
    *(f"roots/{path.stem}" for path in SOURCE.glob("roots/*.py")),
]
PURE = (
    "blocks",
    "checks",
    "computation",
    "variant",
    "hyperparams",
    "layout",
    "factors",
    "plan",
    "routes",
    "schedule",
    "turns",
    "distribution",
    "cost",
    "memory",
    "transients",
    "roots/choice",
    "roots/measured",
)
COMMUNICATING = ("collectives", "agreement")
COMMUNICATING_CALLS = {
    "all_reduce",
    "all_gather_into_tensor",
    "broadcast",
    "all_to_all_single",
    "reduce_scatter_tensor",
}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def library() -> list[Path]:
    """The optimizer itself; cli.py and train/ are programs that use it and DeepSpeed as any user would."""
    return [path for path in SOURCE.rglob("*.py") if "train" not in path.parts and path.name != "cli.py"]


@pytest.mark.parametrize("room", MATHEMATICS)
def test_mathematics_knows_no_ranks(room: str) -> None:
    ranks = {"torch.distributed", "shampoo3d.exchange", "shampoo3d.topology", "shampoo3d.assemble", "shampoo3d.plan"}
    assert not imports(SOURCE / f"{room}.py") & ranks


@pytest.mark.parametrize("room", PURE)
def test_planning_is_pure(room: str) -> None:
    assert not any(name.split(".")[0] == "torch" for name in imports(SOURCE / f"{room}.py"))


@pytest.mark.parametrize(
    "room",
    [
        "topology",
        "layout",
        "plan",
        "turns",
        "routes",
        "schedule",
        "collectives",
        "exchange",
        "agreement",
        "readers",
        "assemble",
    ],
)
def test_ranks_do_no_linear_algebra(room: str) -> None:
    assert "linalg" not in (SOURCE / f"{room}.py").read_text()


def test_two_files_alone_communicate_during_a_step() -> None:
    for path in library():
        called = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert path.stem in COMMUNICATING or not called & COMMUNICATING_CALLS, path


def test_deepspeed_is_never_imported_by_the_library() -> None:
    for path in library():
        assert not any(name.split(".")[0] in ("deepspeed", "megatron") for name in imports(path)), path


def test_no_file_is_longer_than_400_lines() -> None:
    for path in [*SOURCE.rglob("*.py"), *Path(__file__).parent.rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path


def test_every_public_name_exists_and_is_listed_once() -> None:
    assert len(set(shampoo3d.__all__)) == len(shampoo3d.__all__)
    assert all(hasattr(shampoo3d, name) for name in shampoo3d.__all__)
