"""What the parts of a step allocate and free again, counted from shapes and settings. Pure.

A tensor counts as long as a variable of the step has it: what is here is read off the step, line by line.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shampoo3d.numerics.roots.choice import Method, at_once, choose
from shampoo3d.numerics.state_names import momenta_names
from shampoo3d.numerics.tiles import SMALLEST_SPLIT
from shampoo3d.planning.cost import bytes_of
from shampoo3d.planning.layout import ITEM_BYTES, STATE_BYTES
from shampoo3d.planning.plan import PlannedBlock
from shampoo3d.settings.hyperparams import ShampooHyperParams


@dataclass(frozen=True)
class Slab:
    """Elements at home here that are updated in one go.

    Attributes:
        elements, each: of all, and of the matrix that has most of them.
        dtype: of the weights.
        factored: all are of matrices with factors.
        flat: they are updated where they are stored, and not in a stack.
    """

    elements: int
    each: int
    dtype: str
    factored: bool
    flat: bool

    @property
    def size(self) -> int:
        """Of S, and of each temporary."""
        return self.elements * STATE_BYTES[self.dtype]

    @property
    def mixed(self) -> bool:
        """Whether weights and state differ in dtype."""
        return ITEM_BYTES[self.dtype] != STATE_BYTES[self.dtype]

    def _made(self, hp: ShampooHyperParams) -> tuple[bool, bool]:
        """Whether there is an average of the gradient, and a quotient of it and a root."""
        names = momenta_names(hp, self.factored)
        return "gradient_average" in names, "graft_accumulator" in names

    def held(self, hp: ShampooHyperParams, *, started: bool) -> int:
        """S and D; what steps that move nothing have of D is the gradient."""
        made = (started or hp.moves_at_once) and any(self._made(hp))
        keeps_D = self.mixed or made if self.flat else not started and hp.moves_at_once
        return self.size * (1 + keeps_D)

    def taking(self, hp: ShampooHyperParams, device: str, *, started: bool) -> int:
        """The average and the quotient, one of which may become D, or S of a flat slab."""
        averaged, quotient = self._made(hp)
        if not (started or hp.moves_at_once):
            return 0
        if self.flat:
            return self.size * (self.mixed and averaged)
        most = max(averaged * averages(hp, STATE_BYTES[self.dtype], device), averaged + quotient)
        return int(self.size * (most if started else max(most - 1, 0)))

    def changing(self, hp: ShampooHyperParams, device: str, *, started: bool) -> int:
        """Weights in a stack, momenta before they are rounded, a copy of a D that may be the user's gradient."""
        if not (started or hp.moves_at_once):
            return 0
        copies = 2 if device == "cpu" else 1  # there, an operand of another dtype is copied first
        W = self.size if hp.weight_decay and not self.flat else 0
        D = self.size if self.flat and not started else 0
        rounded = hp.computation.momentum_storage == "bfloat16" and not hp.averaged
        momenta = self.size * (copies + (not started)) if rounded else 0
        weights = self.each * STATE_BYTES[self.dtype] * copies if self.mixed else 0
        apart = rounded or (hp.weight_decay > 0 and hp.variant.decoupled_weight_decay and not hp.averaged)
        u = self.size if apart and not hp.nesterov else 0
        return W + D + max(momenta, u + weights)


def averages(hp: ShampooHyperParams, state: int, device: str) -> float:
    """What an average of gradients takes while it is made, and itself, in numbers of the state for each element."""
    if hp.computation.momentum_storage != "bfloat16":
        return 1
    return 2 if device == "cpu" else 1 + ITEM_BYTES["bfloat16"] / state


# ---- products --------------------------------------------------------------------------------------------------------


def roots(block: PlannedBlock) -> int:
    """Bytes of one root per factor, in the state's dtype."""
    return block.root_numbers * STATE_BYTES[block.dtype]


def accumulating(block: PlannedBlock, hp: ShampooHyperParams) -> int:
    """What a block's gradient takes on its way into the statistics."""
    state = STATE_BYTES[block.dtype]
    if hp.variant.statistics == "kl":
        kept, most = _whiteners(block, hp)
        for axis in block.axes:
            others = [other for other in block.axes if other != axis]
            height, turned = _products(block, others, state)
            unfolded = (_middle(block, axis) or turned) * state
            most = max(most, kept + block.elements * max(height, unfolded + (len(others) > 0) * state))
        return most
    return block.elements * state if any(_middle(block, axis) for axis in block.axes) else 0


def _whiteners(block: PlannedBlock, hp: ShampooHyperParams) -> tuple[int, int]:
    """Bytes of the whiteners of all axes, and the most while they are made one after the other."""
    converted = bytes_of("P", hp, block.dtype) != STATE_BYTES[block.dtype]
    power = hp.exponent(len(block.axes)) // 2
    kept = most = 0
    for axis in block.axes:
        d = block.shape[axis]
        numbers = d if axis in block.diagonal else d * d
        if hp.variant.direction == "adam":
            mine, making = 1, 2 + (d >= SMALLEST_SPLIT) + converted
        else:
            mine, making = int(converted or power > 1), converted + (power > 1) + (power > 2)
        most = max(most, kept + making * numbers)
        kept += mine * numbers
    return kept * STATE_BYTES[block.dtype], max(most, kept) * STATE_BYTES[block.dtype]


def preconditioning(block: PlannedBlock, hp: ShampooHyperParams, device: str, *, started: bool) -> int:
    """What the direction of a block takes at most, beside its gradient, whose place it takes."""
    state, low = STATE_BYTES[block.dtype], ITEM_BYTES["bfloat16"]
    making = averages(hp, state, device) * state if hp.averaged else 0
    if not started:
        return int(block.elements * making) if hp.moves_at_once else 0
    computed = low if hp.computation.products == "bfloat16" else state
    converted = bytes_of("P", hp, block.dtype) != computed
    P = block.root_numbers * computed if converted else 0
    adam = hp.variant.direction == "adam"
    most, turned = _products(block, block.axes, computed, averaged=hp.averaged, into=not adam)
    if adam:
        rotated, _ = _products(block, block.axes, computed)
        back, _ = _products(block, block.axes, computed, into=True, turned=turned)
        most = max(most, rotated, 2 * state, state + back)  # in between, the direction and its root of V
    return P + int(block.elements * max(making, most))


def _middle(block: PlannedBlock, axis: int) -> bool:
    """Whether a product along this axis has operands of its own, and a result that is not in row-major order."""
    return 0 < axis < len(block.shape) - 1


def _products(
    block: PlannedBlock,
    axes: Sequence[int],
    computed: int,
    *,
    averaged: bool = False,
    into: bool = False,
    turned: bool = False,
) -> tuple[int, bool]:
    """Bytes per element that products along these axes take at most, one after the other; is their result turned.

    Args:
        computed: bytes of a number in products.
        averaged: the first operand is a temporary, too.
        into: the last product may take the gradient's place.
        turned: the first operand is not in row-major order.
    """
    state = STATE_BYTES[block.dtype]
    cast = computed != state
    operand = computed if cast else averaged * state
    most, before = averaged * state + cast * computed, 0
    for place, axis in enumerate(axes):
        diagonal, middle = axis in block.diagonal, _middle(block, axis)  # a diagonal multiplies elements where they are
        copied = not diagonal and (turned or middle)
        in_place = into and 0 < place == len(axes) - 1 and not (cast or (middle and not diagonal))
        turned = turned if diagonal else middle
        before, operand = operand, 0 if in_place else computed
        most = max(most, before + copied * computed + operand)
    return max(most, cast * (before + operand + state)), turned


# ---- new roots -------------------------------------------------------------------------------------------------------

FIRST_BASIS, NEXT_BASIS = 6, 5
"""The d x d matrices that a new eigenbasis takes at its height, itself among them; measured, d >= 32. The first one, if
it is computed alone, has one more: a decomposition works in two matrices, however many it decomposes."""


def _root_copies(method: Method, p: int) -> int:
    """The d x d matrices that a method has at its height for each one, the new root among them; measured, d >= 32."""
    if method == "minimax":
        half = p // 2
        return 7 + (half > 0) + (half > 1) + (half & (half - 1) > 0)  # q^half, by squaring
    return 4


def _due(blocks: Sequence[PlannedBlock], hp: ShampooHyperParams, *, started: bool) -> Iterator[tuple[int, bool]]:
    """How many are refreshed at once before the start step or from then on, and whether they are picked out of a stack.

    The first time and "together" all are, else those of a turn. With a tolerance those that are too far off are picked,
    all of them at worst, but for the first time.
    """
    k, start = hp.preconditioning_compute_steps, hp.start_preconditioning_step
    early = not hp.moves_at_once or (k < start and start % k != 0)  # the first time is before the start step
    in_turns, tolerant = hp.computation.refresh == "staggered", hp.variant.refresh_tolerance > 0
    if started != early or hp.fresh_steps:
        yield len(blocks), False
    if started and not in_turns:
        yield len(blocks), tolerant
    turns: defaultdict[int, list[int]] = defaultdict(list)
    for row, block in enumerate(blocks):
        turn = block.offset % k
        if in_turns and (started or (early and 0 < turn < start % k)):
            turns[turn].append(row)
    for rows in turns.values():
        yield len(rows), tolerant or rows[-1] - rows[0] >= len(rows)


def refreshing(blocks: Sequence[PlannedBlock], hp: ShampooHyperParams, device: str, *, started: bool) -> int:
    """What new roots of equal blocks take at most; with ``asynchronous`` without themselves, since all of them stay."""
    found = 0
    for d in blocks[0].factors:
        for count, picked in _due(blocks, hp, started=started):
            together = min(count, at_once(d, device))
            if hp.variant.direction == "adam":
                each = _new_basis(blocks[0], d, hp, started=started, picked=picked, alone=together == 1)
            else:
                each = _new_root(blocks[0], d, hp, device, picked=picked)
            found = max(found, each * together)
    return found * STATE_BYTES[blocks[0].dtype]


def _new_root(block: PlannedBlock, d: int, hp: ShampooHyperParams, device: str, *, picked: bool) -> int:
    """Numbers for each d x d root: beside the work copies of the statistics and of the previous root."""
    p = hp.exponent(len(block.axes))
    double = STATE_BYTES[block.dtype] == 8
    method = choose(hp.computation.root_method, p, hp.pseudo_inverse, d=d, device=device, double=double)
    corrected = hp.variant.bias_correction and hp.beta2 < 1.0
    statistics = d >= SMALLEST_SPLIT or picked or corrected
    previous = bytes_of("P", hp, block.dtype) != STATE_BYTES[block.dtype] or picked
    return (_root_copies(method, p) + statistics + previous - hp.computation.asynchronous) * d * d


def _new_basis(block: PlannedBlock, d: int, hp: ShampooHyperParams, *, started: bool, picked: bool, alone: bool) -> int:
    """Numbers for each d x d basis, and for V in its order."""
    late = hp.computation.asynchronous
    whole, converted = d >= SMALLEST_SPLIT, bytes_of("P", hp, block.dtype) != STATE_BYTES[block.dtype]
    copies = NEXT_BASIS if started else FIRST_BASIS + alone
    copies += (whole or picked) + (converted or picked)
    return max((copies - late) * d * d, (1 - late) * d * d + (1 + picked) * block.elements)
