"""A package that is whole as it is installed."""

import re
from importlib.metadata import files, metadata
from importlib.resources import files as resources
from pathlib import Path

ROOT = Path(__file__).parent.parent
RELATIVE_LINK = re.compile(r"\]\((?!https?:|#)([^)\s#]+)[^)]*\)")


def test_the_package_index_gets_no_relative_links() -> None:
    text = metadata("3d-shampoo")["Description"]
    assert RELATIVE_LINK.findall(text) == []
    named = re.findall(r"\(`([\w/-]+\.(?:md|py))`\)", text)
    assert "docs/variants.md" in named
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_the_installed_package_is_typed_and_licensed() -> None:
    assert (resources("shampoo3d") / "py.typed").is_file()
    assert (resources("shampoo3d") / "cli/plan/web/page.html").is_file()
    assert metadata("3d-shampoo")["License-Expression"] == "Apache-2.0"
    assert "LICENSE" in {path.name for path in files("3d-shampoo") or []}
