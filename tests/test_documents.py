"""The documents' links lead somewhere, and the page of the API has every name of the package."""

import re
from pathlib import Path

import pytest

import shampoo3d

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(page for folder in ("docs", "src", "tests") for page in (ROOT / folder).rglob("*.md"))]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_api_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    assert {*re.findall(r"^::: shampoo3d\.(\w+)$", page, re.MULTILINE)} == {*shampoo3d.__all__}
