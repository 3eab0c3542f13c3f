"""Cases of one file share processes; the number of those that were started is told at the end."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from . import harness

WITHOUT_PROCESSES = {"test_topology.py"}


@pytest.hookimpl(tryfirst=True)  # before those without the marker are deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name not in WITHOUT_PROCESSES:
            item.add_marker("distributed")


@pytest.fixture(autouse=True, scope="module")
def shared_processes() -> Iterator[None]:
    with harness.shared():
        yield


@pytest.fixture
def steps(request: pytest.FixtureRequest) -> int:
    """For parity: nothing that is new happens after step 6, with a start at 4 and refreshes every third step."""
    return 10 if request.node.get_closest_marker("slow") else 6


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    starts, cases = harness.counts["starts"], harness.counts["cases"]
    terminalreporter.write_line(f"{cases} cases on several processes, which were started {starts} times")
