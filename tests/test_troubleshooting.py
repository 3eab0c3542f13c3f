"""Every message that the source has stands in docs/troubleshooting.md, and every message there is one of the source."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import shampoo3d

SOURCE = Path(shampoo3d.__file__).parent
PAGE = Path(__file__).parent.parent / "docs" / "troubleshooting.md"
HOLE = "…"
"""The place of a value, in the document as in what is read from the source."""
SENTENCE = 4
"""Words from which on a text that is not raised where it stands counts as a message: returned, or put together."""
DISPLAYS = ("cli/", "runtime/report.py")
"""Programs and tables, whose other texts are no messages."""


def text_of(node: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)


def literals(node: ast.AST, *, raised: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield all texts in ``node``, each with whether it is raised, but for docstrings and names of what is checked."""
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        yield text_of(node), raised
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.Call) and getattr(node.func, "id", "").startswith("check_"):
        return
    for child in ast.iter_child_nodes(node):
        yield from literals(child, raised=raised or isinstance(node, ast.Raise))


def words(text: str) -> int:
    return len(re.findall(r"[A-Za-z]{2,}", text))


@cache
def messages() -> dict[str, str]:
    """Return the file of each message in the source."""
    found: dict[str, str] = {}
    for path in SOURCE.rglob("*.py"):
        file = path.relative_to(SOURCE).as_posix()
        for text, raised in literals(ast.parse(path.read_text())):
            sentence = " " in text.strip() and words(text) >= SENTENCE and not file.startswith(DISPLAYS)
            if sentence or (raised and words(text) >= 2):
                found[text] = file
    return found


def entries() -> list[str]:
    """List the messages in the first column of the document's tables."""
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return [span for row in rows for span in re.findall(r"`([^`]+)`", row)]


def matches(entry: str, message: str) -> bool:
    return re.search(".*".join(map(re.escape, entry.split(HOLE))), message) is not None


def test_every_message_is_in_the_document() -> None:
    listed = entries()
    unlisted = [(file, text) for text, file in messages().items() if not any(matches(entry, text) for entry in listed)]
    assert not unlisted


def test_every_message_in_the_document_is_in_the_source() -> None:
    known = messages()
    assert [entry for entry in entries() if not any(matches(entry, text) for text in known)] == []


def test_no_entry_stands_twice_or_says_nothing() -> None:
    listed = entries()
    assert len(set(listed)) == len(listed)
    assert all(words(entry) >= 2 for entry in listed)
