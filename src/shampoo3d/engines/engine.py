"""Interface between the optimizer and the framework that it runs in: a new framework is a new :class:`Engine`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from shampoo3d.distributed.topology import Claims, ParallelGroups
from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.shards import Ranks, Shard


@dataclass(frozen=True, eq=False)
class LocalShard:
    """The part of one parameter that this rank stores.

    Attributes:
        original: the model's parameter; ``tensor``: the tensor that is updated, a member of group number ``group``.
        offset: where the shard begins in the tensor's storage.
        shape: of the logical matrix; ``shard``: the part of it on this rank.
        holders: the ranks that together store this matrix, or this tensor-parallel shard of it.
        team: these and, for a weight that is tied across pipeline stages, those of the other stages.
        sharded: True if each element is stored by one of the holders only.
        divided: the axis that tensor parallelism divides.
        meets_shards: True if the ranks of the tensor-parallel group store the other shards of it, or replicas.
    """

    original: Tensor
    tensor: Tensor
    group: int
    offset: int
    shape: Shape
    shard: Shard
    holders: Ranks
    team: Ranks
    sharded: bool = False
    divided: int | None = None
    meets_shards: bool = False


@dataclass(frozen=True)
class GroupContent:
    """A parameter group: its current ``tensors``, the model's parameters that it was made with, and their ``names``."""

    number: int
    tensors: Sequence[Tensor]
    originals: Sequence[Tensor]
    names: Mapping[Tensor, str]


class Engine(Protocol):
    """A framework, which may have formed groups of ranks and moved or divided parameters."""

    name: str
    set_up: str
    """The call that must precede binding: after it, ranks and parameters no longer move."""

    def is_running(self) -> bool:
        """Return whether it has been started in this process."""
        ...

    def locate(self, claims: Claims, tensors: Sequence[Tensor]) -> ParallelGroups:
        """Find this process's place among the ranks that train these tensors, by the user's claims where it can."""
        ...

    def placed(self, parallel: ParallelGroups, groups: Sequence[GroupContent]) -> bool:
        """Return whether these groups of ranks are right for these parameter groups under this engine."""
        ...

    def tied_holders(self, model: nn.Module) -> dict[Tensor, Ranks]:
        """Find the ranks that hold each parameter that is tied across pipeline stages."""
        ...

    def is_flat(self, group: GroupContent) -> bool:
        """Return whether the group holds flat slices instead of its parameters."""
        ...

    def local_shards(
        self, group: GroupContent, parallel: ParallelGroups, tied: Mapping[Tensor, Ranks]
    ) -> list[LocalShard]:
        """Read this rank's shards of the parameters of a group; frozen ones of flat groups are left out.

        Raises:
            ValueError, RuntimeError: naming the parameter whose storage can't be explained.
        """
        ...

    def untold_tie(self, param: Tensor) -> bool:
        """Return whether the parameter is tied to other pipeline stages, which only the model names."""
        ...

    def is_trial_step(self, groups: Sequence[GroupContent]) -> bool:
        """Return whether this is a wrapper's trial step at set-up, which must change nothing.

        Raises:
            RuntimeError: if the wrapper is one whose tensors can't be explained.
        """
        ...

    def shape_of(self, param: Tensor) -> Shape:
        """Return the shape of a model's parameter, even if its values are stored elsewhere."""
        ...

    def model_storage(self, param: Tensor, shard: Shard) -> Iterator[tuple[Tensor, Shard]]:
        """Yield the flat tensors that hold the model's own values of ``shard``, each with the shard it contains."""
        ...
