"""Strided views that cover many members of a bucket at once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.layout import Fragment
from shampoo3d.runtime.bindings import Binding, GroupTensor


@dataclass(frozen=True, eq=False)
class Patch:
    """Consecutive members at regular distances in their group tensor, so that one strided view covers them all.

    Attributes:
        first, count: the members, within their run.
        offset, shape, strides: the view in the flat storage of the group tensor; leading axes count members.
    """

    group_tensor: GroupTensor
    first: int
    count: int
    offset: int
    shape: Shape
    strides: Shape

    def of(self, flat: Tensor) -> Tensor:
        """Return the view of the members in the flat storage of the group tensor, or in a buffer of the same layout."""
        return flat.as_strided(self.shape, self.strides, flat.storage_offset() + self.offset)

    def among(self, stack: Tensor) -> Tensor:
        """Return the view of the same members in the stack of the run, in the shape of :meth:`of`."""
        return stack.narrow(0, self.first, self.count).view(self.shape)


def patches(members: Sequence[tuple[Binding, Fragment]]) -> list[Patch]:
    """Cover all members with patches: few, if they are the blocks of a grid."""
    merged = [
        Patch(
            binding.group_tensor,
            number,
            1,
            binding.offset + fragment.piece.offset,
            fragment.box.shape,
            fragment.piece.strides,
        )
        for number, (binding, fragment) in enumerate(members)
    ]
    for _ in range(max(2, len(members[0][1].box.shape))):
        merged = _merge_patches(merged)
    return merged


def _merge_patches(single: Sequence[Patch]) -> list[Patch]:
    """Merge consecutive patches that are alike and at equal distances into one, with a leading axis."""
    rows: list[list[Patch]] = []
    for patch in single:
        row = rows[-1] if rows else []
        alike = row and (row[0].group_tensor, row[0].shape, row[0].strides) == (
            patch.group_tensor,
            patch.shape,
            patch.strides,
        )
        step = patch.offset - row[-1].offset if alike else 0
        if step > 0 and (len(row) == 1 or step == row[1].offset - row[0].offset):
            row.append(patch)
        else:
            rows.append([patch])
    merged = []
    for first, *others in rows:
        strides = (others[0].offset - first.offset if others else 0, *first.strides)
        count, shape = first.count * (1 + len(others)), (1 + len(others), *first.shape)
        merged.append(replace(first, count=count, shape=shape, strides=strides))
    return merged


def views_of(patches: Sequence[Patch], *, gradient: bool) -> tuple[list[Tensor], dict[GroupTensor, Tensor]]:
    """Return views of the patches in the gradients or weights of their group tensors, and these by group tensor."""
    flats: dict[GroupTensor, Tensor] = {}
    for group_tensor in dict.fromkeys(patch.group_tensor for patch in patches):
        flat = group_tensor.gradient if gradient else group_tensor.flat
        assert flat is not None
        flats[group_tensor] = flat
    return [patch.of(flats[patch.group_tensor]) for patch in patches], flats
