"""Shampoo as a ``torch.optim`` optimizer that shares its work over all ranks."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shampoo3d.checkpoint import slices
from shampoo3d.checkpoint import state as checkpoint
from shampoo3d.checkpoint.saving import Checkpointed, Pending
from shampoo3d.checkpoint.state import ParamState
from shampoo3d.distributed.collectives import all_gather_object, first_error, meet
from shampoo3d.distributed.errors import during
from shampoo3d.distributed.topology import Claims, ParallelGroups
from shampoo3d.engines import native
from shampoo3d.engines.engine import GroupContent
from shampoo3d.engines.parameters import ParameterRegistry
from shampoo3d.engines.reading import engine, locate, place_gradient
from shampoo3d.engines.roles import Embeddings, Roles, collected
from shampoo3d.engines.splits import Splits, copied
from shampoo3d.planning.plan import Plan
from shampoo3d.runtime.agreement import Agreement, StepRefusedError, Verdict, unusable
from shampoo3d.runtime.ambient import undisturbed
from shampoo3d.runtime.assemble import Bound, assemble, check_shapes, is_trainable
from shampoo3d.runtime.report import Report
from shampoo3d.runtime.step import join_background_roots
from shampoo3d.runtime.team import state_bytes
from shampoo3d.settings.distribution import Distribution
from shampoo3d.settings.groups import settings_of
from shampoo3d.settings.hyperparams import ShampooHyperParams
from shampoo3d.settings.names import check_arguments, hyperparams_of
from shampoo3d.settings.validation import check_kind


class Shampoo(Checkpointed):
    """Shampoo with grafting and momentum; the update rule is stated in ``docs/update-rule.md``.

    Use it like any PyTorch optimizer. If ``torch.distributed`` runs, the blocks of all matrices are shared over the
    ranks that hold the same parameters (found from DeepSpeed, from ``topology``, or all ranks): each rank keeps the
    state of the blocks that it owns and computes only those, and every rank gets every update.

    Args:
        params: parameters, named parameters or groups. A group may set lr, momentum, weight_decay, maximize, and
            ``precondition=False`` to leave its parameters without preconditioner.
        lr: learning rate. If not given 1e-3, as for AdamW, or 0.1 without ``variant.beta1``, as for SGD.
        momentum: of both directions; Nesterov's if ``hyperparams.nesterov``. 0.9 if not given, or 0 with
            ``variant.beta1``, which averages the gradient in its place.
        hyperparams: all other settings of the update rule: the name of a preset ("recommended", "soap", "classic"), a
            dictionary of settings by their names, with ``"preset"``, or a ``ShampooHyperParams``, which is the thesis's
            rule where it says nothing else.
        weight_decay: that of the hyperparams if not given.
        maximize: ascend instead of descend.
        model: the module that the parameters belong to, for their names, embeddings and tied layers; found by itself
            when ``params`` is ``model.parameters()`` or ``model.named_parameters()``, or the module itself.
        module: the same, for trainers that keep an argument called ``model`` to themselves.
        embeddings: names or parameters that ``hyperparams.ignore_embedding_layer`` concerns, or not, by a mapping to
            True and False; or a function of name and parameter that returns one of these or None. Embedding modules
            and output layers are found by themselves, however the parameters are given.
        splits: parameters that are several matrices in one, such as fused queries, keys and values: by name or
            parameter the number of equal ones along axis 0, their lengths, or by axis either of these; or a function of
            name and parameter that returns one of these or None. See ``docs/update-rule.md``.
        topology: the ranks that train these parameters, if they are not those of an engine or of the parameters' own
            meshes, nor all ranks: a ``DeviceMesh``, a process group of replicas, or DeepSpeed's ``model.topology()``.
        world_rank: the rank of this process; checked if given, as are the next two.
        world_size: the number of ranks.
        shapes: the shapes of the trainable parameters.
        distribution: settings of the sharing of work; they change where state is kept and computed, not the result.

    Raises:
        TypeError, ValueError: naming the argument, its value and its bound; also if an argument contradicts the ranks
            or parameters.
    """

    def __init__(
        self,
        params: Iterable[Any] | nn.Module,
        lr: float | None = None,
        momentum: float | None = None,
        hyperparams: ShampooHyperParams | str | Mapping[str, Any] = "recommended",
        *,
        weight_decay: float | None = None,
        maximize: bool = False,
        model: nn.Module | None = None,
        module: nn.Module | None = None,
        embeddings: Embeddings | None = None,
        splits: Splits | None = None,
        world_rank: int | None = None,
        world_size: int | None = None,
        topology: Any = None,
        shapes: Sequence[Sequence[int]] | None = None,
        distribution: Distribution = Distribution(),
        **unknown: NoReturn,
    ) -> None:
        check_arguments(unknown, inspect.signature(Shampoo).parameters.keys() - {"unknown"})
        check_kind("params", params, (Iterable, nn.Module), "parameters, named parameters or groups of them")
        check_kind("distribution", distribution, Distribution, "a Distribution")
        for name, of in (("model", model), ("module", module)):
            check_kind(name, of, (nn.Module, type(None)), "a torch.nn.Module")
        if model is not None and module is not None and model is not module:
            raise ValueError("model and module are two names of one argument: give one of them")
        hyperparams = hyperparams_of(hyperparams)
        self.hyperparams, self.distribution = hyperparams, distribution
        self._shared: dict[str, Any] = {}
        self._claims = Claims.of(world_rank, world_size, topology)
        if dist.is_available() and dist.is_initialized():
            self._claims.check_ranks(dist.get_rank(), dist.get_world_size(), "torch.distributed")
        if isinstance(params, nn.Module):
            params = params.parameters()
        models = [of for of in (model, module) if of is not None]
        self._registry = ParameterRegistry(
            Roles(hyperparams, collected(embeddings)), splits=copied(splits), models=models
        )
        self._learn_model(params)
        if lr is None:
            lr = 1e-3 if hyperparams.averaged else 1e-1
        if momentum is None:
            momentum = 0.0 if hyperparams.averaged else 0.9
        if weight_decay is None:
            weight_decay = hyperparams.weight_decay
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"precondition": True, "maximize": maximize})
        self._registry.check_given(models)
        check_shapes(shapes, [param for group in self.param_groups for param in group["params"]])

    def _learn_model(self, params: Any) -> None:
        model = native.model_behind(params)
        if model is not None and all(model is not known for known in self._registry.models):
            self._registry.models.append(model)
            if self._claims.topology is None and (replicas := native.replicas_of(model)) is not None:
                self._claims = Claims.of(self._claims.world_rank, self._claims.world_size, replicas)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own; they take part from the next step on.

        Raises:
            TypeError, ValueError: naming the option or parameter that can't be used; the optimizer is unchanged.
        """
        check_kind("param_group", param_group, dict, "a dict")
        if "params" not in param_group:
            raise ValueError(f"param_group must have 'params', got {sorted(param_group)}")
        self._follow()
        count, models = len(self.param_groups), list(self._registry.models)
        try:
            self._learn_model(param_group["params"])
            super().add_param_group(param_group)
            group = self.param_groups[-1]
            settings_of(group, self.hyperparams)
            self._registry.learn(group)
        except Exception:
            del self.param_groups[count:]
            self._registry.models = models
            raise

    # ---- a step ------------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # bookkeeping between large products: nothing to fuse
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters that are in the groups now; collective if the work is shared.

        Returns:
            The closure's loss, if there is a closure.

        Raises:
            StepRefusedError: on every rank alike, before anything changed: sparse gradients, replicas with different
                parameters or gradients, storage that can't be explained, or gradients that are not finite if
                ``nonfinite_gradient="raise"``.
            RankLostError: if other ranks did not answer; the message names the operation and the step.
            UnfinishedStepError: if an earlier step was interrupted and nothing was loaded since.
        """
        self._must_be_whole()
        loss = None
        if closure is not None:
            check_kind("closure", closure, Callable, "a function")  # type: ignore[arg-type]
            with torch.enable_grad():
                loss = closure()
        with undisturbed():
            self._step()
        return loss

    def _step(self) -> None:
        self._follow()
        self._raise_refused()
        if self._bound is None and engine().is_trial_step(self._contents()):
            return
        with during(lambda: f"before step {self._steps_taken() + 1}"):
            agreement, settings = self._agreement()
            if agreement.known:
                if agreement.verdict is Verdict.REFUSE:
                    raise StepRefusedError(agreement.refusal())
                if agreement.verdict is Verdict.SKIP:
                    self._skipped += 1
                    return
        with during(lambda: f"in step {self._unfinished}"):
            self._launch(agreement, settings)

    def _agreement(self) -> tuple[Agreement, list[dict[str, Any]]]:
        """Agree on the next action of all ranks, with the settings of all groups; bind unbound parameters first."""
        parallel = self._located()
        meet(parallel.world, "step()")
        for param in (param for group in self.param_groups for param in group["params"]):
            place_gradient(param)
        agreement, settings = self._agree(parallel, "", self._has_unbound())
        if agreement.known and agreement.verdict is Verdict.BIND:
            agreement, settings = self._agree(parallel, self._bind(parallel), unbound=False)
        return agreement, settings

    def _agree(self, parallel: ParallelGroups, error: str, unbound: bool) -> tuple[Agreement, list[dict[str, Any]]]:
        settings: list[dict[str, Any]] = []
        for number, group in enumerate(self._registry.groups):
            try:
                settings.append(settings_of(self.defaults | group, self.hyperparams))
            except (TypeError, ValueError) as raised:
                settings.append({})
                error = error or f"in group {number} {raised}"
        error = error or self._unusable(settings)
        news, present = bool(error) or unbound or not self._calm, self._present()
        agreement = Agreement(
            parallel, self._teams, present, self.hyperparams, settings, error=error, unbound=unbound, news=news
        )
        return agreement, settings

    def _located(self) -> ParallelGroups:
        return self._bound.parallel if self._bound else locate(self._claims, self._contents())

    def _contents(self) -> list[GroupContent]:
        if self._bound is None:
            self._registry.take_sharded()
        return self._registry.contents

    def _unusable(self, settings: Sequence[Mapping[str, Any]]) -> str:
        """Return the error in the input of this step, or about too many failed roots; empty if none."""
        if self._bound and not engine().placed(self._bound.parallel, self._contents()):
            return (
                f"the ranks were found before {engine().name} was started: make a new optimizer, and bind or load "
                f"after {engine().set_up}"
            )
        if any(native.is_joined(model) for model in self._registry.models):
            return "DistributedDataParallel.join() is not supported, since ranks without input do not step"
        most, last = self.hyperparams.computation.max_root_failures, self._last
        if most is not None:
            late = last is not None and not last.agreement.has("host")
            failures = last.agreement.root_failures if last and late else self.root_failures
            if failures > most:
                return (
                    f"{failures} roots could not be computed or used, more than max_root_failures={most}: take a "
                    "larger matrix_eps or limit"
                )
        return unusable(self._teams, self._present(), settings)

    # ---- binding of parameters ---------------------------------------------------------------------------------------

    def _has_unbound(self) -> bool:
        """Return whether parameters were added, unfrozen, removed or moved, or state taken away, since binding."""
        if self._bound is None:
            return True
        bound = self._group_tensors
        shown = {param: number for number, group in enumerate(self._registry.groups) for param in group["params"]}
        trainable = {param: number for param, number in shown.items() if is_trainable(param)}
        if any(param not in bound or bound[param].group != number for param, number in trainable.items()):
            return True
        if any("step" not in self.state.get(tensor, ()) or bound[tensor].moved for tensor in bound):
            return True
        return not self._registry.flat and not bound.keys() <= shown.keys()

    def _bind(self, parallel: ParallelGroups) -> str:
        """Bind all parameters anew; those bound before keep their owners and state. Return the error, if any."""
        if unknown := self._foreign_slices():
            return unknown
        shown, flat = {p for group in self._registry.groups for p in group["params"]}, self._flat_tensors
        states = {tensor: self.state.get(tensor, {}) for tensor in self._group_tensors if tensor in shown}
        owned = {
            tensor: checkpoint.own(state, flat=tensor in flat) for tensor, state in states.items() if "step" in state
        }
        try:
            self._assemble(parallel, self._pending, owned)
        except ValueError as raised:  # perhaps on this rank only; the ranks then agree on it
            return str(raised)
        return ""

    def _foreign_slices(self) -> str:
        """Return an error if an engine has filled the state of slices itself, without the factors that belong to it."""
        bound, loaded = self._group_tensors, self._pending.saved
        if self._registry.flat and any(
            checkpoint.own(state, flat=True)
            for key, state in self.state.items()
            if key not in bound and key not in loaded
        ):
            return (
                "the engine has put state into optimizer.state itself, as DeepSpeed does with a universal checkpoint, "
                "which has no factors of 3D-Shampoo: use save_checkpoint() and load_checkpoint() to change layouts, or "
                "clear optimizer.state to begin anew"
            )
        return ""

    def _assemble(
        self,
        parallel: ParallelGroups,
        pending: Pending,
        owned: Mapping[Tensor, ParamState],
    ) -> None:
        """Make teams with new stacks, and copy the pending or owned state into them.

        Raises ValueError if ranks differ or the saved state does not fit; then nothing has changed.
        """
        plans = [team.plan for team in self._teams] if owned else []
        fixed = {matrix.name: plan.owners(number) for plan in plans for number, matrix in enumerate(plan.matrices)}
        join_background_roots(self._teams)
        known = {tensor: int(state["step"]) for tensor, state in owned.items()}
        teams = assemble(self._registry.groups, self._registry, parallel, self.distribution, known, fixed)
        saved = {tensor: state for tensor, state in pending.saved.items() if state != {"step": 0}}  # not begun
        live = checkpoint.live_state(teams)
        if pending.own is not None:
            slices.check_own(teams, live, pending.own, saved)
            slices.load_own(teams, live, pending.own, saved)
        else:
            for binding in (binding for team in teams for binding in team.bindings):
                if binding.group_tensor.tensor in saved:
                    checkpoint.check_loadable(binding, saved[binding.group_tensor.tensor], self.hyperparams)
            checkpoint.load(teams, live, saved)
        checkpoint.carry(live, owned, self._teams, teams)
        self._put_state(live)
        self._bound, self._last = Bound.of(parallel, teams, self.distribution), None
        self._pending = Pending({param: state for param, state in saved.items() if param not in live})

    @undisturbed()
    @during("in bind(), which all ranks must call")
    def bind(self) -> None:
        """Find the ranks and plan now, instead of at the first step. Collective where the work is shared.

        With DeepSpeed call it after ``deepspeed.initialize``, which moves parameters.

        Raises:
            StepRefusedError: on every rank, as from :meth:`step`.
        """
        self._bind_for("bind()")

    def _bind_on_all(self, parallel: ParallelGroups) -> None:
        if any(all_gather_object(parallel.world, self._has_unbound())) and (
            why := first_error(parallel, self._bind(parallel))
        ):
            raise StepRefusedError(why)

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Owners of the blocks, for each team of ranks that store the same matrices.

        Empty before parameters are bound, at the first step or by :meth:`bind`.
        """
        return tuple(team.plan for team in self._teams)

    def state_bytes(self) -> int:
        """Count the bytes of statistics, roots and momenta kept on this rank."""
        return state_bytes(self._teams)

    def received_bytes(self) -> dict[str, int]:
        """Count the bytes received from other ranks so far, by their kind, without the agreement before each step."""
        return dict(sum((exchange.received for exchange in (self._bound.exchanges if self._bound else [])), Counter()))

    @property
    def root_failures(self) -> int:
        """Number of roots of this rank's blocks that could not be computed or used, see ``docs/update-rule.md``.

        If a root could not be computed, the previous one was kept; if it could not be used, the block was not moved or
        its statistics started anew.
        """
        join_background_roots(self._teams)
        return sum(int(batch.stack.root_failures) for team in self._teams for batch in team.batches)

    def report(self) -> Report:
        """Report what moves each parameter and why, state and traffic of this rank, and numbers of a recorded step.

        On an accelerator it waits for no step, and so does not count a skip of the last one, as :attr:`skipped_steps`.
        """
        registry, numbers = self._registry, self._watch.numbers() if self._watch else {}
        return Report.of(self._teams, registry.names, self._skipped, self.distribution, registry.absent, numbers)
