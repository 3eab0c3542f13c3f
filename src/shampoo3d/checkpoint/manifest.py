"""Manifest of a folder: format, settings, parameters, files. Plain data and JSON."""

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.blocks import Cuts
from shampoo3d.planning.layout import Matrix
from shampoo3d.settings.groups import SETTINGS, plain
from shampoo3d.settings.hyperparams import ShampooHyperParams
from shampoo3d.settings.validation import check_path

FORMAT = 1
"""Format of the folders that are written; this and all earlier formats are read."""

MANIFEST = "manifest.json"
CHUNK = 1 << 24


class CheckpointError(ValueError):
    """A checkpoint is damaged or does not fit; raised on all ranks, and nothing was changed."""


@dataclass(frozen=True)
class Parameter:
    """A parameter in a checkpoint.

    Attributes:
        shape: of the logical matrix; ``merged``: of the merged matrix.
        dtype: of its state.
        axes, diagonal: the merged axes that have a factor, and those of them whose factor is diagonal.
        cuts: the boundaries of the blocks; empty without factors.
        step: how many steps it has taken.
    """

    shape: Shape
    merged: Shape
    dtype: str
    axes: tuple[int, ...]
    diagonal: tuple[int, ...]
    cuts: tuple[Cuts, ...]
    step: int

    @classmethod
    def of(cls, matrix: Matrix, step: int) -> "Parameter":
        cuts = matrix.cuts if matrix.factored else ()
        return cls(matrix.shape, matrix.merged, matrix.sharding.state_dtype, matrix.axes, matrix.diagonal, cuts, step)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Parameter":
        tuples = {name: tuple(data[name]) for name in ("shape", "merged", "axes", "diagonal")}
        cuts = tuple(tuple(int(edge) for edge in axis) for axis in data["cuts"])
        return cls(**tuples, cuts=cuts, dtype=str(data["dtype"]), step=int(data["step"]))


@dataclass(frozen=True)
class Manifest:
    """Manifest of a folder.

    Attributes:
        parameters: those that take part in steps, by name; ``idle``: the names of the others.
        hyperparams: all settings, flat, by name.
        groups: the settings of each parameter group.
        files: the other files in the folder, each with its size and its CRC-32.
    """

    parameters: Mapping[str, Parameter]
    idle: tuple[str, ...]
    hyperparams: Mapping[str, Any]
    groups: tuple[Mapping[str, Any], ...]
    skipped_steps: int
    files: Mapping[str, tuple[int, int]]
    format: int = FORMAT
    package: str = ""

    @property
    def step(self) -> int:
        """Steps of the parameter that has taken most."""
        return max((parameter.step for parameter in self.parameters.values()), default=0)

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(asdict(replace(self, package=_version())), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a folder.

        Raises:
            CheckpointError: naming the folder and what is wrong with it.
        """
        try:
            data = json.loads((folder / MANIFEST).read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(_absent(folder)) from None
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{folder / MANIFEST} is damaged: {error}") from None
        try:
            if not 1 <= data["format"] <= FORMAT:
                raise CheckpointError(
                    f"{folder} has format {data['format']!r}; this version reads 1 to {FORMAT}: take a newer one"
                )
            neutral = flatten_settings(ShampooHyperParams())  # what is newer than the folder had its default in it
            return cls(
                {name: Parameter.from_json(of) for name, of in data["parameters"].items()},
                tuple(data["idle"]),
                neutral | data["hyperparams"],
                tuple(dict(group) for group in data["groups"]),
                int(data["skipped_steps"]),
                {name: (int(size), int(crc)) for name, (size, crc) in data["files"].items()},
                int(data["format"]),
                str(data["package"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder / MANIFEST} is damaged: no valid {error}") from None
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{folder / MANIFEST} is damaged: {error}") from None

    def damage(self, folder: Path, *, share: int = 0, of: int = 1) -> str:
        """Return an error of the files, or empty. All sizes are compared, and the content of every ``of``-th file."""
        for number, (name, (size, crc)) in enumerate(sorted(self.files.items())):
            if Path(name).name != name:
                return f"{folder / MANIFEST} is damaged: {name!r} is not the name of a file"
            path = folder / name
            if not path.is_file():
                return f"{folder} is damaged: the file {name} is missing"
            if path.stat().st_size != size:
                return f"{folder} is damaged: {name} has {path.stat().st_size} bytes, and had {size}"
            if number % of == share and checksum(path) != crc:
                return f"{folder} is damaged: the content of {name} is not what was written"
        return ""


def checksum(path: Path) -> int:
    """Compute the CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def partial(folder: Path) -> Path:
    """Return where a folder is written before it gets its final name."""
    return folder.with_name(folder.name + ".partial")


def holds_checkpoint(folder: Path) -> bool:
    """Return True if :meth:`Manifest.read` is to be called for this folder, even if only to say that it is missing."""
    return (folder / MANIFEST).exists() or partial(folder).exists() or not folder.is_dir()


def latest_checkpoint(path: str | os.PathLike[str]) -> Path | None:
    """Return the folder in ``path`` that :meth:`shampoo3d.Shampoo.save_checkpoint` has finished at the highest step.

    Folders that a crash has left unfinished do not count. None if there is no finished one.

    Raises:
        CheckpointError: naming a finished folder whose manifest is damaged.
    """
    check_path("path", path)
    folders = sorted(path for path in Path(path).glob(f"*/{MANIFEST}"))
    finished = [folder.parent for folder in folders if folder.parent.suffix != ".partial"]
    return max(finished, key=lambda folder: Manifest.read(folder).step, default=None)


def _absent(folder: Path) -> str:
    if partial(folder).exists():
        return f"{folder} was never finished: a save ended early and left {partial(folder)}; take an earlier one"
    if folder.is_dir():
        return f"{folder} is no checkpoint of 3D-Shampoo: it has no {MANIFEST}"
    return f"there is no checkpoint {folder}"


def _version() -> str:
    try:
        return version("3d-shampoo")
    except PackageNotFoundError:
        return "unknown"


# ---- settings ----


def flatten_settings(hp: ShampooHyperParams) -> dict[str, Any]:
    """Return all settings by name, those of ``variant`` and ``computation`` with these words as prefix."""
    return dict(_flat("", asdict(hp)))


def _flat(prefix: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield prefix + name, value.name if isinstance(value, Enum) else value


MEANING = (
    "inverse_exponent_override",
    "graft_type",
    "statistics_compute_steps",
    "variant.direction",
    "variant.statistics",
    "variant.bias_correction",
    "variant.vectors",
    "variant.borrow",
)
"""Settings that define what the state is: with other values the same numbers mean something else."""


def changed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, with both values; those that one side does not know are left out."""
    return {name: (saved[name], now[name]) for name in saved if name in now and saved[name] != now[name]}


def contradictions(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the differences that leave the state without meaning, in words."""
    differing = changed(saved, now)
    names = [name for name in MEANING if name in differing]
    for name, special in (("beta2", 1.0), ("variant.beta1", 0.0), ("start_preconditioning_step", 1)):
        before, after = differing.get(name, (special, special))
        if (before == special) != (after == special):  # sums or averages; an average or none; momenta of D or none
            names.append(name)
    return [f"{name} was {differing[name][0]!r} and is {differing[name][1]!r}" for name in names]


_WORDS = {
    "shape": "shape",
    "merged": "merged shape",
    "axes": "axes with factors",
    "diagonal": "axes with diagonal ones",
}


def misfits(saved: Mapping[str, Parameter], now: Mapping[str, Parameter]) -> Iterator[str]:
    """Yield why parameters cannot take the state of the same name, in words."""
    for name in saved.keys() & now.keys():
        old, new = saved[name], now[name]
        for attribute, words in _WORDS.items():
            a, b = getattr(old, attribute), getattr(new, attribute)
            if a != b:
                yield f"{name!r} has {words} {_times(b)}, and had {_times(a)}"
                break
        else:
            if (old.dtype == "float64") != (new.dtype == "float64"):
                yield f"{name!r} has state of {new.dtype}, and had {old.dtype}"


def recut(saved: Mapping[str, Parameter], now: Mapping[str, Parameter]) -> list[str]:
    """List the parameters that are cut into other blocks."""
    return sorted(name for name in saved.keys() & now.keys() if saved[name].cuts != now[name].cuts)


def _times(numbers: Sequence[int]) -> str:
    return "x".join(map(str, numbers)) or "()"


def saved_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a parameter group that are saved: numbers as such, of other keys what JSON can hold."""
    saved = {}
    for name, value in group.items():
        if name not in ("params", "param_names"):
            number = plain(value)
            if name in SETTINGS or _is_json(number):
                saved[name] = number
    return saved


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
