"""The part of the optimizer that takes steps and counts them: also those whose verdict only the device knows yet."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from shampoo3d.numerics.masks import only_if
from shampoo3d.runtime.agreement import Agreement, StepRefusedError, Verdict
from shampoo3d.runtime.assemble import Bound
from shampoo3d.runtime.attributes import Shared
from shampoo3d.runtime.bindings import GroupTensor, StepCounts
from shampoo3d.runtime.step import take_step
from shampoo3d.runtime.team import Team
from shampoo3d.runtime.watching import Watch
from shampoo3d.settings.hyperparams import ShampooHyperParams
from shampoo3d.settings.validation import check_integer


@dataclass(eq=False)
class Launched:
    """The last step that was launched, with what all ranks know of it alike.

    Attributes:
        steps: the group tensors that took part in it, each with the number of its steps.
        known: whether the host knows the verdict.
        idle: whether this rank only took part in what the others did, knowing that it would not count.
    """

    agreement: Agreement
    steps: StepCounts
    known: bool
    idle: bool = False


_STILL = {"lr": 0.0, "momentum": 0.0, "weight_decay": 0.0, "maximize": False}


class Stepping(Optimizer):
    """An optimizer whose steps are taken by teams; see :class:`shampoo3d.Shampoo`."""

    hyperparams: ShampooHyperParams
    _bound = Shared[Bound | None](None)
    _skipped = Shared(0)
    _unfinished = Shared(0)  # the step that is running or was interrupted; 0 if none
    _last = Shared[Launched | None](None)  # the last step since parameters were bound
    _refused = Shared[Launched | None](None)  # a step that was refused after it was launched, until that is raised
    _watch = Shared[Watch | None](None)

    @property
    def _teams(self) -> list[Team]:
        return self._bound.teams if self._bound else []

    @property
    def _group_tensors(self) -> dict[Tensor, GroupTensor]:
        return self._bound.group_tensors if self._bound else {}

    @property
    def _steps(self) -> dict[Tensor, int]:
        """Number of steps that each tensor of the groups has taken; 0 where its state was taken away."""
        return {tensor: int(self.state.get(tensor, {}).get("step", 0)) for tensor in self._group_tensors}

    def _steps_taken(self) -> int:
        """Return the largest step count of a parameter."""
        return max(self._steps.values(), default=0)

    def _present(self) -> set[GroupTensor]:
        """Find the bound group tensors that are in ``param_groups`` now."""
        bound = self._group_tensors
        return {bound[param] for group in self.param_groups for param in group["params"] if param in bound}

    def _with_gradient(self) -> set[GroupTensor]:
        return {tensor for tensor in self._present() if tensor.tensor.grad is not None}

    @property
    def _calm(self) -> bool:
        """True if nothing is new to other ranks since the last step, and none of them must know verdicts at once."""
        last = self._last
        return last is not None and not last.agreement.has("host") and last.steps.keys() == self._with_gradient()

    def _launch(self, agreement: Agreement, settings: Sequence[Mapping[str, Any]]) -> None:
        """Take a step, or launch one that counts if the agreement says so.

        Of one that will not count, as this rank knows already but the others do not, it only launches what is awaited.
        """
        bound, last, idle = self._bound, self._last, False
        assert bound is not None
        # Also of a step that is known to count, so that a run that goes on from a checkpoint rounds as before.
        mask = None if agreement.known and agreement.has("host") else agreement.mask
        if not agreement.known:
            idle = agreement.news and agreement.verdict not in (Verdict.STEP, Verdict.SKIP)
            agreement.send()
        if idle:
            assert last is not None  # others are calm, and so there was a step like theirs
            steps, settings = {tensor: t + 1 for tensor, t in last.steps.items()}, [_STILL] * len(settings)
        else:
            steps = {tensor: self._count(tensor) for tensor in self._with_gradient()}
        self._unfinished = max(steps.values(), default=0)
        self._last = Launched(agreement, steps, agreement.known, idle)
        watch = nullcontext() if self._watch is None or idle else self._watch.over(bound.teams, bound.exchanges, steps)
        with only_if(mask), _idling(steps if idle else ()), watch:
            take_step(bound.teams, bound.exchanges, settings, self.hyperparams, steps)
        self._unfinished = 0

    def _count(self, group_tensor: GroupTensor) -> int:
        self.state[group_tensor.tensor]["step"] += 1
        return int(self.state[group_tensor.tensor]["step"])

    def _settle(self) -> None:
        """Learn of the last step whether it counted, if that was not known when it was launched."""
        last = self._last
        if last is None or last.known:
            return
        last.known, verdict = True, last.agreement.verdict
        if verdict is Verdict.STEP:
            return
        last.steps = {tensor: t - 1 for tensor, t in last.steps.items()}
        for tensor, t in last.steps.items():
            if not last.idle and "step" in self.state.get(tensor.tensor, ()):
                self.state[tensor.tensor]["step"] = t
        self._skipped += verdict is not Verdict.REFUSE
        self._refused = last if verdict is Verdict.REFUSE else None
        self._last = None if verdict is Verdict.BIND else last

    def _raise_refused(self) -> None:
        """Raise the error of a step that was refused after it was launched."""
        if (refused := self._refused) is not None:
            self._refused = None
            number = 1 + max(refused.steps.values(), default=0)
            raise StepRefusedError(f"step {number} was refused: {refused.agreement.refusal()}")

    def _forget(self) -> None:
        """Take the state that was loaded for that after the last step, whatever became of it."""
        self._unfinished, self._refused, steps = 0, None, self._steps
        if self._last is not None:
            self._last.steps = {tensor: steps[tensor.tensor] for tensor in self._last.steps}

    def watch(self, every: int = 10) -> None:
        """Record every so-many-th step from now on, for ``report().scalars()``; ``every=0`` ends it.

        It changes no result. On an accelerator nothing waits for it. The recordings are not part of the state.
        """
        check_integer("every", every, least=0)
        self._watch = Watch(every) if every else None

    @property
    def skipped_steps(self) -> int:
        """Number of steps that were skipped."""
        self._settle()
        return self._skipped

    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None:
        self._settle()
        self._skipped = count


@contextmanager
def _idling(group_tensors: Iterable[GroupTensor]) -> Iterator[None]:
    """Let group tensors have zeros in the place of gradients, and of values that do not fit."""
    for tensor in group_tensors:
        tensor.idle = True
    try:
        yield
    finally:
        for tensor in group_tensors:
            tensor.idle = False
