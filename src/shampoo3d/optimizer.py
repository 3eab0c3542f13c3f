"""Shampoo as a ``torch.optim`` optimizer that shares its work over the ranks that it finds."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from shampoo3d.assemble import Embeddings, Facts, assemble, disagreement, is_trainable, locate, unwrapped
from shampoo3d.checkpoint import ParamState, check_loadable, complete_state, live_state, load, loaded_groups
from shampoo3d.engines import deepspeed, native
from shampoo3d.exchange import StepRefusedError, Verdict, agree, deliver, graft_norms
from shampoo3d.grafting import graft_scale
from shampoo3d.holdings import Binding, Replicas, Unit, state_bytes
from shampoo3d.hyperparams import ShampooHyperParams, check_group
from shampoo3d.plan import Plan
from shampoo3d.preconditioner import Step, squared_norms
from shampoo3d.report import Report
from shampoo3d.topology import Claims, Mesh, Topology


class Shampoo(Optimizer):
    """Shampoo with grafting and momentum; the update rule is stated in ``docs/update-rule.md``.

    Used like any PyTorch optimizer. Where ``torch.distributed`` runs, the blocks of all matrices are shared over the
    ranks that hold the same parameters (found from DeepSpeed, from ``topology``, or all ranks): each rank keeps the
    state of the blocks that it owns and computes only those, and every rank gets every update.

    Args:
        params: parameters, named parameters or groups. A group may set lr, momentum, weight_decay, maximize, and
            ``precondition=False`` to leave its parameters without preconditioner.
        lr: learning rate.
        momentum: of both directions; Nesterov's if ``hyperparams.nesterov``.
        hyperparams: everything else.
        maximize: ascend instead of descend.
        model: the module that the parameters belong to, for their names, embeddings and tied layers; found by itself
            when ``params`` is ``model.parameters()`` or ``model.named_parameters()``.
        embeddings: names or parameters of embeddings, or a function of name and parameter, for
            ``hyperparams.ignore_embedding_layer``; embedding modules of the model are found by themselves.
        world_rank, world_size, topology, shapes: what is known of the ranks (``topology`` is DeepSpeed's, as from
            ``model.topology()``) and the trainable parameters' shapes. All are found out if not given.

    Raises:
        TypeError, ValueError: naming the argument, its value and its bound; also where an argument contradicts what
            is found.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-1,
        momentum: float = 0.9,
        hyperparams: ShampooHyperParams = ShampooHyperParams(),
        *,
        maximize: bool = False,
        model: nn.Module | None = None,
        embeddings: Embeddings | None = None,
        world_rank: int | None = None,
        world_size: int | None = None,
        topology: Any = None,
        shapes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if not isinstance(hyperparams, ShampooHyperParams):
            raise TypeError(f"hyperparams must be a ShampooHyperParams, got {type(hyperparams).__name__}")
        self.hyperparams = hyperparams
        self.skipped_steps = 0
        self._claims = Claims(world_rank, world_size, None if topology is None else Topology.of(topology))
        if dist.is_available() and dist.is_initialized():
            self._claims.check_ranks(dist.get_rank(), dist.get_world_size(), "torch.distributed")
        self._facts = Facts(hyperparams, models=[] if model is None else [model])
        self._embeddings = embeddings if embeddings is None or callable(embeddings) else tuple(embeddings)
        self._mesh: Mesh | None = None
        self._replicas: list[Replicas] = []
        self._saved: dict[Tensor, ParamState] = {}  # loaded state that waits until its parameter is bound
        self._learn_model(params)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": hyperparams.weight_decay}
        super().__init__(params, defaults | {"precondition": True, "maximize": maximize})
        self._facts.check_embeddings(self._embeddings)
        self._check_shapes(shapes)

    def _learn_model(self, params: Any) -> None:
        found = native.model_behind(params)
        if found is not None and all(found is not known for known in self._facts.models):
            self._facts.models.append(found)

    def _check_shapes(self, shapes: Sequence[Sequence[int]] | None) -> None:
        if shapes is None:
            return
        found = [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.requires_grad]
        given = [tuple(shape) for shape in shapes]
        if given != found:
            place = next((i for i, (a, b) in enumerate(zip(given, found, strict=False)) if a != b), None)
            detail = "" if place is None else f": number {place} is {given[place]}, the parameter's is {found[place]}"
            raise ValueError(f"shapes has {len(given)} entries for {len(found)} trainable parameters{detail}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own; they take part from the next step on.

        Raises:
            TypeError, ValueError: naming the option or parameter that can't be used; the optimizer is unchanged.
        """
        self._learn_model(param_group.get("params"))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            deepspeed.refuse_zero(group["params"])
            self._facts.learn(len(self.param_groups) - 1, group["params"], group.get("param_names"), self._embeddings)
        except Exception:
            self.param_groups.pop()
            raise

    # ---- a step ------------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; collective where the work is shared.

        Returns:
            The closure's loss, if there is a closure.

        Raises:
            StepRefusedError: on every rank alike, before anything changed: sparse gradients, replicas with different
                parameters or gradients, or gradients that are not finite if ``nonfinite_gradient="raise"``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._mesh is None and any(self._is_trial(group["params"]) for group in self.param_groups):
            return loss
        mesh = self._mesh or locate(self._claims)
        verdict = self._agree(mesh, self._unusable(), self._has_unbound())
        if verdict is Verdict.BIND:
            verdict = self._agree(mesh, self._bind(mesh) or self._unusable(), unbound=False)
        if verdict is Verdict.SKIP:
            self.skipped_steps += 1
            return loss
        for shared in self._replicas:
            self._step(mesh, shared)
        return loss

    def _agree(self, mesh: Mesh, complaint: str, unbound: bool) -> Verdict:
        return agree(mesh, self._replicas, self.hyperparams, self.param_groups, complaint, unbound)

    def _step(self, mesh: Mesh, shared: Replicas) -> None:
        hp = self.hyperparams
        active = [binding for binding in shared.bindings if binding.param.grad is not None]
        if not active:
            return
        steps = {binding.param: self._count(binding.param) for binding in active}
        norms = torch.zeros(len(shared.local), 2, dtype=torch.float64, device=active[0].param.device)
        units = list(shared.units(steps, hp))
        for unit in units:
            self._directions(unit, norms)
        scale = dict(zip(active, graft_scale(graft_norms(mesh, shared, norms, active), hp).unbind(), strict=True))
        updated: dict[int, Tensor] = {}
        for unit in units:
            updated |= zip(unit.slots, self._updated(unit, scale), strict=True)
        deliver(mesh.rank, shared, updated, set(active))

    def _is_trial(self, params: Sequence[Tensor]) -> bool:
        """Whether an engine's wrapper is trying the optimizer out with zero gradients, which must change nothing."""
        trial = deepspeed.is_trial_step(params, self._facts.names)
        if trial:
            unwrapped(self.param_groups, self._facts)  # refuses a wrapper that it does not know at once
        return trial

    def _count(self, param: Tensor) -> int:
        self.state[param]["step"] += 1
        return int(self.state[param]["step"])

    def _directions(self, unit: Unit, norms: Tensor) -> None:
        """S and D of a unit, and the squared norms of its blocks."""
        stack, rows = unit.batch.stack, unit.rows
        G = unit.batch.gather(unit.members, gradient=True)
        if self.param_groups[unit.batch.group]["maximize"]:
            G = -G
        stack.accumulate_graft(G, rows)
        if unit.phase.accumulate:
            stack.accumulate(G, rows)
        if unit.phase.refresh:
            stack.refresh_roots(rows)
        unit.S = stack.precondition(G, rows) if unit.phase.started else G
        unit.D = stack.direction(G, rows)
        norms[unit.slots] = squared_norms(unit.S, unit.D).to(norms.device)

    def _updated(self, unit: Unit, scale: Mapping[Binding, Tensor]) -> Iterable[Tensor]:
        """The new weights of a unit's blocks."""
        stack, group = unit.batch.stack, self.param_groups[unit.batch.group]
        factor = torch.stack([scale[member.binding] for member in unit.members]).to(stack.device, stack.dtype)
        W = unit.batch.gather(unit.members, gradient=False)
        S = unit.S * factor.view(-1, *[1] * len(stack.shape))
        step = Step(group["lr"], group["momentum"], group["weight_decay"], unit.phase.started)
        return stack.update(W, S, unit.D, unit.rows, step).unbind()

    def _unusable(self) -> str:
        """What this step is given that it cannot use; empty if nothing."""
        for binding in self._bindings():
            grad = binding.param.grad
            if grad is not None and grad.layout != torch.strided:
                return f"the gradient of {binding.matrix.name!r} is sparse, which Shampoo does not support"
            if self.param_groups[binding.group]["precondition"] != binding.precondition:
                return f"precondition of group {binding.group} was changed after its first step; make a new optimizer"
        return ""

    # ---- who holds and owns what -------------------------------------------------------------------------------------

    def _has_unbound(self) -> bool:
        """Whether a parameter has joined, has been unfrozen or has gone since parameters were bound."""
        groups = enumerate(self.param_groups)
        wanted = {p: number for number, group in groups for p in group["params"] if is_trainable(p)}
        bound = {binding.param: binding.group for binding in self._bindings()}
        return self._mesh is None or not (wanted.items() <= bound.items() and bound.keys() <= self._present())

    def _present(self) -> set[Tensor]:
        return {param for group in self.param_groups for param in group["params"]}

    def _bind(self, mesh: Mesh) -> str:
        """Bind all parameters anew; those bound before keep state and owners. Returns why it can't be done, if so."""
        present = self._present()
        bound = (binding.param for binding in self._bindings())
        owned = {param: self.state[param] for param in bound if param in present}
        try:
            return self._assemble(mesh, self._saved, owned)
        except ValueError as error:  # perhaps on this rank only: all are told of it
            return str(error)

    def _assemble(self, mesh: Mesh, saved: Mapping[Tensor, ParamState], owned: Mapping[Tensor, ParamState]) -> str:
        """Make replicas with new stacks, with the state in them that was saved or is owned already.

        Returns how replicas differ; if they do, or if the saved state does not fit (ValueError), nothing has changed.
        """
        fixed = {b.id: b.owner for shared in self._replicas for b in shared.plan.blocks} if owned else {}
        behind = unwrapped(self.param_groups, self._facts)
        taking_part = {param for param in self._present() if is_trainable(param) or param in owned}
        replicas = assemble(self.param_groups, behind, self._facts, mesh, taking_part, fixed)
        complaint = disagreement(replicas, self.hyperparams)
        if complaint:
            return complaint
        saved = {param: state for param, state in saved.items() if state != {"step": 0}}  # those have not begun
        for binding in (binding for shared in replicas for binding in shared.bindings):
            if binding.param in saved:
                check_loadable(binding, saved[binding.param], self.hyperparams)
        live = live_state(replicas)
        load(replicas, live, {**saved, **owned})
        self._mesh, self._replicas = mesh, replicas
        self._saved = {param: state for param, state in saved.items() if param not in live}
        self.state.clear()
        self.state.update(live)
        return ""

    def _bindings(self) -> list[Binding]:
        return [binding for shared in self._replicas for binding in shared.bindings]

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Who owns which block, for each set of ranks that store the same parameters; empty before the first step."""
        return tuple(shared.plan for shared in self._replicas)

    def state_bytes(self) -> int:
        """Bytes of statistics, roots and momenta kept on this rank."""
        return state_bytes(batch for shared in self._replicas for batch in shared.batches)

    @property
    def root_failures(self) -> int:
        """How many roots of this rank's blocks could not be computed, so that the previous one was kept."""
        return sum(int(batch.stack.root_failures) for shared in self._replicas for batch in shared.batches)

    def report(self) -> Report:
        """Which path each parameter takes, and why."""
        return Report.of(self._replicas, self._facts.names, self.skipped_steps)

    # ---- state -------------------------------------------------------------------------------------------------------

    def _complete_state(self) -> dict[Tensor, ParamState]:
        if self._mesh is None:
            return dict(self._saved)
        begun = complete_state(self._mesh.rank, self._replicas, self.state, self.hyperparams) | self._saved
        return {param: begun.get(param, {"step": 0}) for group in self.param_groups for param in group["params"]}

    def state_dict(self) -> dict[str, Any]:
        """The complete state, whoever owns it, as one process would have it; in copies.

        Collective where the work is shared: every rank must call it. It loads into any number of ranks.
        """
        owned, self.state = self.state, defaultdict(dict, self._complete_state())
        try:
            return super().state_dict()
        finally:
            self.state = owned

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state that :meth:`state_dict` made, on any number of ranks; each takes the blocks that it owns.

        Before the first step of a distributed run the ranks are not known yet; the state is then checked at that step.

        Raises:
            ValueError: naming the group, parameter or block that does not fit; the optimizer is unchanged.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        groups = loaded_groups(self.param_groups, state_dict["param_groups"])
        numbers = {
            number: param
            for old, now in zip(state_dict["param_groups"], groups, strict=True)
            for number, param in zip(old["params"], now["params"], strict=True)
        }
        saved = {numbers[n]: param_state for n, param_state in state_dict["state"].items()}
        if missing := [self._facts.names.get(param, "") for param in numbers.values() if saved and param not in saved]:
            count = f"{len(missing)} of {len(numbers)}"
            raise ValueError(f"the loaded state has nothing for {count} parameters: {missing[:5]}")
        distributed = dist.is_available() and dist.is_initialized()
        if self._mesh is None and distributed:
            self._saved = saved
        elif complaint := self._assemble(self._mesh or locate(self._claims), saved, {}):
            raise StepRefusedError(complaint)
        self.param_groups[:] = groups
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which bind their parameters anew at their first step."""
        facts = replace(self._facts, models=[])
        fresh = {"state": defaultdict(dict), "_facts": facts, "_mesh": None, "_replicas": []}
        kept = ("defaults", "param_groups", "hyperparams", "skipped_steps", "_claims", "_embeddings")
        return {name: getattr(self, name) for name in kept} | fresh | {"_saved": self._complete_state()}
