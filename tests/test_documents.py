"""The documents' links lead somewhere, and the code in "From AdamW" runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

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


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inside, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.norm(self.embedding(tokens))
        return self.head(hidden + self.inside(hidden).relu())


def test_the_code_from_adamw_runs(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model, tokens = Model(), torch.arange(11)
    space = {
        "model": model,
        "micro_batches": lambda step: [(tokens, (3 * tokens + 1) % 11)] * 4,
        "loss_of": nn.functional.cross_entropy,
        "torch": torch,
        "shampoo3d": shampoo3d,
    }
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "from-adamw.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    before = nn.functional.cross_entropy(model(tokens), (3 * tokens + 1) % 11)
    for block in blocks:
        exec(block, space)
    assert nn.functional.cross_entropy(model(tokens), (3 * tokens + 1) % 11) < 0.9 * before
    report = capsys.readouterr().out
    assert re.search(r"head.weight +11x8 +excluded .*embedding, as given", report)
    assert re.search(r"inside.weight +8x8 +preconditioned", report)
