"""Collectives of a group of ranks: uneven all-to-all, bucketed all-gather, sum; every byte that arrives is counted."""

import hashlib
import pickle
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo3d.distributed.errors import CallsDifferError, awaiting
from shampoo3d.distributed.topology import Group, ParallelGroups
from shampoo3d.planning.routes import buckets, width

T = TypeVar("T")

# The newer name of all_gather_into_tensor, where torch has it.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


K = TypeVar("K", bound=Hashable)


class PendingAllToAll(Generic[K]):
    """Pieces on their way, by key: those that stay on this rank, and those of an all-to-all that may be under way."""

    def __init__(
        self,
        here: Mapping[K, Tensor] | None = None,
        arriving: Mapping[K, Tensor] | None = None,
        finish: Callable[[], None] | None = None,
    ) -> None:
        self._pieces, self._finish = {**(here or {}), **(arriving or {})}, finish

    def wait(self) -> Mapping[K, Tensor]:
        """Return all pieces once they are here; those that travelled are flat, in a buffer that is used again."""
        if self._finish is not None:
            self._finish()
        return self._pieces


class Communicator:
    """Collectives of a group, with buffers that are allocated once.

    Attributes:
        received: bytes that came from other ranks, by kind.
    """

    def __init__(self, rank: int, group: Group, device: torch.device) -> None:
        self.rank, self.group = rank, group
        self.device = communicating_device(group, device)
        self.received: Counter[str] = Counter()
        self._buffers: dict[Any, Tensor] = {}

    def all_to_all(
        self,
        kind: str,
        turn: int,
        dtype: torch.dtype,
        out: Sequence[tuple[int, Tensor]],
        into: Sequence[tuple[K, int, int]],
        here: Mapping[K, Tensor] | None = None,
    ) -> PendingAllToAll[K]:
        """Start to send pieces to other ranks and to receive pieces from them.

        Args:
            kind: their kind, such as "gradients", for the count of bytes and for errors.
            turn: a number; the buffers of a turn are reused two turns later.
            dtype: in which they travel.
            out: (global rank, piece) each; to one rank in the order in which it asks for them.
            into: (key, global rank, number of elements) each.
            here: pieces that stay on this rank.
        """
        send_order = self._sorted([peer for peer, _ in out])
        receive_order = self._sorted([peer for _, peer, _ in into])
        counts_out = self._counts((peer, piece.numel()) for peer, piece in out)
        counts_in = self._counts((peer, elements) for _, peer, elements in into)
        send, receive = self.to_and_fro(kind, turn, dtype, sum(counts_out), sum(counts_in))
        if out:
            pieces = [out[i][1] for i in send_order]
            targets = send.split_with_sizes([piece.numel() for piece in pieces])
            torch._foreach_copy_([p.view(x.shape) for p, x in zip(targets, pieces, strict=True)], pieces)
        work = self._start(kind, send, counts_out, receive, counts_in)
        self.received[kind] += receive.nbytes
        arrived = receive.split_with_sizes([into[i][2] for i in receive_order]) if into else ()
        piece_of = dict(zip(receive_order, arrived, strict=True))

        def finish() -> None:
            if work is not None:
                with _exchanging(kind, self.group):
                    work.wait()

        return PendingAllToAll(here, {key: piece_of[i] for i, (key, _, _) in enumerate(into)}, finish)

    def to_and_fro(self, kind: str, turn: int, dtype: torch.dtype, out: int, into: int) -> tuple[Tensor, Tensor]:
        """Return the buffers of :meth:`all_to_all` for so many elements."""
        return self._buffer((kind, "out", turn % 2), out, dtype), self._buffer((kind, "in", turn % 2), into, dtype)

    def _start(
        self, kind: str, send: Tensor, counts_out: Sequence[int], receive: Tensor, counts_in: Sequence[int]
    ) -> dist.Work | None:
        """Start the exchange, as bytes, since not every backend carries every dtype."""
        if receive.is_meta:
            return None
        with _exchanging(kind, self.group):
            work: dist.Work = dist.all_to_all_single(
                receive.view(torch.uint8),
                send.view(torch.uint8),
                [n * receive.itemsize for n in counts_in],
                [n * send.itemsize for n in counts_out],
                group=self.group.handle,
                async_op=True,
            )
        return work

    def all_gather(
        self, kind: str, items: Sequence[tuple[int, int]], mine: Callable[[int], Tensor], dtype: torch.dtype, most: int
    ) -> Iterator[dict[int, Tensor]]:
        """Gather the items of all ranks on each, in buckets of about ``most`` elements; one collective per bucket.

        Args:
            items: (global rank that has it, number of elements) each, the same list on all ranks.
            mine: returns the item of a number that this rank has; of any shape.

        Yields:
            The flat tensors that arrived, those of this rank included, by number.
        """
        if self.group.size == 1:
            yield {number: mine(number).reshape(-1) for number in range(len(items))}
            return
        for bucket in buckets(self.group.ranks, items, most):
            wide = width(bucket, items)
            send, receive = self.gathered(kind, wide, dtype)
            if own := bucket[self.rank]:
                pieces = [mine(number) for number in own]
                targets = _split(send, [items[number][1] for number in own])
                torch._foreach_copy_([x.view(p.shape) for x, p in zip(targets, pieces, strict=True)], pieces)
            with _exchanging(kind, self.group):
                if not receive.is_meta:
                    all_gather(receive.view(torch.uint8), send.view(torch.uint8), group=self.group.handle)
            self.received[kind] += receive.nbytes - send.nbytes
            arrived: dict[int, Tensor] = {}
            for peer, row in zip(self.group.ranks, receive.view(self.group.size, wide), strict=True):
                arrived |= zip(bucket[peer], _split(row, [items[n][1] for n in bucket[peer]]), strict=True)
            yield arrived

    def gathered(self, kind: str, wide: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the buffers of :meth:`all_gather` for so many elements of each rank."""
        return self._buffer((kind, "out"), wide, dtype), self._buffer((kind, "in"), wide * self.group.size, dtype)

    def all_reduce(self, kind: str, values: Tensor) -> Tensor:
        """Sum over the ranks, in place, and return the sum."""
        if self.group.size > 1:
            total = values.to(self.device)
            with _exchanging(kind, self.group):
                if not total.is_meta:
                    dist.all_reduce(total, group=self.group.handle)
            self.received[kind] += total.nbytes
            values.copy_(total)
        return values

    @property
    def buffer_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def _sorted(self, peers: Sequence[int]) -> list[int]:
        """Return the order by rank in the group; within a rank, as given."""
        places = {rank: place for place, rank in enumerate(self.group.ranks)}
        return sorted(range(len(peers)), key=lambda i: places[peers[i]])

    def _counts(self, sizes: Any) -> list[int]:
        counts: Counter[int] = Counter()
        for peer, elements in sizes:
            counts[peer] += elements
        return [counts[rank] for rank in self.group.ranks]

    def _buffer(self, key: Any, elements: int, dtype: torch.dtype) -> Tensor:
        """Return the first elements of a buffer, which grows if it is too small."""
        needed = elements * dtype.itemsize
        if key not in self._buffers or self._buffers[key].nbytes < needed:
            self._buffers[key] = torch.empty(needed, dtype=torch.uint8, device=self.device)
        return self._buffers[key][:needed].view(dtype)


def _exchanging(kind: str, group: Group) -> AbstractContextManager[None]:
    return awaiting(f"the exchange of {kind}", group.ranks)


def _split(flat: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Split the front of a buffer into pieces."""
    used = sum(sizes)
    return list(flat[:used].split_with_sizes(list(sizes))) if sizes else []


def _backend(group: Group) -> str:
    """Return the name of the group's backend.

    Raises:
        RuntimeError: if the group was destroyed.
    """
    try:
        return str(dist.get_backend(group.handle))
    except ValueError as error:
        raise RuntimeError(
            f"the process group of the ranks {group.ranks}, over which the optimizer shares its work and state, was "
            "destroyed: call save_checkpoint() before, and load_checkpoint() in a new optimizer"
        ) from error


def communicating_device(group: Group, device: torch.device) -> torch.device:
    """Return the device that the group's backend needs: the parameters', or the GPU though they were offloaded."""
    if group.size > 1 and device.type == "cpu" and _backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device


CALLS = (
    *("step()", "bind()", "state_dict()", "load_state_dict()", "save_checkpoint()", "load_checkpoint()"),
    "copy.deepcopy() or pickle",
)
_OURS = 0x3D5A_3D5A << 16
"""Added to the number of a call, which a collective of somebody else on the same group then is not taken for."""


def meet(group: Group, call: str) -> None:
    """Check that all ranks of the group are in the same call of the optimizer. Only on gloo, where this costs little.

    Raises:
        CallsDifferError: on all ranks, naming who is where.
    """
    if group.size == 1 or _backend(group) != "gloo":
        return
    table = torch.empty(group.size, dtype=torch.int64)
    with awaiting("the agreement", group.ranks):
        all_gather(table, torch.tensor([_OURS + CALLS.index(call)], dtype=torch.int64), group=group.handle)
    numbers: list[int] = table.tolist()
    if len(set(numbers)) > 1:
        calls = dict(enumerate(CALLS, _OURS))
        where: dict[str, list[int]] = {}
        for rank, number in sorted(zip(group.ranks, numbers, strict=True), key=lambda pair: pair[1]):
            where.setdefault(calls.get(number, "no method of this optimizer"), []).append(rank)
        shown = ", ".join(f"ranks {ranks[:8]} called {name}" for name, ranks in where.items())
        raise CallsDifferError(
            f"all ranks must make the same calls, but {shown}; nothing was changed. A trainer or script that asks its "
            "first rank only needs ShampooCallback, or save_checkpoint() on all ranks"
        )


def all_gather_object(group: Group, value: T) -> list[T]:
    """Gather the values of all ranks of the group, in their order."""
    values: list[T] = [value] * group.size
    if group.size > 1:
        with awaiting("the messages", group.ranks):
            dist.all_gather_object(values, value, group=group.handle)
    return values


def all_gather_distinct(group: Group, value: T) -> list[T]:
    """Gather the values of all ranks, in their order, of which each travels once however many ranks have it."""
    told = hashlib.sha256(pickle.dumps(value)).digest()
    fingerprints = all_gather_object(group, told)
    first = {fingerprint: index for index, fingerprint in reversed([*enumerate(fingerprints)])}
    mine = group.size == 1 or first[told] == dist.get_rank(group.handle)
    values = all_gather_object(group, value if mine else None)
    return [values[first[fingerprint]] for fingerprint in fingerprints]  # type: ignore[misc]


def first_error(parallel: ParallelGroups, error: str) -> str:
    """Return on all ranks the error of the first rank that has one; with that rank, if others have none."""
    errors = all_gather_object(parallel.world, error)
    rank, first = next(
        ((rank, words) for rank, words in zip(parallel.world.ranks, errors, strict=True) if words), (0, "")
    )
    return first if all(errors) or not first else f"{first} (on rank {rank})"
