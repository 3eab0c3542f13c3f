"""Agreement of all ranks before anything changes, so that they step, skip, bind or raise together."""

import enum
import hashlib
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo3d.distributed.collectives import all_gather, communicating_device, first_error
from shampoo3d.distributed.errors import awaiting
from shampoo3d.distributed.topology import ParallelGroups
from shampoo3d.numerics.background import Late, upload
from shampoo3d.numerics.masks import Mask
from shampoo3d.runtime.bindings import GroupTensor, index, state_dtype
from shampoo3d.runtime.team import Team
from shampoo3d.settings.hyperparams import ShampooHyperParams


class StepRefusedError(RuntimeError):
    """Error in the input of this or another rank; raised on all ranks, and nothing was changed."""


class Verdict(enum.Enum):
    """The next action of all ranks."""

    STEP = enum.auto()
    SKIP = enum.auto()
    BIND = enum.auto()
    REFUSE = enum.auto()


VOTES = ("nonfinite", "refused", "unbound", "calm", "host")
"""Each is true if any rank of the world votes so: a gradient is not finite; something is wrong; there are parameters to
be bound; this rank has nothing to tell that others do not know already; its host must know the verdict."""


class Agreement:
    """Votes of all ranks on this step, not this step, or to bind parameters first; collective where it is made.

    One all-gather of four numbers in each team and, where there are other ranks too, one all-reduce of the votes in the
    world. They are formed where the gradients are. On an accelerator calm ranks do not read them: they launch the step
    under the :attr:`mask`, which obeys them, and learn of them at the next one. If all ranks have news, all read them.

    Attributes:
        news: whether this rank is not calm.
    """

    def __init__(
        self,
        parallel: ParallelGroups,
        teams: Sequence[Team],
        present: Collection[GroupTensor],
        hp: ShampooHyperParams,
        groups: Sequence[Mapping[str, Any]],
        *,
        error: str,
        unbound: bool,
        news: bool,
    ) -> None:
        """Ask.

        Args:
            present: the group tensors that this call of ``step()`` is about.
            groups: the parameter groups, whose settings must be the same in a team.
            error: the error in the input of this rank; empty if none.
            unbound: whether this rank has parameters that are not bound yet.
            news: whether it has an error, unbound parameters, or other gradients than at the step before.
        """
        self.news, self._parallel, self._hp, self._error = news, parallel, hp, error
        self._shares = [_Share(team, present, hp, groups) for team in teams]
        votes = upload([0, bool(error), unbound, not news, not self._on_device], torch.int32, self._device)
        for vote in (vote for share in self._shares for vote in share.votes):
            votes[: len(vote)] |= vote.to(votes.device)
        if parallel.world.size > 1:
            with awaiting("the agreement", parallel.world.ranks):
                dist.all_reduce(votes, dist.ReduceOp.MAX, group=parallel.world.handle)
        if failures := self._failed_roots():
            votes = torch.cat([votes, torch.stack(failures).sum().to(votes).view(1)])
        self._votes: Tensor | Late = votes
        self._read: list[int] | None = None

    @property
    def _device(self) -> torch.device:
        """The device of the votes: the host's, unless others take part or there are gradients to look at."""
        devices = [share.team.device for share in self._shares]
        here = devices[0] if devices else torch.device("cpu")  # a rank may have no parameters
        if self._parallel.world.size > 1:
            return communicating_device(self._parallel.world, here)
        return here if self._hp.nonfinite_gradient != "ignore" else torch.device("cpu")

    @property
    def _on_device(self) -> bool:
        """True if all parameters are on the accelerator where the votes are, so that it can obey them itself."""
        device = self._device
        kinds = (tensor.kind for share in self._shares for tensor in share.team.group_tensors)
        return all(here == device and here.type != "cpu" for _, here in kinds)

    def _failed_roots(self) -> list[Tensor]:
        """Return the numbers of roots that failed on this rank before, if they are limited and not on the host."""
        if self._hp.computation.max_root_failures is None or not self._on_device:
            return []
        return [batch.stack.root_failures for share in self._shares for batch in share.team.batches]

    @cached_property
    def mask(self) -> Mask:
        """The mask of a step that counts only if the verdict is STEP."""
        assert isinstance(self._votes, Tensor)
        return Mask(self._votes[:3].any())

    def send(self) -> None:
        """Start to copy the votes to the host, which reads them at the next step."""
        if isinstance(self._votes, Tensor) and self._votes.device.type != "cpu":
            self._votes = Late(self._votes)

    def _read_votes(self) -> list[int]:
        if self._read is None:
            self._read = self._votes.tolist()
        return self._read

    def has(self, vote: str) -> bool:
        """Return whether any rank has voted so; the host waits for the votes."""
        return bool(self._read_votes()[VOTES.index(vote)])

    @property
    def known(self) -> bool:
        """True if all ranks read the votes at once; else none does that has no news."""
        return self.news and not self.has("calm")

    @property
    def root_failures(self) -> int:
        """Number of roots that failed on this rank before this step, if they are limited; the host waits for it."""
        return sum(self._read_votes()[len(VOTES) :])

    @property
    def verdict(self) -> Verdict:
        """The same on all ranks; the host waits for the votes."""
        if self.has("refused") or (self.has("nonfinite") and self._hp.nonfinite_gradient == "raise"):
            return Verdict.REFUSE
        if self.has("unbound"):
            return Verdict.BIND
        return Verdict.SKIP if self.has("nonfinite") else Verdict.STEP

    def refusal(self) -> str:
        """Return why the step was refused. Collective in the world; the host reads from the device."""
        error, differences = self._error, ""
        for share in self._shares:
            if self._hp.nonfinite_gradient == "raise":
                error = error or share.too_large()
            differences = share.differences() or differences
        # An error of one rank often explains why it differs from others.
        why = first_error(self._parallel, error) or first_error(self._parallel, differences)
        return f"{why}; no parameter and no state was changed"


class _Share:
    """Part of an agreement that is about one team: the health of its gradients, and how its ranks differ.

    Attributes:
        votes: parts of the first two votes, on the device.
    """

    def __init__(
        self,
        team: Team,
        present: Collection[GroupTensor],
        hp: ShampooHyperParams,
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        self.team, self._hp = team, hp
        self._names = {tensor: names for tensor, names in team.names.items() if tensor in present}
        self._norms = [] if hp.nonfinite_gradient == "ignore" else gradient_norms(list(self._names))
        asked = self._norms or team.group.size > 1  # else nothing is known on the device alone
        self._device = communicating_device(team.group, team.device) if asked else torch.device("cpu")
        largest = [(norms.max(), self._most(tensors[0])) for tensors, norms in self._norms]
        self.votes = [(norm <= most).logical_not().view(1) for norm, most in largest]  # NaN is not
        self._table: Tensor | None = None
        if team.group.size > 1 and self._names:
            # Each stage may clip a tied weight by its own norm, so that copies on two stages differ by a factor.
            # Perhaps too large on this replica only: NaN compares with nothing, and the vote of the world decides.
            compared = [torch.where(norm <= most, norm, math.nan).to(self._device) for norm, most in largest]
            self._largest = upload([0.0], torch.float64, self._device)
            if compared and not team.tied:
                self._largest = torch.stack(compared).max().view(1)
            self._gather(groups)
            self.votes.append(self._differ())

    def _most(self, tensor: GroupTensor) -> float:
        return largest_norm(state_dtype(tensor.tensor.dtype), self._hp)

    def too_large(self) -> str:
        """Return the error if the norm of a gradient is too large; the host reads from the device."""
        for tensors, norms in self._norms:
            for tensor, norm in zip(tensors, norms.tolist(), strict=True):
                if not norm <= self._most(tensor):
                    return (
                        f"the gradient of {self._names[tensor][0]!r} has a norm of {norm:.3g}: it must be finite and "
                        f"at most {self._most(tensor):.3g}, so that no sum of its squares can overflow"
                    )
        return ""

    def _gather(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Gather of all ranks the number of gradients, which they are, their largest norm, and the settings."""
        present, self._absent = (
            [name for tensor, names in self._names.items() if (tensor.tensor.grad is None) is none for name in names]
            for none in (False, True)
        )
        options = ("lr", "momentum", "weight_decay", "maximize")
        self._settings = sorted({_shown({name: groups[of.group].get(name) for name in options}) for of in self._names})
        numbers = [len(present), _fingerprint(present), 0.0, _fingerprint(self._settings)]
        mine = upload(numbers, torch.float64, self._device)
        mine[2:3] = self._largest
        ranks = self.team.group.ranks
        table = torch.empty(len(ranks) * len(mine), dtype=torch.float64, device=self._device)
        with awaiting("the agreement", ranks):
            all_gather(table, mine, group=self.team.group.handle)
        self._table = table.view(len(ranks), -1)

    def _differ(self) -> Tensor:
        """Return, after no vote for the first question, whether :meth:`differences` will find any; on the device."""
        assert self._table is not None
        _, gradients, norms, settings = self._table.unbind(1)
        replicas = [place for place, rank in enumerate(self.team.group.ranks) if rank in self.team.exact_replicas]
        deviations = (norms[index(replicas, norms.device)] - self._largest).abs()
        others = torch.stack([settings != settings[0], gradients != gradients[0]]).any()
        differ = others | (deviations > _TOLERANCE * self._largest.abs()).any()
        return torch.stack([torch.zeros_like(differ), differ])

    def differences(self) -> str:
        """Describe how ranks differ in settings, in which group tensors have gradients, or in the largest norm."""
        if self._table is None:
            return ""
        team, ranks = self.team, self.team.group.ranks
        rows, largest = dict(zip(ranks, self._table.tolist(), strict=True)), float(self._largest)
        first = rows[ranks[0]]
        for other, (count, fingerprint, norm, options) in rows.items():
            if options != first[3]:
                return (
                    f"ranks {ranks[0]} and {other} differ in lr, momentum, weight_decay or maximize (rank {team.rank} "
                    f"has {', '.join(self._settings)}); schedulers must do the same on all ranks"
                )
            if fingerprint != first[1]:
                return (
                    f"rank {ranks[0]} has gradients for {first[0]:.0f} and rank {other} for {count:.0f} of "
                    f"{sum(map(len, self._names.values()))} parameters, not the same ones; ranks of one group must "
                    "have gradients for the same parameters "
                    f"(on rank {team.rank} these have none: {self._absent[:5]})"
                )
            if other in team.exact_replicas and abs(norm - largest) > _TOLERANCE * abs(largest):
                return (
                    f"the largest norm of a gradient is {largest:.6g} on rank {team.rank} and {norm:.6g} on rank "
                    f"{other}; replicas must have the same, averaged gradients (DeepSpeed and DistributedDataParallel "
                    "average them in backward)"
                )
        return ""


_TOLERANCE = 1e-3
"""The relative difference of norms from which on gradients of replicas were not averaged."""


def unusable(teams: Sequence[Team], present: Collection[GroupTensor], groups: Sequence[Mapping[str, Any]]) -> str:
    """Return the error if a parameter, gradient or setting of this rank can no longer be used; empty if none."""
    for team in teams:
        for tensor, names in ((tensor, names) for tensor, names in team.names.items() if tensor in present):
            if (shape := tuple(tensor.stored.shape)) != tensor.shape:
                return (
                    f"{names[0]!r} has shape {shape} and had {tuple(tensor.shape)} at its first step: put a "
                    "new parameter into the group in its place, which then begins anew"
                )
            if why := tensor.misfit:
                return f"the gradient of {names[0]!r} {why}"
            if groups[tensor.group]["precondition"] != tensor.precondition:
                return f"precondition of group {tensor.group} was changed after its first step; make a new optimizer"
    return ""


def largest_norm(dtype: torch.dtype, hp: ShampooHyperParams) -> float:
    """Return the largest norm of a gradient for which a sum of squares of any length is finite in this state dtype.

    A sum that is 4 / eps times as large as the next term no longer grows. The factor 512 leaves room for as many ranks
    that store a shard of one matrix each.
    """
    c = hp.computation
    if "bfloat16" in (c.products, c.root_storage, c.momentum_storage):
        dtype = torch.float32  # which has the same range
    kind = torch.finfo(dtype)
    return math.sqrt(kind.max * kind.eps / 4 / 512)


def gradient_norms(group_tensors: Sequence[GroupTensor]) -> list[tuple[list[GroupTensor], Tensor]]:
    """Compute the norm of each gradient, not finite if its squares are not: a float64 tensor for each device and dtype.

    They stay on their device.
    """
    kinds: defaultdict[tuple[torch.device, torch.dtype], dict[GroupTensor, Tensor]] = defaultdict(dict)
    for group_tensor in group_tensors:
        gradient = group_tensor.gradient if group_tensor.has_dense_gradient else None
        if gradient is not None and gradient.numel():
            kinds[gradient.device, state_dtype(gradient.dtype)][group_tensor] = gradient
    return [
        ([*alike], torch.stack(torch._foreach_norm([*alike.values()], 2, dtype=dtype)).double())
        for (_, dtype), alike in kinds.items()
    ]


def _shown(settings: Mapping[str, Any]) -> str:
    """Describe settings; a learning rate on an accelerator is not read."""
    return str({name: "a tensor" if isinstance(value, Tensor) else value for name, value in settings.items()})


def _fingerprint(texts: Sequence[str]) -> int:
    """Hash the texts to a number of 48 bits, exact in float64."""
    return int.from_bytes(hashlib.sha256("\n".join(texts).encode()).digest()[:6], "big")
