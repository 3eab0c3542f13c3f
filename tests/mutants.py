"""Small mistakes, put into the package one at a time: does a test notice each of them?

    python tests/mutants.py                  # every mutant that has no result yet, against the fast suite
    python tests/mutants.py --slow           # those that survive it against the slow suite, too
    python tests/mutants.py --likely ID ...  # these once more, against the tests that most likely notice them
    python tests/mutants.py --check          # only: does every mutant still apply?

The mutants are in `mutants.toml`: a file of the package, a snippet that occurs in it exactly once, what stands in its
place, and the tests that most likely notice, which run first. All happens in a copy of the checkout. At the end the
tests that failed must pass without any mutant. Results are kept as JSON, and as a table beside it, after each mutant,
so that a run that was interrupted goes on where it was.
"""

import argparse
import ast
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest
import tomllib

SLOW_IMPORTS = ("hypothesis.strategies", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp")
HERE = Path(__file__).parent
PACKAGE = Path("src", "shampoo3d")
NOT_COPIED = (".git", ".venv", ".*_cache", ".hypothesis", "runs", "build", "dist", "__pycache__", "*.egg-info")
OPTIONS = ("-v", "--tb=no", "-rfE", "-p", "no:cacheprovider", "--hypothesis-seed=0")
PARALLEL = ("-n", "2") if find_spec("xdist") else ()
NOT_RUN = (4, 5)
"""Exit codes of pytest: a mistake in its arguments, or no tests at all."""


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        file: within the package.
        before: a snippet that is there exactly once; ``after``: what takes its place.
        tests: files, or `file::function`, within `tests`, that most likely notice it.
        slow: the same of the slow suite, where no fast test may notice it.
    """

    id: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    slow: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """Tests that run in one go; a run that takes longer counts as noticed."""

    name: str
    suite: str
    arguments: tuple[str, ...]
    minutes: float


@dataclass
class Outcome:
    """Outcome of a mutant.

    Attributes:
        killed_by: "fast" or "slow", the suite that noticed it; empty while it survives.
        test: the first that failed, with the reason, or that ran when time was up.
        survived: the names of the stages that did not notice it.
        confirmed: the test passes without the mutant.
    """

    killed_by: str = ""
    test: str = ""
    reason: str = ""
    timed_out: bool = False
    seconds: float = 0.0
    survived: list[str] = field(default_factory=list)
    confirmed: bool = False


def read(path: Path) -> list[Mutant]:
    entries = tomllib.loads(path.read_text())["mutant"]
    return [Mutant(**of | {name: tuple(of.get(name, ())) for name in ("tests", "slow")}) for of in entries]


def problems(mutants: Sequence[Mutant], root: Path) -> Iterator[str]:
    """Return the reasons why mutants do not apply to a checkout, in words."""
    yield from (f"{id_}: {count} mutants" for id_, count in Counter(of.id for of in mutants).items() if count > 1)
    for mutant in mutants:
        path = root / PACKAGE / mutant.file
        text = path.read_text() if path.is_file() else ""
        if (count := text.count(mutant.before)) != 1:
            yield f"{mutant.id}: {mutant.before!r} is {count} times in {mutant.file}, not once"
            continue
        try:
            if ast.dump(ast.parse(text.replace(mutant.before, mutant.after))) == ast.dump(ast.parse(text)):
                yield f"{mutant.id}: changes nothing"
        except SyntaxError as error:
            yield f"{mutant.id}: is no Python: {error}"
        for test in (*mutant.tests, *mutant.slow):
            file, _, function = test.partition("::")
            source = root / "tests" / file
            if not source.is_file() or f"def {function.partition('[')[0]}" not in source.read_text():
                yield f"{mutant.id}: there is no test {test}"


def stages(mutant: Mutant, depth: str) -> Iterator[Stage]:
    """Return the tests that run until the mutant is noticed; ``depth``: "likely", "fast" or "slow"."""
    likely, slow = ([f"tests/{test}" for test in tests] for tests in (mutant.tests, mutant.slow))
    if likely:
        yield Stage("likely", "fast", tuple(likely), 15.0)
    if depth != "likely":
        whole_files = [f"--ignore={test}" for test in likely if "::" not in test]
        yield Stage("unit", "fast", ("tests", "--ignore=tests/distributed", *whole_files, *PARALLEL), 120.0)
        yield Stage("distributed", "fast", ("tests/distributed", *whole_files), 120.0)
    if slow and depth != "fast":
        yield Stage("likely slow", "slow", (*slow, "-m", "slow"), 60.0)
    if depth == "slow":
        yield Stage("slow", "slow", ("tests", "-m", "slow"), 240.0)


@contextmanager
def copied(root: Path) -> Iterator[Path]:
    """A copy of the checkout, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(root, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
        yield copy


@contextmanager
def mutated(copy: Path, mutant: Mutant) -> Iterator[None]:
    path = copy / PACKAGE / mutant.file
    text = path.read_text()
    path.write_text(text.replace(mutant.before, mutant.after))
    try:
        yield
    finally:
        path.write_text(text)


def _pytest(arguments: Sequence[str], copy: Path, log: int) -> None:
    """Be as `python -m pytest` in the copy, with the copy's package and a session of its own."""
    os.setsid()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(copy)
    # Compiled files could be those of another mutant of the same length and second.
    os.environ.update(PYTHONPATH=str(copy / "src"), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1", COLUMNS="400")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.dont_write_bytecode, sys.argv = True, ["pytest"]
    sys.path[:1] = [str(copy), str(copy / "src")]
    sys.modules["__main__"] = importlib.import_module("pytest.__main__")  # which processes of the tests import
    sys.exit(pytest.main([*OPTIONS, *arguments]))


def run(arguments: Sequence[str], minutes: float, copy: Path) -> tuple[dict[str, str], bool]:
    """The tests that fail, with reasons; or the one that ran when time was up, and True.

    The process is forked from this one, which has imported what takes long.

    Raises:
        RuntimeError: with pytest's words, if it did not run.
    """
    shutil.rmtree(copy / ".hypothesis", ignore_errors=True)  # examples that other mutants failed
    with tempfile.TemporaryFile("w+") as log:
        process = multiprocessing.get_context("fork").Process(target=_pytest, args=(arguments, copy, log.fileno()))
        process.start()
        assert process.pid is not None
        try:
            process.join(minutes * 60)
            code = process.exitcode
        finally:
            with suppress(ProcessLookupError):  # and all that it started
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        log.seek(0)
        words = log.read()
    if code is None:
        return {(re.findall(r"tests/\S+::\S+", words) or ["before any test"])[-1]: f"{minutes:g} minutes"}, True
    if code in NOT_RUN:
        raise RuntimeError(f"pytest did not run {arguments}:\n{words[-2000:]}")
    failed = dict(re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - (.*))?$", words, re.MULTILINE))
    return failed or ({f"exit code {code}": ""} if code else {}), False


def tried(mutant: Mutant, depth: str, copy: Path, before: Outcome) -> Outcome:
    """The outcome after all stages that did not run before."""
    found, start = Outcome(survived=list(before.survived)), time.monotonic()
    for stage in stages(mutant, depth):
        if stage.name not in found.survived:
            failed, found.timed_out = run(("-x", *stage.arguments), stage.minutes, copy)
            if failed:
                found.killed_by, (found.test, found.reason) = stage.suite, next(iter(failed.items()))
                break
            found.survived.append(stage.name)
    found.seconds = round(before.seconds + time.monotonic() - start, 1)
    return found


def confirm(results: dict[str, Outcome], copy: Path) -> None:
    """Run what failed with a mutant without any."""
    killed = [of for of in results.values() if of.killed_by and not of.confirmed and not of.timed_out]
    tests = sorted({of.test for of in killed if of.test.startswith("tests/")})
    failed = run((*tests, "-m", ""), 240.0, copy)[0] if tests else {}
    for of in killed:
        of.confirmed = of.test in tests and of.test not in failed


def finished(mutant: Mutant, depth: str, outcome: Outcome) -> bool:
    return bool(outcome.killed_by) or {stage.name for stage in stages(mutant, depth)} <= {*outcome.survived}


def load(path: Path) -> dict[str, Outcome]:
    return {id_: Outcome(**data) for id_, data in json.loads(path.read_text()).items()} if path.is_file() else {}


def save(path: Path, mutants: Sequence[Mutant], results: dict[str, Outcome]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps({id_: asdict(outcome) for id_, outcome in results.items()}, indent=1) + "\n")
    new.replace(path)
    path.with_suffix(".md").write_text("\n".join(table(mutants, results)) + "\n")


def table(mutants: Sequence[Mutant], results: dict[str, Outcome]) -> Iterator[str]:
    yield "| mutant | file | killed by | first test that fails | seconds |"
    yield "|---|---|---|---|---|"
    rows = [(mutant, results[mutant.id]) for mutant in mutants if mutant.id in results]
    for mutant, of in rows:
        by = of.killed_by + " (time is up)" * of.timed_out if of.killed_by else f"survives {', '.join(of.survived)}"
        by += ", not confirmed" * (bool(of.killed_by) and not of.confirmed and not of.timed_out)
        yield f"| {mutant.id} | {mutant.file} | {by} | {of.test.removeprefix('tests/')} | {of.seconds:.0f} |"
    counts = Counter(of.killed_by for _, of in rows)
    yield f"\n{len(rows)} of {len(mutants)}: {counts['fast']} die fast, {counts['slow']} slow, {counts['']} survive."


def work_through(given: Sequence[Mutant], depth: str, copy: Path, results: dict[str, Outcome]) -> Iterator[Mutant]:
    """Test mutants as far as there are no results, and yield each after its result has changed."""
    for mutant in given:
        before = results.get(mutant.id, Outcome())
        if not finished(mutant, depth, before):
            with mutated(copy, mutant):
                results[mutant.id] = tried(mutant, depth, copy, before)
            yield mutant


def main() -> None:
    parser = argparse.ArgumentParser(description="Do the tests notice small mistakes in the package?")
    parser.add_argument("ids", nargs="*", help="mutants that are tested once more; all that have no result if none")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--likely", action="store_const", const="likely", dest="depth", help="their likely tests only")
    depth.add_argument("--slow", action="store_const", const="slow", dest="depth", help="the slow suite, too")
    parser.add_argument("--check", action="store_true", help="only whether every mutant applies")
    parser.add_argument("--root", type=Path, default=HERE.parent, help="the checkout")
    parser.add_argument("--list", type=Path, default=HERE / "mutants.toml", help="the mutants")
    parser.add_argument("--results", type=Path, default=Path("runs", "mutants.json"), help="a JSON file")
    given = parser.parse_args()
    mutants = read(given.list)
    if found := list(problems(mutants, given.root)):
        sys.exit("\n".join(found))
    if unknown := {*given.ids} - {mutant.id for mutant in mutants}:
        parser.error(f"there are no mutants {', '.join(sorted(unknown))}")
    if given.check:
        print(f"{len(mutants)} mutants apply")
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results = {id_: outcome for id_, outcome in load(given.results).items() if id_ not in given.ids}
    chosen = [mutant for mutant in mutants if not given.ids or mutant.id in given.ids]
    for module in SLOW_IMPORTS:
        importlib.import_module(module)
    with copied(given.root) as copy:
        for mutant in work_through(chosen, given.depth or "fast", copy, results):
            save(given.results, mutants, results)
            print(f"{mutant.id}: {results[mutant.id].killed_by or 'survives'} {results[mutant.id].test}", flush=True)
        confirm(results, copy)
        save(given.results, mutants, results)
    print(given.results.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
