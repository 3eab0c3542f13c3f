"""Saving and loading of the optimizer."""

import os
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from shampoo3d.checkpoint import folder, slices
from shampoo3d.checkpoint import state as checkpoint
from shampoo3d.checkpoint import state_dict as form
from shampoo3d.checkpoint.state import ParamState
from shampoo3d.distributed.collectives import meet
from shampoo3d.distributed.errors import during
from shampoo3d.distributed.topology import Claims, ParallelGroups
from shampoo3d.engines.parameters import ParameterRegistry
from shampoo3d.runtime.agreement import StepRefusedError
from shampoo3d.runtime.ambient import undisturbed
from shampoo3d.runtime.assemble import DisagreementError
from shampoo3d.runtime.attributes import Shared
from shampoo3d.runtime.step import UnfinishedStepError, join_background_roots
from shampoo3d.runtime.stepping import Stepping
from shampoo3d.settings.distribution import Distribution
from shampoo3d.settings.validation import check_bool, check_path


@dataclass(frozen=True)
class Pending:
    """Loaded state that waits until its parameters are bound.

    Attributes:
        saved: the state by parameter; ``own``: the state of flat slices.
        known: the saved descriptions of the matrices.
    """

    saved: dict[Tensor, ParamState] = field(default_factory=dict)
    own: dict[str, Any] | None = None
    known: dict[str, Any] = field(default_factory=dict)


def _replace(state: dict[Any, Any], by: Mapping[Any, Any]) -> None:
    """Replace the content of a dictionary, which a wrapper may hold too."""
    state.clear()
    state.update(by)


class Checkpointed(Stepping):
    """An optimizer whose state is kept by teams; see :class:`shampoo3d.Shampoo`."""

    distribution: Distribution
    _claims = Shared(Claims())
    _registry: ParameterRegistry
    _pending = Shared(Pending())
    elsewhere = Shared("")
    """Name of a folder into which a trainer saves the state on all ranks; then ``state_dict()``, which it calls on one,
    has settings and this name only, and does not communicate."""
    _awaited = Shared("")  # the folder that must be loaded, since a dictionary without state was

    @abstractmethod
    def _has_unbound(self) -> bool:
        """Return whether parameters were added, unfrozen, removed or moved, or state taken away, since binding."""

    @abstractmethod
    def _bind_on_all(self, parallel: ParallelGroups) -> None:
        """Bind what is not bound yet, together with the ranks that have met for it."""

    @abstractmethod
    def _assemble(
        self,
        parallel: ParallelGroups,
        pending: "Pending",
        owned: Mapping[Tensor, ParamState],
    ) -> None:
        """Make teams with new stacks, and copy the pending or owned state into them."""

    @abstractmethod
    def _located(self) -> ParallelGroups:
        """Find this process's place among the ranks, unless it is known."""

    @property
    def _flat_tensors(self) -> set[Tensor]:
        """Tensors of the groups that hold shards, the state of whose elements has the shape of the tensor."""
        return {group_tensor.tensor for team in self._teams for group_tensor in team.shard_buckets}

    def _follow(self) -> None:
        """Take over the groups as they are now: at the beginning of whatever the user calls."""
        self._settle()
        self._registry.follow(self.param_groups)

    @property
    def awaits_folder(self) -> bool:
        """True if a dictionary was loaded whose state is in a folder, which :meth:`load_checkpoint` has yet to load."""
        return bool(self._awaited)

    def _must_be_whole(self) -> None:
        if self._awaited:
            raise UnfinishedStepError(
                f"the dictionary that was loaded has no state: it is in {self._awaited!r} beside it; load that with "
                "load_checkpoint(), on all ranks"
            )
        if self._unfinished:
            raise UnfinishedStepError(
                f"step {self._unfinished} was interrupted; parameters and optimizer state are inconsistent: load a "
                "checkpoint before continuing"
            )

    def _complete_state(self) -> dict[Tensor, ParamState]:
        """Gather the state of every parameter from all ranks; for flat slices, only that on this rank."""
        begun, steps = dict(self._pending.saved), self._steps
        if self._bound is None:
            return begun
        join_background_roots(self._teams)
        flat = self._registry.flat
        for team in self._teams:
            if flat:
                begun |= {
                    group_tensor.tensor: checkpoint.own(self.state[group_tensor.tensor], flat=True)
                    for group_tensor in team.group_tensors
                }
            else:
                begun |= checkpoint.complete_state(team, steps)
        begun |= {tensor: {"step": 0} for tensor, step in steps.items() if not step}
        return {param: begun.get(param, {"step": 0}) for group in self.param_groups for param in group["params"]}

    def _foreign_state(self) -> dict[Any, Any]:
        """Return the entries of ``state`` that a wrapper has put there, by parameter or by a key of its own."""
        flat = self._flat_tensors
        return {
            key: checkpoint.foreign(state, flat=key in flat) if isinstance(key, Tensor) else state
            for key, state in self.state.items()
        }

    def _put_state(self, live: Mapping[Tensor, ParamState]) -> None:
        """Put our state into ``state``, in the place of what we had there; entries of others stay."""
        flat = self._flat_tensors
        for key in [key for key in self.state if isinstance(key, Tensor)]:
            for name in checkpoint.own(self.state[key], flat=key in flat):
                del self.state[key][name]
            if not self.state[key] and key not in live:
                del self.state[key]
        for tensor, state in live.items():
            self.state.setdefault(tensor, {}).update(state)

    def _parameters(self) -> dict[str, Any]:
        """Describe the bound matrices, in plain data; in an unbound copy, those of the original."""
        return checkpoint.parameters_of(self._teams, self._steps) if self._bound else self._pending.known

    @undisturbed()
    @during("in state_dict(), which all ranks must call")
    def state_dict(self) -> dict[str, Any]:
        """Return copies of the complete state of all ranks, as one process would have it.

        Collective if the work is shared: every rank must call it. It loads into any number of ranks. Under ZeRO it is
        the state on this rank, without communication, as in DeepSpeed's files, and loads only into the same layout.
        """
        self._must_be_whole()
        self._follow()
        flat = self._registry.flat
        if self.elsewhere and not flat:
            return self._settings_only()
        if self._bound is not None and not flat:
            meet(self._bound.parallel.world, "state_dict()")
        params = [param for group in self._registry.groups for param in group["params"]]
        foreign, complete = self._foreign_state(), self._complete_state()
        whole_state = {param: complete.get(param, {}) | foreign.pop(param, {}) for param in params}
        whole_state |= {key: state for key, state in foreign.items() if not isinstance(key, Tensor)}
        whole = self._packed({key: of for key, of in whole_state.items() if of})
        whole["shampoo"] = form.description(self._parameters(), self.hyperparams, self.skipped_steps)
        if not flat:
            self._registry.learn_replaced()
            originals = (param for group in self._registry.originals for param in group)
            whole["shampoo"]["names"] = [self._registry.names[param] for param in originals]
        elif self._bound is not None:
            numbers = {param: number for number, param in enumerate(params)}
            whole["shampoo"] |= slices.own_state(self._teams, numbers)
        return whole

    def _packed(self, state: Mapping[Any, Any]) -> dict[str, Any]:
        """Return PyTorch's dictionary of the groups with this state, which numbers the parameters."""
        owned = dict(self.state)
        try:
            _replace(self.state, state)
            return super().state_dict()
        finally:
            _replace(self.state, owned)

    def _settings_only(self) -> dict[str, Any]:
        """Return the groups, and in which folder the state is."""
        settings = self._packed({})
        settings["shampoo"] = form.description({}, self.hyperparams, self.skipped_steps) | {"elsewhere": self.elsewhere}
        return settings

    @undisturbed()
    @during("in load_state_dict(), which all ranks must call")
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state from :meth:`state_dict`; each rank loads the parts that it stores and owns.

        Before the first step of a distributed run the ranks are not known yet; the state is then checked at that step.

        Raises:
            TypeError, ValueError: naming the group, parameter or block that does not fit; the optimizer is unchanged.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        self._follow()
        flat = self._registry.flat
        groups, loaded = form.by_parameter(self.param_groups, state_dict, self._registry.names, self.hyperparams)
        saved = {key: checkpoint.own(of, flat=flat) for key, of in loaded.items() if isinstance(key, Tensor)}
        described: dict[str, Any] = state_dict.get("shampoo", {})  # absent after PyTorch's conversions
        form.check_described(described, self.hyperparams)
        self._awaited = described.get("elsewhere", "")
        own = described if "layout" in described else None
        if saved and flat != (own is not None):
            raise ValueError(
                "ZeRO state loads only into the same layout, and a ZeRO run accepts only ZeRO state; use "
                "save_checkpoint() and load_checkpoint() to change layouts"
            )
        distributed = dist.is_available() and dist.is_initialized()
        pending = Pending(saved, own, described.get("parameters", {}))
        if self._bound is None and distributed:
            self._pending = pending
        elif self._bound is not None and own is not None and not self._has_unbound():
            self._load_own(own, saved)
        else:
            parallel = self._located()
            meet(parallel.world, "load_state_dict()")
            try:
                self._assemble(parallel, pending, {})
            except DisagreementError as error:
                raise StepRefusedError(str(error)) from None
        form.replace_settings(self.param_groups, groups)
        self._put_foreign(loaded)
        self.skipped_steps = described.get("skipped_steps", self.skipped_steps)
        self._forget()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load_own(self, own: Mapping[str, Any], saved: Mapping[Tensor, ParamState]) -> None:
        """Load the state of flat slices where it is; an engine may have loaded only a part of its own by now."""
        join_background_roots(self._teams)
        live = {tensor: checkpoint.own(self.state[tensor], flat=True) for tensor in self._group_tensors}
        slices.check_own(self._teams, live, own, saved)
        slices.load_own(self._teams, live, own, saved)
        for tensor, state in live.items():
            self.state[tensor]["step"] = state["step"]

    def _put_foreign(self, loaded: Mapping[Any, Any]) -> None:
        """Put the loaded entries of wrappers into ``state``, in the place of those that are there."""
        flat = self._registry.flat
        for key, state in self._foreign_state().items():
            for name in state if isinstance(key, Tensor) else ():
                del self.state[key][name]
        for key, state in loaded.items():
            if not isinstance(key, Tensor):
                self.state[key] = state
            elif entries := checkpoint.foreign(state, flat=flat):
                self.state.setdefault(key, {}).update(form.cast(key, entries))

    def _bind_for(self, call: str) -> None:
        self._follow()
        parallel = self._located()
        meet(parallel.world, call)
        self._bind_on_all(parallel)

    def _source(self) -> folder.Source:
        assert self._bound is not None
        join_background_roots(self._teams)
        bound = {binding.matrix.name for team in self._teams for binding in team.bindings}
        idle = tuple(name for name in self._registry.names.values() if name not in bound)
        models = {name: param for param, name in self._registry.names.items() if param not in self._group_tensors}
        return folder.Source(
            self._bound.parallel,
            self._teams,
            self._registry.groups,
            self._steps,
            idle,
            models,
            self.hyperparams,
            self.skipped_steps,
        )

    @undisturbed()
    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Write the complete state and the weights into a new folder, each rank its own part.

        Collective if the work is shared, on storage that all ranks see. The folder gets its name only when it is
        complete; a crash leaves ``<path>.partial``. The weights are those that steps update: the master copies of
        low-precision models.

        Raises:
            CheckpointError: on every rank, if the folder exists or could not be written.
            UnfinishedStepError: if a step was interrupted and nothing was loaded since.
        """
        check_path("path", path)
        self._must_be_whole()
        with during(f"about the checkpoint {os.fspath(path)}"):
            self._bind_for("save_checkpoint()")
            folder.save(self._source(), path)

    @undisturbed()
    def load_checkpoint(
        self, path: str | os.PathLike[str], *, weights: bool = True, strict: bool = True, reblock: bool = False
    ) -> folder.Loaded:
        """Load a folder that :meth:`save_checkpoint` wrote, in any layout and on any number of ranks.

        Collective if the work is shared; with DeepSpeed call it after ``deepspeed.initialize``.

        Args:
            weights: load the weights, too; if an engine keeps master copies, both these and the model's own.
            strict: all parameters must have state there and all of it must be loaded, except those without steps.
            reblock: allow matrices to be cut into other blocks than before: state of elements is carried over, and
                statistics as far as they are known, see ``docs/checkpoints.md``.

        Returns:
            A report: settings that changed, parameters that start anew or were not loaded, and reblocked ones.

        Raises:
            CheckpointError: on every rank, naming what is damaged or does not fit; nothing was changed.
        """
        check_path("path", path)
        for name, value in (("weights", weights), ("strict", strict), ("reblock", reblock)):
            check_bool(name, value)
        with during(f"about the checkpoint {os.fspath(path)}"):
            self._bind_for("load_checkpoint()")
            loading = folder.Loading.open(self._source(), path, weights=weights, strict=strict, reblock=reblock)
            loading.finish()
        for tensor, step in loading.steps().items():
            self.state[tensor]["step"] = step
        form.replace_settings(self._registry.groups, loading.groups)
        self.skipped_steps = loading.manifest.skipped_steps
        self._forget()
        self._awaited = ""
        return loading.loaded()

    @during("in a copy or pickle of the optimizer, which all ranks must make")
    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles, which bind their parameters anew at their first step.

        Collective if the work is shared, as :meth:`state_dict` is.
        """
        self._follow()
        if self._bound is not None and not self._registry.flat:
            meet(self._bound.parallel.world, "copy.deepcopy() or pickle")
        roles = self._registry.roles.without_models(self._registry.names)
        names = ("_skipped", "_claims", "_unfinished", "elsewhere", "_awaited")
        return {
            **{name: getattr(self, name) for name in ("defaults", "param_groups", "hyperparams", "distribution")},
            "state": defaultdict(dict, self._foreign_state()),
            "_registry": replace(self._registry, models=[], roles=roles),
            "_shared": {
                **{name: getattr(self, name) for name in names},
                "_pending": Pending(self._complete_state(), self._pending.own, self._parameters()),
            },
        }
