"""The code on the README's and the documents' pages runs as it stands there, page by page, from top to bottom.

A comment before a block, ``<!-- needs several ranks: run by tests/... -->``, says why it is not run here, and by what.
"""

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import shampoo3d

ROOT = Path(__file__).parent.parent
PAGES = {page.name: page.read_text() for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
LIBRARIES = ("transformers", "lightning", "accelerate")
"""A block that imports one of these is run by a slow test, after those before it that import none."""
BLOCK = re.compile(
    r"^(?:<!-- [^\n]+: run by (?P<test>\S+) -->\n)?```(?P<kind>python|diff)\n(?P<code>.*?)^```",
    re.DOTALL | re.MULTILINE,
)


class Code(NamedTuple):
    text: str
    library: str | None
    test: str | None
    """Path and perhaps name of the test that runs it, if it is not run here."""


def blocks(page: str) -> list[Code]:
    """List a page's code; of a comparison that which is to be written."""
    found = []
    for block in BLOCK.finditer(PAGES[page]):
        text = block["code"]
        if block["kind"] == "diff":
            text = "".join(re.findall(r"^[+ ](.*\n)", text, re.MULTILINE))
        library = re.search(rf"^(?:from|import) ({'|'.join(LIBRARIES)})\b", text, re.MULTILINE)
        found.append(Code(text, library and library[1], block["test"]))
    return found


def run_by(page: str, library: str | None = None) -> list[str]:
    """List the code of a page that runs with no library, or what runs up to the last block that imports this one."""
    found = [code for code in blocks(page) if not code.test and code.library in (None, library)]
    while library and found and found[-1].library != library:
        found.pop()
    return [code.text for code in found]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inside, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.norm(self.embedding(tokens))
        return self.head(hidden + self.inside(hidden).relu())


TOKENS = torch.arange(11)
TARGETS = (3 * TOKENS + 1) % 11


def script() -> dict[str, Any]:
    """Make what a reader's script has before the lines on a page: a model, its gradients, an optimizer, a logger."""
    torch.manual_seed(0)
    model = Model()
    nn.functional.cross_entropy(model(TOKENS), TARGETS).backward()
    known = {name: getattr(shampoo3d, name) for name in ("Shampoo", "ShampooHyperParams", "Variant")}
    return known | {
        "torch": torch,
        "shampoo3d": shampoo3d,
        "model": model,
        "optimizer": shampoo3d.Shampoo(model.parameters(), lr=1e-3),
        "micro_batches": lambda step: [(TOKENS, TARGETS)] * 4,
        "loss_of": nn.functional.cross_entropy,
        "writer": mock.Mock(spec=["add_scalar"]),
        "step": 1,
    }


@pytest.mark.parametrize("page", [page for page in PAGES if run_by(page) and page != "from-adamw.md"])
def test_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = script()
    for code in run_by(page):
        exec(compile(code, page, "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "library"), [(page, name) for page in PAGES for name in LIBRARIES if run_by(page, name)]
)
def test_code_runs_with(page: str, library: str, tmp_path: Path) -> None:
    pytest.importorskip(library)
    (tmp_path / "page.py").write_text("\n".join(run_by(page, library)))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "page.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("test", sorted({code.test for page in PAGES for code in blocks(page) if code.test}))
def test_what_is_not_run_here_is_run_elsewhere(test: str) -> None:
    path, _, name = test.partition("::")
    assert f"def {name}" in (ROOT / path).read_text()


def test_from_adamw_learns(capsys: pytest.CaptureFixture[str]) -> None:
    names = script()
    before = nn.functional.cross_entropy(names["model"](TOKENS), TARGETS)
    for code in run_by("from-adamw.md"):
        exec(code, names)
    assert nn.functional.cross_entropy(names["model"](TOKENS), TARGETS) < 0.9 * before
    report = capsys.readouterr().out
    assert re.search(r"head.weight +11x8 +excluded .*embedding, as given", report)
    assert re.search(r"inside.weight +8x8 +preconditioned", report)


def test_configurations_make_optimizers() -> None:
    from shampoo3d.integrations.deepspeed import from_config

    yaml = pytest.importorskip("yaml")
    page = PAGES["trainers.md"]
    (config,) = (
        json.loads(f"{{{text}}}") for text in re.findall(r"^```json\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    )
    (lightning,) = (yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    optimizer, _ = from_config(config, Model())
    assert (optimizer.hyperparams.block_size, optimizer.distribution.root_copies) == (256, 2)
    optimizer = shampoo3d.Shampoo(Model().parameters(), **lightning["optimizer"]["init_args"])
    assert optimizer.hyperparams.block_size == 128


def test_settings_to_choose_from_are_accepted() -> None:
    for setting in re.findall(r'`("\w+": [^`]*)`', PAGES["settings.md"]):
        given, params = ast.literal_eval(f"{{{setting}}}"), list(Model().parameters())
        group: dict[str, Any] = {"params": params} | (given if "precondition" in given else {})
        shampoo3d.Shampoo([group], lr=1e-3, hyperparams="recommended" if "precondition" in given else given)


def commands() -> list[list[str]]:
    """List what the pages tell to type, line by line or within a sentence."""
    lines = []
    for text in PAGES.values():
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            lines += block.replace("\\\n", " ").splitlines()
        lines += re.findall(r"`((?:shampoo3d|make|python \w+/) ?[a-z][^`|…]*)`", text)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.skipif(importlib.util.find_spec("typer") is None, reason="needs the extra cli")
def test_commands_exist() -> None:
    from typer.main import get_command

    from shampoo3d.cli.commands import app

    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    found = commands()
    assert {words[0] for words in found} == {"make", "shampoo3d", "python", "pip", "chromium"}
    for program, *words in found:
        if program == "make":
            assert {*words} <= {*targets}
        elif program == "python":
            assert (ROOT / words[0]).is_file()
        elif program == "shampoo3d":
            command: Any = get_command(app)
            while hasattr(command, "commands"):
                command = command.commands[words.pop(0)]
            options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
            assert {word for word in words if word.startswith("--")} <= options, words
