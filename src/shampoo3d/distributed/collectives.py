"""Collectives of a group of ranks: uneven all-to-all, bucketed all-gather, sum; every byte that arrives is counted."""

import hashlib
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo3d.distributed.errors import CallsDifferError, awaiting
from shampoo3d.distributed.topology import Group, ParallelGroups
from shampoo3d.planning.routes import buckets, width

T = TypeVar("T")

# The newer name of all_gather_into_tensor, where torch has it.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Waiting(Protocol):
    """A collective that was started."""

    def wait(self) -> object: ...


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
        sent: Sequence[int],
        received: Sequence[int],
        fill: Callable[[Tensor], None],
    ) -> Callable[[], Tensor]:
        """Start to send elements to all ranks of the group, and to receive elements from them.

        Args:
            kind: their kind, such as "gradients", for the count of bytes and for errors.
            turn: a number; the buffers of a turn are reused two turns later.
            dtype: in which they travel.
            sent, received: numbers of elements by rank of the group.
            fill: writes what is sent into a flat buffer, rank by rank.

        Returns:
            What waits for the elements to arrive and returns them, flat, rank by rank.
        """
        send = self._buffer((kind, "out", turn % 2), sum(sent), dtype)
        receive = self._buffer((kind, "in", turn % 2), sum(received), dtype)
        fill(send)
        work = self._start(kind, send, sent, receive, received)
        self.received[kind] += receive.nbytes

        def wait() -> Tensor:
            if work is not None:
                with _exchanging(kind, self.group):
                    work.wait()
            return receive

        return wait

    def _start(
        self, kind: str, send: Tensor, counts_out: Sequence[int], receive: Tensor, counts_in: Sequence[int]
    ) -> Waiting | None:
        """Start the exchange, as bytes, since not every backend carries every dtype; without data there is none."""
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
            own, wide = bucket[self.rank], width(bucket, items)

            def fill(send: Tensor, own: Sequence[int] = own) -> None:
                if own:
                    pieces = [mine(number) for number in own]
                    targets = _split(send, [items[number][1] for number in own])
                    torch._foreach_copy_([x.view(p.shape) for x, p in zip(targets, pieces, strict=True)], pieces)

            receive = self.gather(kind, wide, dtype, fill)
            arrived: dict[int, Tensor] = {}
            for peer, row in zip(self.group.ranks, receive.view(self.group.size, wide), strict=True):
                arrived |= zip(bucket[peer], _split(row, [items[n][1] for n in bucket[peer]]), strict=True)
            yield arrived

    def gather(self, kind: str, elements: int, dtype: torch.dtype, fill: Callable[[Tensor], None]) -> Tensor:
        """Gather so many elements of each rank on all of them: flat, rank by rank, those of this rank included.

        Args:
            fill: writes those of this rank into a flat buffer.
        """
        send = self._buffer((kind, "out"), elements, dtype)
        receive = self._buffer((kind, "in"), elements * self.group.size, dtype)
        fill(send)
        self._gather(kind, send, receive)
        self.received[kind] += receive.nbytes - send.nbytes
        return receive

    def all_reduce(self, kind: str, values: Tensor) -> Tensor:
        """Sum over the ranks, in place, and return the sum."""
        if self.group.size > 1:
            total = values.to(self.device)
            self._reduce(kind, total)
            self.received[kind] += total.nbytes
            values.copy_(total)
        return values

    def _gather(self, kind: str, send: Tensor, receive: Tensor) -> None:
        if not receive.is_meta:
            with _exchanging(kind, self.group):
                all_gather(receive.view(torch.uint8), send.view(torch.uint8), group=self.group.handle)

    def _reduce(self, kind: str, total: Tensor) -> None:
        if not total.is_meta:
            with _exchanging(kind, self.group):
                dist.all_reduce(total, group=self.group.handle)

    @property
    def buffer_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

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
