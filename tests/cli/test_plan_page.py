"""The page of `shampoo3d plan --html`, in a browser: it filters, zooms and says what the plan says."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from shampoo3d.cli import commands as cli
from shampoo3d.cli.plan.builtin import Parameter
from shampoo3d.cli.plan.forecast import Forecast
from shampoo3d.cli.plan.models import parameters_of
from shampoo3d.cli.plan.page import ownership, pack
from shampoo3d.cli.plan.request import Request
from shampoo3d.cli.plan.tables import amount

ALONE = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1280,1000"),
)
MODEL = [
    Parameter("embedding.weight", (5000, 64), "embedding"),
    *(Parameter(f"layers.{i}.experts.up_proj", (3, 300, 300)) for i in range(6)),
    *(Parameter(f"layers.{i}.down_proj.weight", (300, 900)) for i in range(6)),
    *(Parameter(f"layers.{i}.norm.weight", (64,)) for i in range(6)),
]
READ = """
const found = {};
for (const of of parametersOf(arguments[0])) {
  const blocks = found[of.name] = [];
  for (let number = 0; number < of.planes; number++) {
    const plane = of.plane(number);
    for (let row = 0; row < plane.rows; row++)
      for (let column = 0; column < plane.columns; column++)
        if (plane.has(row, column)) {
          const index = plane.index(row, column);
          blocks.push([of.keepers(index), of.box(index).map((side) => side.join(":")).join(",")]);
        }
  }
}
return found;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if not all(found.values()):
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found["chromium"]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*ALONE, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    with webdriver.Chrome(options, webdriver.ChromeService(found["chromedriver"])) as driver:
        yield driver


@dataclass
class Page:
    """The page of a plan in the browser, and the plan's numbers."""

    browser: Any
    numbers: dict[str, Any]

    @property
    def keys(self) -> Any:
        from selenium.webdriver import Keys

        return Keys

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.browser.find_elements("css selector", selector)
        return found

    def one(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def tile(self, name: str) -> Any:
        return next(tile for tile in self.all(".tile") if tile.find_element("tag name", "b").text == name)

    def facts(self, name: str) -> dict[str, str]:
        return dict(fact.text.split("\n") for fact in self.all(f"#{name} > div"))


@pytest.fixture(scope="module")
def planned() -> Forecast:
    return Forecast.of(Request("gpt2", data=64, zero=1), parameters_of("gpt2"))


@pytest.fixture(scope="module")
def page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder: Path = tmp_path_factory.mktemp("plan")
    with pytest.raises(SystemExit) as ended:
        cli.main(f"plan gpt2 --data 64 --zero 1 --html {folder}/plan.html --json {folder}/plan.json".split())
    assert not ended.value.code
    browser.get(f"file://{folder}/plan.html")
    return Page(browser, json.loads((folder / "plan.json").read_text()))


def test_the_page_filters_and_sorts(page: Page) -> None:
    page.one("#filter").send_keys("c_proj kl-shampoo")
    assert page.one("#found").text.startswith("24 of 148 parameters")
    for order, first in (("ascending", "768x768"), ("descending", "3072x768")):
        page.one("#parameters th:nth-child(2) button").click()
        assert page.one("#parameters th:nth-child(2)").get_attribute("aria-sort") == order
        assert page.one("#parameters td:nth-child(2)").text == first


def test_the_page_zooms_to_a_block_and_says_of_its_owner_what_the_plan_says(page: Page, planned: Forecast) -> None:
    page.tile("transformer.h.7").click()
    page.tile("mlp.c_proj.weight").click()
    page.one("#plane").send_keys(*(getattr(page.keys, name) for name in ("ENTER", "ARROW_DOWN", "ARROW_RIGHT")))
    assert page.one("#crumbs").text.split("\n")[-1].endswith("block 1, 1")
    [plan] = planned.plans
    number = [matrix.name for matrix in plan.matrices].index("transformer.h.7.mlp.c_proj.weight")
    owner = plan.owners(number)[plan.matrices[number].number_of((1, 1))]
    assert page.facts("block") | {"owner": f"rank {owner}", "elements": "384:768, 384:768"} == page.facts("block")
    page.one("#block a").click()
    assert page.facts("rank-numbers")["blocks"] == str(int(planned.by_rank["blocks"][owner]))
    page.one("#plane").send_keys(page.keys.ESCAPE)
    page.one("#plane").send_keys(page.keys.ESCAPE)
    assert len(page.all("#tiles .tile")) == 12


def test_the_page_has_the_numbers_of_the_rank_with_most(page: Page) -> None:
    most = page.numbers["per rank"]["state"]
    field = page.one("#rank")
    field.clear()
    field.send_keys(str(most["rank"]), page.keys.ENTER)
    assert page.facts("rank-numbers")["state"] == amount(most["most"])
    assert page.facts("summary")["parameters"] == f"{page.numbers['parameters']:,}"


def test_the_page_needs_nothing_else(page: Page) -> None:
    assert page.browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert page.browser.get_log("browser") == []


LAYOUTS: list[dict[str, Any]] = [
    {"data": 4, "root_copies": 2},
    {"data": 2, "pipe": 2, "tensor": 2, "zero": 1},
    {"data": 1024, "fsdp": True, "replicas": 2},
    {"data": 4096, "preset": "classic"},
    {"data": 6, "expert": 3, "zero": 1},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_owners_on_the_page_are_those_of_the_plan(browser: Any, layout: dict[str, Any]) -> None:
    """Runs of all kinds: listed, laid along the elements in turns, copied, and blocks that are no grid."""
    planned = Forecast.of(Request("", **layout), MODEL)
    script = (files(cli.__package__) / "plan/web/owners.js").read_text()
    found = browser.execute_script(script + READ, json.loads(json.dumps(ownership(planned))))
    expected = {}
    for plan in planned.plans:
        for number, matrix in enumerate(plan.matrices):
            blocks = list(enumerate(planned.teams[plan.ranks][number].blocks))
            numbered = "experts" in matrix.name and "expert" in layout
            name = f"{matrix.name}@{plan.ranks[0]}" if numbered else matrix.name
            expected[name] = [[list(plan.keepers(number, i)), block.key] for i, block in blocks]
    assert found == expected


def test_packed_numbers() -> None:
    assert pack([]) == []
    assert pack([5, 5, 5, 5]) == [5, 1, 0, 3]
    assert pack([0, 1, 2, 3, 7, 11]) == [0, 1, 1, 3, 4, 2]
