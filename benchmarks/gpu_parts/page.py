"""The page of the documentation on the results of ``benchmarks/gpu.py``, made from their JSON."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from gpu_parts.running import Part, cell
from step_report import markdown

VERSIONS = {"PyTorch": "torch", "Python": "python", "commit": "commit"}


def page(result: Mapping[str, Any], parts: Mapping[str, Part]) -> str:
    """Return the whole page in Markdown."""
    return "\n\n".join(_sections(result, parts)) + "\n"


def _sections(result: Mapping[str, Any], parts: Mapping[str, Part]) -> Iterator[str]:
    what = {"device": "a GPU that no part could use", "cuda": None, "size": "full"} | result["setting"]
    circumstances = [what["device"], what["cuda"] and f"CUDA {what['cuda']}", what.get("machine")]
    circumstances += [f"{name} {what[key]}" for name, key in VERSIONS.items() if key in what]
    yield "# On one GPU"
    yield f"Made by `python benchmarks/gpu.py --page docs/gpu.md`: {', '.join(filter(None, circumstances))}."
    if what["size"] != "full":
        yield "**Toy sizes: this page shows that everything runs. Its seconds mean nothing.**"
    yield markdown(
        [{"name": name, **outcome} for name, outcome in result["parts"].items()],
        {
            "part": lambda row: row["name"],
            "status": lambda row: row["status"],
            "seconds": lambda row: f"{row['seconds']:.0f}",
            "error": lambda row: _safe(row["error"]),
        },
    )
    told = ""
    for name, outcome in result["parts"].items():
        text = parts[name].about.__doc__ or "" if name in parts else ""
        yield f"## {name[:1].upper()}{name[1:]}"
        if text != told:
            yield text.strip().replace("``", "`")
        told = text
        if outcome["status"] not in ("finished",):
            yield f"**{outcome['status']}**{': ' + _safe(outcome['error']) if outcome['error'] else ''}"
        for table, rows in outcome["tables"].items():
            yield f"**{table}**"
            yield _table(rows)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, (dict, list)))
    columns: dict[str, Callable[[dict[str, Any]], str]] = {key: partial(_cell, key=key) for key in keys}
    return markdown([dict(row) for row in rows], columns)


def _cell(row: Mapping[str, Any], key: str) -> str:
    return _safe(cell(row.get(key)))


def _safe(text: str) -> str:
    """Keep a table whole."""
    return text.replace("|", "\\|").replace("\n", " ")
