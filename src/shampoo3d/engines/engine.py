"""The questions that the optimizer asks of the framework it runs in. A new framework is a new answer to them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from shampoo3d.distributed.topology import ParallelGroups, Topology
from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.layout import Shard

Ranks = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LocalShard:
    """The part of one parameter that this rank stores.

    Attributes:
        original: the model's parameter; ``tensor``: what the optimizer updates, a member of group number ``group``.
        offset: where the shard begins in the tensor's storage.
        shape: of the logical matrix; ``shard``: what of it is here.
        holders: the ranks that store all of this matrix, or of this tensor-parallel shard of it, between them.
        team: these and, of a weight that is tied across pipeline stages, those of the other stages.
        sharded: each element is stored by one of the holders only.
        divided: the axis that tensor parallelism divides.
        meets_shards: the ranks of the tensor-parallel group store the rest of it, or replicas.
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
    """A parameter group: its ``tensors`` now, and the model's parameters that it was made with, by ``names``."""

    number: int
    tensors: Sequence[Tensor]
    originals: Sequence[Tensor]
    names: Mapping[Tensor, str]


class Engine(Protocol):
    """A framework that may have changed where ranks and parameters are."""

    name: str
    set_up: str
    """The call after which its ranks and parameters are where they will be."""

    def is_running(self) -> bool:
        """Return whether this process is under its control."""
        ...

    def locate(self, topology: Topology | None) -> ParallelGroups:
        """Find this process's place among the ranks; ``topology`` is what the user says of them."""
        ...

    def placed(self, parallel: ParallelGroups) -> bool:
        """Return whether these groups are still right, now that this engine is in charge."""
        ...

    def tied_holders(self, model: nn.Module) -> dict[Tensor, Ranks]:
        """Find the ranks that hold each parameter that is tied across pipeline stages."""
        ...

    def is_flat(self, originals: Sequence[Tensor]) -> bool:
        """Return whether flat slices stand in the group in the place of these parameters."""
        ...

    def local_shards(
        self, group: GroupContent, parallel: ParallelGroups, tied: Mapping[Tensor, Ranks]
    ) -> list[LocalShard]:
        """Read what this rank stores of the parameters of a group; frozen ones of flat groups are left out.

        Raises:
            ValueError, RuntimeError: naming the parameter whose storage can't be explained.
        """
        ...

    def untold_tie(self, param: Tensor) -> bool:
        """Return whether the parameter is tied to other pipeline stages, of which only the model tells."""
        ...

    def is_trial_step(self, groups: Sequence[GroupContent]) -> bool:
        """Return whether a wrapper tries the optimizer out at set-up, with a step that must change nothing.

        Raises:
            RuntimeError: if the wrapper is one whose tensors can't be explained.
        """
        ...

    def shape_of(self, param: Tensor) -> Shape:
        """Return the shape of a model's parameter, also where its values are elsewhere."""
        ...

    def model_storage(self, param: Tensor, shard: Shard) -> Iterator[tuple[Tensor, Shard]]:
        """Yield the flat tensors in which the model has its own values of ``shard``, each with what of them it has."""
        ...
