"""Folders that hold the weights and the whole state, and load into any other layout.

Each rank writes what it keeps. A folder gets its final name only when it is complete.
"""

import os
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from shampoo3d.checkpoint import manifest as of_folder
from shampoo3d.checkpoint.manifest import CheckpointError, Manifest, Parameter, checksum, partial
from shampoo3d.checkpoint.naming import for_loading, for_saving
from shampoo3d.checkpoint.reading import Reader, described, read_metadata
from shampoo3d.checkpoint.reblock import Reblocking
from shampoo3d.checkpoint.state_dict import loaded_groups
from shampoo3d.checkpoint.tensors import WEIGHT, Held, Scattered, Weights, held
from shampoo3d.distributed.collectives import all_gather_object, first_error
from shampoo3d.distributed.topology import ParallelGroups
from shampoo3d.runtime.bindings import Binding, GroupTensor
from shampoo3d.runtime.team import Team
from shampoo3d.settings.hyperparams import ShampooHyperParams

ANY_ERROR = (Exception, CheckpointException)
"""Errors of reading and writing: PyTorch's own, which has the errors of all ranks, is no ``Exception``."""


@dataclass(frozen=True)
class Source:
    """State of an optimizer on this rank, to be saved or to be loaded into.

    Attributes:
        groups: the settings of all parameter groups.
        steps: the steps that each tensor in them has taken.
        idle: the parameters that take no part in steps.
        models: the model's own parameters by name, where an engine keeps master copies of them.
    """

    parallel: ParallelGroups
    teams: Sequence[Team]
    groups: Sequence[dict[str, Any]]
    steps: Mapping[Tensor, int]
    idle: Sequence[str]
    models: Mapping[str, Tensor]
    hp: ShampooHyperParams
    skipped_steps: int

    def parameters(self, called: Mapping[Binding, str]) -> dict[str, Parameter]:
        """Describe the matrices of all ranks. Collective."""
        mine = {
            called[binding]: Parameter.of(binding.matrix, self.steps[binding.group_tensor.tensor])
            for team in self.teams
            if team.rank == team.plan.ranks[0]
            for binding in team.bindings
        }
        gathered = all_gather_object(self.parallel.world, mine)
        return {name: parameter for parameters in gathered for name, parameter in parameters.items()}

    def everyones_idle(self) -> tuple[str, ...]:
        """List the parameters on any rank that take no part in steps. Collective."""
        return tuple(
            sorted({name for names in all_gather_object(self.parallel.world, tuple(self.idle)) for name in names})
        )

    def weights(self) -> Weights:
        """Collect the weights on this rank."""
        return Weights(
            {group_tensor: group_tensor.flat for team in self.teams for group_tensor in team.group_tensors}, self.models
        )


@dataclass(frozen=True)
class Loaded:
    """Report of what :meth:`shampoo3d.Shampoo.load_checkpoint` has done.

    Attributes:
        step: that of the parameter that has taken most.
        changed: the settings that differ, with their old and new values.
        begun: the parameters that begin anew, since the checkpoint has no state of them.
        left: the parameters whose state in the checkpoint was not loaded.
        reblocked: the parameters that are cut into other blocks now, and whether their statistics are "exact" or
            "approximate"; the rest of their state is carried over unchanged.
    """

    step: int
    changed: Mapping[str, tuple[Any, Any]]
    begun: tuple[str, ...]
    left: tuple[str, ...]
    reblocked: Mapping[str, str]


def save(source: Source, path: str | os.PathLike[str]) -> None:
    """Write a folder. Collective.

    Raises:
        CheckpointError: on all ranks, if it exists already or could not be written; there is no such folder then.
    """
    names = for_saving(source.parallel, source.teams)
    parameters, idle = source.parameters(names.called), source.everyones_idle()
    groups, settings = tuple(map(of_folder.saved_settings, source.groups)), of_folder.flatten_settings(source.hp)
    described = Manifest(parameters, idle, settings, groups, source.skipped_steps, {})
    write(source.parallel, path, held(source.teams, names.written, source.weights(), everything=False), described)


def write(parallel: ParallelGroups, path: str | os.PathLike[str], state: Sequence[Held], described: Manifest) -> None:
    """Write what each rank has into one folder, with this manifest but for its files. Collective; raises as `save`."""
    folder, first = Path(path), parallel.rank == parallel.world.ranks[0]
    _refuse(parallel, _prepare(folder, described) if first else "")
    tensors: dict[str, Any] = {tensor.key: tensor.scattered() for tensor in state}
    error, sums = "", {}
    try:
        with _quiet():
            writer = FileSystemWriter(partial(folder))
            world = parallel.world
            state_dict_saver.save(tensors, storage_writer=writer, process_group=world.handle, no_dist=world.size == 1)
        sums = _checksums(parallel, partial(folder))
    except ANY_ERROR as raised:  # a disk error on any rank
        error = f"{folder} could not be written: {_words(raised)}"
    _refuse(parallel, error)
    files = {name: file for part in all_gather_object(parallel.world, sums) for name, file in part.items()}
    _refuse(parallel, _finish(folder, replace(described, files=files)) if first else "")


def _refuse(parallel: ParallelGroups, error: str) -> None:
    """Raise, on all ranks, the error of the first rank that has one."""
    if first := first_error(parallel, error):
        raise CheckpointError(first)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress PyTorch's warning that a single process is not distributed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _words(error: BaseException) -> str:
    """Describe an error; of the errors of all ranks, the first."""
    causes = getattr(error, "failures", None)
    if not causes:
        return f"{type(error).__name__}: {error}"
    rank, (cause, _) = next(iter(causes.items()))
    kind = "" if isinstance(cause, CheckpointError) else f"{type(cause).__name__} "
    return f"{kind}on rank {rank}: {cause}"


def _prepare(folder: Path, described: Manifest) -> str:
    """Make the partial folder; return an error, or empty."""
    try:
        if folder.exists():
            return f"{folder} exists already: a checkpoint is written into a folder of its own"
        if partial(folder).exists():
            shutil.rmtree(partial(folder))
        partial(folder).mkdir(parents=True)
    except OSError as raised:
        return f"{folder} could not be written: {raised}"
    return ""


def _share(parallel: ParallelGroups) -> tuple[int, int]:
    """Return the index of this rank and the number of ranks."""
    world = parallel.world
    return world.ranks.index(parallel.rank), world.size


def _checksums(parallel: ParallelGroups, folder: Path) -> dict[str, tuple[int, int]]:
    """Compute sizes and CRC-32 of this rank's share of all files."""
    index, size = _share(parallel)
    return {path.name: (path.stat().st_size, checksum(path)) for path in sorted(folder.iterdir())[index::size]}


def _finish(folder: Path, written: Manifest) -> str:
    """Give the folder its final name, once it is complete and on the disk; return an error, or empty."""
    try:
        written.write(partial(folder))
        _sync(partial(folder) / of_folder.MANIFEST)
        _sync(partial(folder))
        partial(folder).rename(folder)
        _sync(folder.parent)
    except OSError as raised:
        return f"{folder} could not be written: {raised}"
    return ""


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- loading ----


class Loading:
    """Loading of a folder into an optimizer: first all is read and checked, then all is taken over."""

    def __init__(self, source: Source, folder: Path, manifest: Manifest, *, weights: bool) -> None:
        """Use :meth:`open` instead, which reads the manifest and compares it with the optimizer."""
        self.source, self.folder, self.manifest = source, folder, manifest
        self.weights = source.weights() if weights else None
        self.groups: list[dict[str, Any]] = [dict(group) for group in source.groups]
        self.called = for_loading(source.parallel, source.teams, manifest.parameters)
        self.parameters = source.parameters(self.called)

    @classmethod
    def open(
        cls, source: Source, path: str | os.PathLike[str], *, weights: bool, strict: bool, reblock: bool
    ) -> "Loading":
        """Read the manifest and compare it with the optimizer. Collective.

        Raises:
            CheckpointError: on all ranks, naming what is damaged or does not fit; nothing was changed.
        """
        folder, error = Path(path), ""
        try:
            manifest = Manifest.read(folder)
        except CheckpointError as raised:
            error = str(raised)
        _refuse(source.parallel, error)
        loading = cls(source, folder, manifest, weights=weights)
        _refuse(source.parallel, loading._compare(source.everyones_idle(), strict=strict, reblock=reblock))
        return loading

    def _compare(self, idle: Collection[str], *, strict: bool, reblock: bool) -> str:
        """Return an error if the folder is damaged or does not fit, or empty; take over its settings of groups."""
        try:
            index, size = _share(self.source.parallel)
            error = self.manifest.damage(self.folder, share=index, of=size)
            error = error or self._misfit({*idle} if strict else None, reblock) or self._unequal_steps()
            if not error and (strict or len(self.groups) == len(self.manifest.groups)):
                self.groups = self._settings()
        except OSError as raised:  # a disk error on any rank
            return f"{self.folder} could not be read: {_words(raised)}"
        except (TypeError, ValueError) as raised:
            return str(raised)
        return error

    def _settings(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups with the settings of the folder."""
        saved, now = self.manifest.groups, self.groups
        if len(saved) != len(now):
            raise CheckpointError(f"{self.folder} has {len(saved)} parameter groups, the optimizer has {len(now)}")
        with_params = [{**theirs, "params": ours["params"]} for theirs, ours in zip(saved, now, strict=True)]
        return loaded_groups(now, with_params, self.source.hp)

    @cached_property
    def recut(self) -> list[str]:
        """Parameters that were cut into other blocks when they were saved."""
        return of_folder.recut(self.manifest.parameters, self.parameters)

    @property
    def begun(self) -> tuple[str, ...]:
        """Parameters of which the folder has no state."""
        return tuple(sorted(self.parameters.keys() - self.manifest.parameters.keys()))

    @property
    def left(self) -> tuple[str, ...]:
        """Parameters in the folder that the optimizer does not have."""
        return tuple(sorted(self.manifest.parameters.keys() - self.parameters.keys()))

    def _misfit(self, idle: set[str] | None, reblock: bool) -> str:
        """Return an error if the folder does not fit the optimizer; ``idle`` is None if names may be missing."""
        saved, now = self.manifest.hyperparams, of_folder.flatten_settings(self.source.hp)
        errors = [f"saved with other hyperparams: {difference}" for difference in of_folder.contradictions(saved, now)]
        errors += of_folder.misfits(self.manifest.parameters, self.parameters)
        stepped = [name for name in self.begun if self.parameters[name].step]
        errors += [f"{stepped[:5]} begin in it, and have taken steps here: load into a new optimizer"] * bool(stepped)
        if idle is not None:
            begun = [name for name in self.begun if name not in self.manifest.idle]
            left = [name for name in self.left if name not in idle]
            frozen = [name for name in self.left if name in idle]
            errors += [f"it has nothing for {len(begun)} parameters: {begun[:5]}"] * bool(begun)
            errors += [f"{len(left)} of its parameters are not in the model: {left[:5]}"] * bool(left)
            errors += [f"{len(frozen)} of its parameters are frozen or empty here: {frozen[:5]}"] * bool(frozen)
        if self.recut and (why := self._not_reblocked(reblock)):
            errors.append(f"{len(self.recut)} matrices were cut into other blocks, such as {self.recut[:3]}: {why}")
        return f"{self.folder} does not fit: {'; '.join(errors[:5])}" if errors else ""

    def _not_reblocked(self, reblock: bool) -> str:
        """Return why state cannot be carried over into other blocks, or empty."""
        if not reblock:
            return "reblock=True carries momenta over, and statistics as far as they are known"
        variant = self.source.hp.variant
        if variant.direction == "adam":
            return "eigenbases and what is kept in them cannot be cut or joined; take the block_size that they had"
        if any(run.copies for team in self.source.teams for run in team.plan.runs):
            return "reblock=True needs root_copies=1"
        return ""

    def _unequal_steps(self) -> str:
        """Return an error if parameters of one flat slice have taken different numbers of steps, or empty."""
        for names in self._names().values():
            steps = {self.manifest.parameters[name].step: name for name in names}
            if len(steps.keys() - {0}) > 1:
                return f"{self.folder} does not fit: parameters of one flat slice are at different steps: {steps}"
        return ""

    def _names(self) -> dict[GroupTensor, list[str]]:
        """Return the parameters that the folder has state of, by group tensor."""
        names: dict[GroupTensor, list[str]] = {}
        for binding in (binding for team in self.source.teams for binding in team.bindings):
            if self.called[binding] in self.manifest.parameters:
                names.setdefault(binding.group_tensor, []).append(self.called[binding])
        return names

    def steps(self) -> dict[Tensor, int]:
        """Return the steps of each tensor of the groups; of a slice, those of its parameters that have begun."""
        saved = self.manifest.parameters
        return {
            group_tensor.tensor: max(saved[name].step for name in names)
            for group_tensor, names in self._names().items()
        }

    def finish(self) -> None:
        """Read the tensors and take them over. Collective.

        Raises:
            CheckpointError: on all ranks, if a tensor is missing, does not fit or cannot be read.
        """
        begun, recut = {*self.begun}, {*self.recut}
        called = {binding: name for binding, name in self.called.items() if name not in begun}
        tensors = held(self.source.teams, called, self.weights, everything=True)
        self._reblocking = Reblocking(self.source.teams, self.called, self.manifest.parameters, recut)
        tensors = [t for t in tensors if not (t.name in recut and t.is_factor)] + self._reblocking.held()
        staged, error = [tensor.staged() for tensor in tensors], ""
        wanted = {tensor.key: scattered for tensor, (scattered, _) in zip(tensors, staged, strict=True)}
        try:
            error = _undescribed(self.folder, wanted)
        except CheckpointError as raised:
            error = str(raised)
        _refuse(self.source.parallel, error)
        try:
            self._read(wanted)
        except ANY_ERROR as raised:  # an error of the disk or of its content, on any rank
            error = f"{self.folder} could not be read: {_words(raised)}"
        _refuse(self.source.parallel, error)
        for tensor, (_, buffers) in zip(tensors, staged, strict=True):
            tensor.take(buffers)
        self._reblocking.finish(self.source.hp)
        for group_tensor, flat in self.weights.flats.items() if self.weights else ():
            group_tensor.store(flat)

    def _read(self, into: Mapping[str, Tensor]) -> None:
        with _quiet():
            world = self.source.parallel.world
            alone, reader = world.size == 1, Reader(self.folder)
            state_dict_loader.load(dict(into), storage_reader=reader, process_group=world.handle, no_dist=alone)

    def loaded(self) -> Loaded:
        """Report what was done. Collective."""
        changed = of_folder.changed(self.manifest.hyperparams, of_folder.flatten_settings(self.source.hp))
        exact = all_gather_object(self.source.parallel.world, self._reblocking.exact) if self.recut else []
        reblocked = {
            name: "exact" if all(on_rank.get(name, True) for on_rank in exact) else "approximate" for name in self.recut
        }
        return Loaded(self.manifest.step, changed, self.begun, self.left, reblocked)


def _undescribed(folder: Path, wanted: Mapping[str, Scattered]) -> str:
    """Return an error if a wanted tensor is missing or has the wrong shape or dtype, or empty."""
    saved = described(read_metadata(folder))
    for key, tensor in wanted.items():
        if key not in saved:
            hint = (
                ": it was converted without weights, load it with weights=False" if key.endswith(f"/{WEIGHT}") else ""
            )
            return f"{folder} does not fit: it has no {key}{hint}"
        if saved[key].size != tensor.shape:
            return f"{folder} does not fit: {key} is {tuple(saved[key].size)}, and {tuple(tensor.shape)} is needed"
        dtype = saved[key].properties.dtype
        if not dtype.is_floating_point or (torch.float64 in (dtype, tensor.dtype) and dtype != tensor.dtype):
            return f"{folder} does not fit: {key} is {dtype}, and {tensor.dtype} is needed"
    return ""
