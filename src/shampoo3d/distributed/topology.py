"""Position of this process among the ranks: the grid pipe x data x model and its process groups."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shampoo3d.distributed.errors import awaiting
from shampoo3d.settings.validation import check_integer


@dataclass(frozen=True)
class Group:
    """Global ranks that communicate; ``handle`` is None if there is no other rank."""

    ranks: tuple[int, ...]
    handle: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return len(self.ranks)


AXES = {
    "pipe": {"pipe", "pp", "pipeline"},
    "data": {"data", "dp", "ddp", "fsdp", "hsdp", "replicate", "shard", "dp_replicate", "dp_shard", "dp_cp", "cp"},
    "model": {"model", "tp", "tensor"},
}
"""Names that the axes of a ``DeviceMesh`` may have. Ranks along a context-parallel axis hold the same parameters."""


@dataclass(frozen=True)
class Topology:
    """A grid of ranks with named axes, the last varying fastest, as in DeepSpeed's ``ProcessTopology``.

    ``ranks`` are those of the grid in this order, if they are not all ranks from 0 on.
    """

    axes: tuple[str, ...]
    dims: tuple[int, ...]
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, value in (("axes", self.axes), ("dims", self.dims)):
            if not isinstance(value, tuple):
                raise TypeError(f"{name} of a topology must be a tuple, got {value!r} of type {type(value).__name__}")
        if not all(isinstance(axis, str) for axis in self.axes) or len(set(self.axes)) < len(self.axes):
            raise ValueError(f"axes of a topology must be different names, got {self.axes!r}")
        if len(self.axes) != len(self.dims):
            raise ValueError(
                f"a topology needs one of dims for each of axes, got axes={self.axes} and dims={self.dims}"
            )
        for axis, length in zip(self.axes, self.dims, strict=True):
            check_integer(f"the length of axis {axis!r} in dims", length, least=1)
        if self.ranks and len(set(self.ranks)) != self.world_size:
            raise ValueError(f"a topology of {self} needs as many different ranks, got {self.ranks}")

    @classmethod
    def of(cls, source: Any) -> "Topology":
        """Read a ``Topology``, a ``DeviceMesh``, a process group of replicas, or a process topology of DeepSpeed.

        The latter is anything with ``get_axis_names()`` and ``get_dim(axis)``. Axes of a mesh are known by their names,
        see ``AXES``; several data-parallel axes (replicate, shard) are one.

        Raises:
            TypeError: if it is none of these.
            ValueError: naming an axis of a mesh that is not known.
        """
        if isinstance(source, cls):
            return source
        if isinstance(source, DeviceMesh):
            return cls._of_mesh(source)
        if isinstance(source, dist.ProcessGroup):
            ranks = tuple(dist.get_process_group_ranks(source))
            return cls(("data",), (len(ranks),), ranks)
        if not (hasattr(source, "get_axis_names") and hasattr(source, "get_dim")):
            raise TypeError(
                "topology must be a DeviceMesh, a process group, or a DeepSpeed process topology such as "
                f"model.topology(), got {type(source).__name__}"
            )
        axes = tuple(source.get_axis_names())
        return cls(axes, tuple(int(source.get_dim(axis)) for axis in axes))

    @classmethod
    def _of_mesh(cls, mesh: DeviceMesh) -> "Topology":
        names = mesh.mesh_dim_names or ("data",) * mesh.ndim
        unknown = [name for name in names if not any(name in known for known in AXES.values())]
        if unknown:
            known = "; ".join(f"{axis}: {', '.join(sorted(called))}" for axis, called in AXES.items())
            raise ValueError(f"topology has a mesh with axes {names}, of which {unknown} are not known ({known})")
        order = [index for called in AXES.values() for index, name in enumerate(names) if name in called]
        sizes = [math.prod(mesh.size(i) for i, name in enumerate(names) if name in called) for called in AXES.values()]
        ranks = mesh.mesh.permute(order).reshape(sizes)
        if not bool((ranks.diff(dim=-1) > 0).all()):
            raise ValueError(f"topology has a mesh whose ranks do not ascend along its tensor-parallel axis: {mesh}")
        return cls(tuple(AXES), tuple(sizes), tuple(ranks.flatten().tolist()))

    @property
    def world_size(self) -> int:
        return math.prod(self.dims)

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks, in the order of the grid."""
        return self.ranks or tuple(range(self.world_size))

    def coordinates(self, rank: int) -> tuple[int, ...]:
        check_integer("rank", rank, least=0)
        if rank not in self.members:
            bound = f"one of {self.ranks}, the" if self.ranks else f"< {self.world_size}, the number of"
            raise ValueError(f"rank must be {bound} ranks of {self}, got {rank}")
        coordinates, rank = [], self.members.index(rank)
        for length in reversed(self.dims):
            rank, coordinate = divmod(rank, length)
            coordinates.append(coordinate)
        return tuple(reversed(coordinates))

    def peers(self, rank: int, axis: str) -> tuple[int, ...]:
        """Return the ranks that differ from ``rank`` along ``axis`` only, itself included."""
        if axis not in self.axes:
            raise ValueError(f"axis must be one of {self.axes}, got {axis!r}")
        here = self.coordinates(rank)
        return tuple(
            other
            for other, there in zip(self.members, itertools.product(*map(range, self.dims)), strict=True)
            if all(a == b for a, b, name in zip(here, there, self.axes, strict=True) if name != axis)
        )

    def __str__(self) -> str:
        return " x ".join(f"{axis} {length}" for axis, length in zip(self.axes, self.dims, strict=True))


@dataclass
class ParallelGroups:
    """Groups of this process: ``data`` are its replicas, ``model`` the holders of the other shards of its matrices.

    ``world`` are all ranks that step together. ``source`` says where the groups were found.
    """

    rank: int
    world: Group
    data: Group
    model: Group
    source: str
    _groups: dict[tuple[int, ...], Group] = field(default_factory=dict)

    @classmethod
    def alone(cls) -> "ParallelGroups":
        me = Group((0,))
        return cls(0, me, me, me, "one process")

    def group(self, ranks: Sequence[int]) -> Group:
        """Return the group of exactly these ranks; made on first use, when all of them must call this.

        For all ranks it is the one with the timeout that the user gave, though an engine may have made another.
        """
        wanted = tuple(sorted(ranks))
        for known in (self.world, self.data, self.model, *self._groups.values()):
            if known.ranks == wanted:
                return known
        if len(wanted) > 1:
            with awaiting("a new process group", wanted):
                self._groups[wanted] = Group(wanted, _new_group(wanted))
        else:
            self._groups[wanted] = Group(wanted)
        return self._groups[wanted]


@dataclass(frozen=True)
class Claims:
    """Arguments of the user about the ranks; None for what is to be detected."""

    world_rank: int | None = None
    world_size: int | None = None
    topology: Topology | None = None
    handles: tuple[dist.ProcessGroup, ...] = ()

    @classmethod
    def of(cls, world_rank: int | None, world_size: int | None, topology: Any) -> "Claims":
        """Read the arguments; process groups that come with the topology are used."""
        found = None if topology is None else Topology.of(topology)
        return cls(world_rank, world_size, found, handles_of(topology))

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies, which make groups of their own."""
        return {**vars(self), "handles": ()}

    def __post_init__(self) -> None:
        if self.world_rank is not None:
            check_integer("world_rank", self.world_rank, least=0)
        if self.world_size is not None:
            check_integer("world_size", self.world_size, least=1)
        whole = self._whole
        size = whole.world_size if self.world_size is None and whole else self.world_size
        if size is not None and whole is not None and whole.world_size != size:
            raise ValueError(f"world_size={size} contradicts topology, whose {whole} are {whole.world_size}")
        if size is not None and self.world_rank is not None and self.world_rank >= size:
            raise ValueError(f"world_rank must be < {size}, the number of ranks, got {self.world_rank}")

    @property
    def _whole(self) -> Topology | None:
        """The topology, if it is one of all ranks."""
        return None if self.topology is None or self.topology.ranks else self.topology

    def check_ranks(self, rank: int, world_size: int, source: str) -> None:
        """Raise ValueError, naming both numbers, where the rank or the number of ranks contradicts ``source``."""
        whole = self._whole
        _compare(
            source,
            ("world_rank", self.world_rank, rank),
            ("world_size", self.world_size, world_size),
            ("topology's number of ranks", whole and whole.world_size, world_size),
        )

    def check(self, parallel: ParallelGroups) -> None:
        """Raise ValueError, naming both, where a claim contradicts what was found."""
        self.check_ranks(parallel.rank, total_ranks(), parallel.source)
        if self.topology is not None:
            for axis, group in (("data", parallel.data), ("model", parallel.model)):
                if axis in self.topology.axes:
                    peers = self.topology.peers(parallel.rank, axis)
                    _compare(parallel.source, (f"topology's {axis} ranks of rank {parallel.rank}", peers, group.ranks))


def _compare(source: str, *claims: tuple[str, object, object]) -> None:
    for name, claimed, actual in claims:
        if claimed is not None and claimed != actual:
            raise ValueError(f"{name} was given as {claimed}, but {source} says {actual}")


def groups_in(topology: Topology, rank: int, source: str, handles: Sequence[dist.ProcessGroup] = ()) -> ParallelGroups:
    """Make the process groups of ``rank`` in ``topology``, of whose ranks every one must call this.

    Args:
        handles: groups that there are already, each of which is used if its ranks are wanted.
    """
    me = Group((rank,))
    known = [world_group(), *(group_of(handle) for handle in handles if dist.get_rank(handle) >= 0)]
    parallel = ParallelGroups(rank, me, me, me, source, {group.ranks: group for group in reversed(known)})
    parallel.world = parallel.group(topology.members)
    parallel.model = parallel.group(topology.peers(rank, "model") if "model" in topology.axes else (rank,))
    parallel.data = parallel.group(topology.peers(rank, "data") if "data" in topology.axes else (rank,))
    return parallel


def handles_of(source: Any) -> tuple[dist.ProcessGroup, ...]:
    """Return the process groups in a ``DeviceMesh``, or the one that this is."""
    if isinstance(source, dist.ProcessGroup):
        return (source,)
    return tuple(source.get_all_groups()) if isinstance(source, DeviceMesh) else ()


def total_ranks() -> int:
    """Return the number of ranks of ``torch.distributed``, 1 without it."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def world_group() -> Group:
    """Return the group of all ranks of ``torch.distributed``."""
    return Group(tuple(range(dist.get_world_size())), dist.group.WORLD)


def _new_group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """Make the process group of these ranks, without the others.

    PyTorch names such a group after the number of groups that the process is in, and ranks in more groups of the user's
    would wait under another name: the other ones are in groups of their own as long as it is made.
    """
    fillers = [_made((dist.get_rank(),)) for _ in range(_most_groups(ranks) - _group_count())]
    group = _made(ranks)
    for filler in fillers:
        dist.destroy_process_group(filler)
    return group


def _made(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(list(ranks), timeout=_timeout(), use_local_synchronization=True)
    return group


def _group_count() -> int:
    return len(dist.distributed_c10d._world.pg_names)


def _most_groups(ranks: tuple[int, ...]) -> int:
    """Return the largest number of groups that one of the ranks is in; by way of the store, without a group."""
    if dist.get_backend() == "fake":  # one process plays all ranks
        return _group_count()
    store = dist.distributed_c10d.PrefixStore(f"shampoo3d/groups/{ranks}", dist.distributed_c10d._get_default_store())
    turn = (store.add("arrived", 1) - 1) // len(ranks)
    store.set(f"{turn}/{dist.get_rank()}", str(_group_count()))
    if dist.get_rank() == ranks[0]:
        store.set(f"{turn}/most", str(max(int(store.get(f"{turn}/{rank}")) for rank in ranks)))
    return int(store.get(f"{turn}/most"))


def _timeout() -> timedelta | None:
    """Return the world group's timeout, which PyTorch does not give to new groups; None if the backend has none."""
    world: Any = dist.group.WORLD
    try:
        timeout: timedelta = world._get_backend(world._device_types[0]).options._timeout
    except (AttributeError, IndexError, RuntimeError):  # a backend without options
        return None
    return timeout


def group_of(handle: dist.ProcessGroup) -> Group:
    """Make the group of a process group, with its global ranks."""
    return Group(tuple(dist.get_process_group_ranks(handle)), handle)
