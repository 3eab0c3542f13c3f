"""The order of the wings that docs/design.md describes, read off the imports."""

import ast
from pathlib import Path

import pytest

import shampoo3d

SOURCE = Path(shampoo3d.__file__).parent
TESTS = Path(__file__).parent
ORDER = (
    *("settings", "numerics", "planning", "distributed", "engines", "runtime", "checkpoint", "optimizer", "__init__"),
    *("integrations", "cli"),
)
"""Each wing imports itself and those before it only."""
WITHOUT_TORCH = ("settings", "planning", "numerics.tiles", "numerics.state_names", "numerics.schedule")
WITHOUT_RANKS = ("settings", "numerics")
VAGUE = {
    *("what", "whether", "which", "of", "how", "where", "who", "that", "those", "as", "if", "in", "by", "why", "when"),
}
"""First words of docstrings that leave their reader to find the verb or the noun."""
LINEAR_ALGEBRA = {"linalg", "bmm", "baddbmm", "matmul", "cholesky", "qr", "eigh", "svd"}
COLLECTIVES = {
    *("all_reduce", "all_gather_into_tensor", "all_gather_single", "broadcast", "all_to_all_single"),
    "reduce_scatter_tensor",
}
COMMUNICATING = ("distributed.collectives", "runtime.agreement")
FILES = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
LIBRARY = {room: path for room, path in FILES.items() if not room.startswith("cli")}
"""The optimizer itself; ``cli`` holds programs that use it and DeepSpeed as any user would."""


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def attributes(path: Path) -> set[str]:
    return {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}


def names(path: Path) -> set[str]:
    return {node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name)} | attributes(path)


def dotted(node: ast.AST) -> list[str]:
    """``a.b.c`` as its names; empty for anything else."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (rest := dotted(node.value)):
        return [*rest, node.attr]
    return []


def wing(room: str) -> str:
    return room.split(".")[0]


def within(room: str, places: tuple[str, ...]) -> bool:
    return any(room == place or room.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("room", FILES)
def test_wings_import_only_those_before_them(room: str) -> None:
    for name in imports(FILES[room]):
        package, *rest = name.split(".")
        if package == "shampoo3d":
            imported = wing(rest[0]) if rest and wing(rest[0]) in ORDER else "__init__"
            assert ORDER.index(imported) <= ORDER.index(wing(room)), name


def test_planning_and_settings_are_pure() -> None:
    for room, path in FILES.items():
        if within(room, WITHOUT_TORCH):
            assert not any(name.split(".")[0] == "torch" for name in imports(path)), room


def test_mathematics_knows_no_ranks() -> None:
    for room, path in FILES.items():
        if within(room, WITHOUT_RANKS):
            assert not any(name.startswith("torch.distributed") for name in imports(path)), room


def test_linear_algebra_is_done_in_numerics_only() -> None:
    for room, path in LIBRARY.items():
        assert wing(room) == "numerics" or not attributes(path) & LINEAR_ALGEBRA, room


def test_two_files_alone_communicate_during_a_step() -> None:
    for room, path in LIBRARY.items():
        called = {name[-1] for node in ast.walk(tree(path)) if (name := dotted(node)) and name[0] in ("dist", "torch")}
        assert room in COMMUNICATING or not called & COLLECTIVES, room


def test_deepspeed_is_never_imported_by_the_library() -> None:
    for room, path in LIBRARY.items():
        assert not any(name.split(".")[0] in ("deepspeed", "megatron") for name in imports(path)), room


def test_frameworks_are_named_in_engines_only() -> None:
    """Integrations name those of other people's trainers."""
    for room, path in LIBRARY.items():
        words = {word.lower() for name in names(path) | imports(path) for word in name.split(".")}
        assert wing(room) in ("engines", "integrations") or not words & {"deepspeed", "dtensor"}, room
        assert wing(room) == "engines" or "shampoo3d.engines.zero" not in imports(path), room


def test_nothing_reaches_deep_into_others() -> None:
    """At most two dots are taken of an object whose inside is another's."""
    for room, path in LIBRARY.items():
        for node in ast.walk(tree(path)):
            chain = dotted(node)
            own = len(chain) > 1 and chain[0] in ("self", "cls", "torch", "dist")
            assert len(chain) <= 3 + own, (room, ".".join(chain))


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    for path in [*SOURCE.rglob("*.py"), *TESTS.rglob("*.py"), *(TESTS.parent / "benchmarks").rglob("*.py")]:
        strings = [node.value for node in ast.walk(tree(path)) if isinstance(node, ast.Expr)]
        texts = [node.value for node in strings if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        first = [text.split(maxsplit=1)[0].strip(",.:'`").lower() for text in texts]
        assert not VAGUE & {*first}, (path, VAGUE & {*first})


def test_no_file_is_longer_than_400_lines() -> None:
    for path in [*SOURCE.rglob("*.py"), *TESTS.rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path


def test_every_public_name_exists_and_is_listed_once() -> None:
    assert len(set(shampoo3d.__all__)) == len(shampoo3d.__all__)
    assert all(hasattr(shampoo3d, name) for name in shampoo3d.__all__)
