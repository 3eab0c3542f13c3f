"""The update rule in plain float64 NumPy, one parameter and one block at a time, in the symbols of the paper.

W weights, G gradient, t its number (from 1, per parameter), L_i the statistics of axis i, P_i their inverse root.
Written from the equations and from nothing else, so that the optimizer has something independent to follow; it takes
only the estimated cost of roots from the optimizer, by which blocks take turns.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """Settings of one parameter; the names are those of `ShampooHyperParams`, `Computation` and group keys.

    `u` is the machine epsilon of the arithmetic that is to be followed.
    """

    lr: float = 0.1
    momentum: float = 0.9
    maximize: bool = False
    precondition: bool = True
    beta2: float = 1.0
    diagonal_eps: float = 1e-6
    matrix_eps: float = 1e-12
    weight_decay: float = 0.0
    inverse_exponent_override: int = 0
    start_preconditioning_step: int = 1
    preconditioning_compute_steps: int = 1
    statistics_compute_steps: int = 1
    block_size: int = 0
    best_effort_shape_interpretation: bool = False
    graft_type: str = "sgd"
    nesterov: bool = True
    pseudo_inverse: bool = False
    refresh: str = "staggered"
    sides: str = "all"
    largest_dimension: int = 0
    long_axes: str = "none"
    kernels: str = "axes"
    statistics: str = "gradient"
    beta1: float = 0.0
    statistics_sampling: int = 1
    look_ahead: bool = False
    borrow: str = "length"
    graft_beta2: float = 0.999
    bias_correction: bool = False
    vectors: str = "scaled"
    decoupled_weight_decay: bool = False
    u: float = 2.0**-52


def merged(shape: Sequence[int], block_size: int) -> tuple[int, ...]:
    """Adjacent dimensions joined from the left while their product is at most `block_size`."""
    result: list[int] = []
    for length in shape:
        if result and result[-1] * length <= block_size:
            result[-1] *= length
        else:
            result.append(length)
    return tuple(result)


def stacked(shape: Sequence[int], s: Settings) -> int:
    """The number of leading axes that count matrices: all but two, if an axis from the third on is longer than 16."""
    return len(shape) - 2 if s.kernels == "matrix" and any(n > 16 for n in shape[2:]) else 0


def with_kernels_merged(shape: Sequence[int]) -> tuple[int, ...]:
    """Axes from the third on, those of a kernel, joined with the one before."""
    return (*shape[:1], prod(shape[1:])) if len(shape) > 1 else tuple(shape)


def cut(shape: Sequence[int], block_size: int) -> list[tuple[slice, ...]]:
    """The blocks: each axis in ceil(length / block_size) parts, as equal as possible, the larger ones first."""
    grid: list[tuple[slice, ...]] = [()]
    for length in shape:
        count = ceil(length / block_size) if block_size else 1
        parts = np.array_split(np.arange(length), count)
        grid = [(*block, slice(part[0], part[-1] + 1)) for block in grid for part in parts]
    return grid


def long_axes(blocks: Sequence[tuple[slice, ...]], s: Settings) -> list[int]:
    """Return the axes along which a block is longer than the bound, if there is one."""
    longest = np.max([[w.stop - w.start for w in where] for where in blocks], axis=0)
    return [i for i, length in enumerate(longest) if 0 < s.largest_dimension < length]


def factored_axes(shape: Sequence[int], blocks: Sequence[tuple[slice, ...]], s: Settings) -> list[int]:
    """The axes that have a factor: those of the chosen sides, without long ones unless these have a diagonal one."""
    sides = {"all": [*range(len(shape))], "first": [0], "last": [len(shape) - 1], "shortest": [int(np.argmin(shape))]}
    long = long_axes(blocks, s) if s.long_axes == "none" else []
    return [i for i in sides[s.sides] if i not in long]


def unfolding(G: Array, i: int) -> Array:
    """G_(i): axis i becomes the rows, all others the columns."""
    return np.moveaxis(G, i, 0).reshape(G.shape[i], -1)


def sample(G: Array, i: int, turn: int, every: int) -> Array:
    """Every so-many-th slice along the longest axis other than i, weighted; after the first turn, that takes all."""
    lengths = [0 if j == i else d for j, d in enumerate(G.shape)]
    j = int(np.argmax(lengths))
    stride = min(every, lengths[j])
    if turn == 0 or stride <= 1:
        return G
    taken = [n for n in range(lengths[j]) if n % stride == turn % stride]
    return np.take(G, taken, axis=j) * np.sqrt(lengths[j] / len(taken))


def mode_product(G: Array, P: Array, i: int) -> Array:
    """G x_i P."""
    return np.moveaxis(np.tensordot(P, G, axes=(1, i)), 0, i)


def inverse_root(L: Array, p: int, eps: float, u: float, pseudo: bool = False) -> Array:
    """(L + eps lambda_max(L) I)^(-1/p), with no eigenvalue of L below u lambda_max(L).

    With `pseudo`, the eigenvectors of eigenvalues up to d u lambda_max(L) are left out.
    """
    eigenvalues, V = np.linalg.eigh(L)
    largest = eigenvalues[-1]
    scale = (np.maximum(eigenvalues, u * largest) + eps * largest) ** (-1 / p)
    if pseudo:
        scale[eigenvalues <= len(L) * u * largest] = 0.0
    return (V * scale) @ V.T


def inverse_diagonal_root(L: Array, p: int, eps: float, pseudo: bool = False) -> Array:
    """The same of a diagonal L, entry by entry; `pseudo` leaves out entries that are 0."""
    entries = np.diag(L)
    scale = (entries + eps * entries.max()) ** (-1 / p)
    return np.diag(np.where(entries == 0, 0.0, scale) if pseudo else scale)


def by_rectangles(blocks: Sequence[Block]) -> list[Block]:
    """Put blocks of a matrix in order: rectangles of blocks of one shape, those of each in row-major order."""
    runs = []
    for axis in zip(*(block.where for block in blocks), strict=True):
        lengths = {side.start: side.stop - side.start for side in axis}
        starts = sorted(lengths)
        changes = [lengths[a] != lengths[b] for a, b in itertools.pairwise(starts)]
        runs.append(dict(zip(starts, np.cumsum([0, *changes]), strict=True)))
    return sorted(blocks, key=lambda block: [run[side.start] for run, side in zip(runs, block.where, strict=True)])


def deal_turns(blocks: Sequence[Block], every: int) -> None:
    """The blocks with the costliest roots first, each to the turn that costs least so far; equal ones in order."""
    costs = np.zeros(every)
    for block in sorted(blocks, key=lambda block: block.cost, reverse=True):
        block.turn = int(costs.argmin())
        costs[block.turn] += block.cost


class Block:
    """A rectangle of the gradient with factors of its own; those of long axes are diagonal matrices."""

    def __init__(self, where: tuple[slice, ...], axes: Sequence[int], long: Sequence[int], s: Settings) -> None:
        self.where, self.long = where, long
        sizes = {i: where[i].stop - where[i].start for i in axes}
        initial = 0.0 if s.bias_correction or s.statistics == "kl" else s.matrix_eps
        self.L = {i: initial * np.eye(n) for i, n in sizes.items()}
        self.P = {i: np.eye(n) for i, n in sizes.items()}
        self.a = [np.zeros(w.stop - w.start) for w in where]
        # Turns are dealt out by the cost of a root, in multiply-adds: see docs/update-rule.md.
        self.cost = sum(6.5 * n**3 + 2000.0 * n**2 for i, n in sizes.items() if i not in long)
        self.turn = 0

    def due(self, t: int, s: Settings) -> bool:
        """Return whether roots are computed: of all blocks at one step, which the start may put off, then in turns."""
        k, first = s.preconditioning_compute_steps, self.first(s)
        if s.statistics == "kl" and t == s.statistics_compute_steps:  # the next gradient is whitened
            return True
        return t == first or (t > first and t % k == self.turn)

    def first(self, s: Settings) -> int:
        """The step at which the roots of all blocks are computed."""
        k = s.preconditioning_compute_steps
        return max(n for n in range(k, max(k, s.start_preconditioning_step) + 1, k))

    def update(self, G: Array, t: int, s: Settings) -> None:
        w2 = 1.0 if s.beta2 == 1.0 else 1.0 - s.beta2
        p = s.inverse_exponent_override or 2 * len(self.L)
        whiteners = {i: np.linalg.matrix_power(P, p // 2) for i, P in self.P.items()}  # for even p
        for i in self.L:
            if t % s.statistics_compute_steps == 0:
                whitened = G
                if s.statistics == "kl":
                    for j, W in whiteners.items():
                        whitened = whitened if j == i else mode_product(whitened, W, j)
                    whitened = whitened * np.sqrt(G.shape[i] / G.size)
                sampled = sample(whitened, i, t // s.statistics_compute_steps - 1, s.statistics_sampling)
                product = unfolding(sampled, i) @ unfolding(sampled, i).T
                if i in self.long:
                    product = np.diag(np.diag(product))
                first = not self.L[i].any()
                self.L[i] = s.beta2 * self.L[i] + w2 * product
                if s.statistics == "kl" and first and sampled.any():
                    n = t // s.statistics_compute_steps
                    c = np.sum(sample(G, i, n - 1, s.statistics_sampling) ** 2) / G.size
                    gathered = 1.0 - s.beta2**n if s.bias_correction and s.beta2 < 1.0 else 1.0
                    self.L[i] = c ** (1 / len(self.L) - 1) * (self.L[i] + c * gathered * np.eye(len(self.L[i])))
            if self.due(t, s) and self.L[i].any():
                n = t // s.statistics_compute_steps
                gathered = 1.0 - s.beta2**n if s.bias_correction and s.beta2 < 1.0 else 1.0
                averaged = self.L[i] / gathered
                if i in self.long:
                    self.P[i] = inverse_diagonal_root(averaged, p, s.matrix_eps, s.pseudo_inverse)
                else:
                    self.P[i] = inverse_root(averaged, p, s.matrix_eps, s.u, s.pseudo_inverse)

    def decrease(self, G: Array, E: Array, t: int, s: Settings) -> float:
        """<E, E / sqrt(A)>, A from the means of squares along each axis: for a matrix A_ij = a_i b_j / mean."""
        others = [tuple(j for j in range(G.ndim) if j != i) for i in range(G.ndim)]
        means = [np.mean(G**2, axis=of) for of in others]
        self.a = [s.graft_beta2 * a + (1 - s.graft_beta2) * mean for a, mean in zip(self.a, means, strict=True)]
        a = [a / (1 - s.graft_beta2**t) for a in self.a]
        A = np.ones(()) / (a[0].mean() + s.diagonal_eps**2) ** (G.ndim - 1)
        for along in a:
            A = np.multiply.outer(A, along + s.diagonal_eps**2)
        return float((E**2 / np.sqrt(A)).sum())

    def apply(self, G: Array) -> Array:
        for i, P in self.P.items():
            G = mode_product(G, P, i)
        return G


class Parameter:
    """One parameter and its state."""

    def __init__(self, W: Array, s: Settings) -> None:
        self.W = np.array(W, dtype=np.float64)
        self.M, self.N = np.zeros_like(self.W), np.zeros_like(self.W)
        self.A, self.E = np.zeros_like(self.W), np.zeros_like(self.W)
        self.t = 0
        merge = s.best_effort_shape_interpretation and s.block_size > 0
        self.shape = merged(self.W.shape, s.block_size) if merge else self.W.shape
        leading = stacked(self.W.shape, s)
        if s.kernels == "matrix" and not leading:
            self.shape = with_kernels_merged(self.W.shape)
        self.blocks: list[Block] = []
        sides = self.shape[leading:]
        matrix = len(sides) > 1 if s.kernels == "axes" else sum(n > 1 for n in sides) > 1
        if s.precondition and matrix and prod(self.shape) > 0:
            pieces = cut(sides, s.block_size)
            axes, long = ([i + leading for i in of] for of in (factored_axes(sides, pieces, s), long_axes(pieces, s)))
            ones = [tuple(slice(i, i + 1) for i in index) for index in np.ndindex(*self.shape[:leading])]
            if axes:
                self.blocks = [Block((*one, *where), axes, long, s) for one in ones for where in pieces]

    def preconditioned(self, gradient: Array, averaged: Array, s: Settings) -> Array:
        """S before grafting: E x_1 P_1 x_2 P_2 ... in every block, E the average of G; G where t is early."""
        G, E = gradient.reshape(self.shape), averaged.reshape(self.shape)
        S = G.copy()
        for block in self.blocks:
            block.update(G[block.where], self.t, s)
            if self.t >= s.start_preconditioning_step:
                E_b = E[block.where]
                S[block.where] = S_b = block.apply(E_b)
                if s.borrow == "decrease":
                    adams = block.decrease(G[block.where], E_b, self.t, s)
                    S[block.where] = S_b * adams / (E_b * S_b).sum() if E_b.any() else 0.0
        return S.reshape(gradient.shape)

    def borrowed(self, G: Array, s: Settings) -> tuple[Array, Array]:
        """The gradient or its average, and D."""
        alone = not self.blocks and s.vectors == "diagonal" and s.graft_type == "none"
        method = "adam" if alone else s.graft_type
        corrected = s.bias_correction or method == "adam"
        self.E = s.beta1 * self.E + (1 - s.beta1) * G
        E = self.E / (1 - s.beta1**self.t) if corrected else self.E
        if method == "adagrad":
            self.A = self.A + G**2
        else:
            self.A = s.graft_beta2 * self.A + (1 - s.graft_beta2) * G**2
        A = self.A / (1 - s.graft_beta2**self.t) if corrected and method != "adagrad" else self.A
        return E, E / (np.sqrt(A) + s.diagonal_eps) if method in ("adagrad", "rmsprop", "adam") else E

    def step(self, gradient: Array, s: Settings) -> None:
        self.t += 1
        G = -gradient if s.maximize else gradient
        E, D = self.borrowed(G, s)
        diagonal = D if s.vectors == "diagonal" else E
        ahead = s.beta1 * E + (1 - s.beta1) * G if s.look_ahead else E
        S = self.preconditioned(G, ahead, s) if self.blocks else diagonal
        if s.graft_type != "none" and not (s.borrow == "decrease" and self.blocks):
            S = S * np.sqrt((D**2).sum()) / (np.sqrt((S**2).sum()) + 1e-16)
        decay = s.weight_decay * self.W
        if not s.decoupled_weight_decay:
            S, D = S + decay, D + decay
        momentum = 0.0 if s.beta1 else s.momentum
        self.M = momentum * self.M + S
        self.N = momentum * self.N + D
        u, d = (self.M, S) if self.t >= s.start_preconditioning_step else (self.N, D)
        if s.nesterov:
            u = momentum * u + d
        self.W = self.W - s.lr * (u + decay if s.decoupled_weight_decay else u)


class Reference:
    """A list of parameters, each with its settings; `settings` may be replaced between steps (schedules)."""

    def __init__(self, weights: Sequence[Array], settings: Sequence[Settings]) -> None:
        self.settings = list(settings)
        self.parameters = [Parameter(W, s) for W, s in zip(weights, settings, strict=True)]
        self.largest = [np.abs(p.W).max(initial=0.0) for p in self.parameters]
        for s in self.settings[:1]:  # the intervals are common to all
            if s.refresh == "staggered":
                deal_turns(
                    [block for p in self.parameters for block in by_rectangles(p.blocks)],
                    s.preconditioning_compute_steps,
                )

    def step(self, gradients: Sequence[Array | None]) -> None:
        """One step; a parameter without a gradient (None) is left alone altogether."""
        for k, (p, G, s) in enumerate(zip(self.parameters, gradients, self.settings, strict=True)):
            if G is not None:
                p.step(np.asarray(G, dtype=np.float64), s)
                self.largest[k] = max(self.largest[k], np.abs(p.W).max(initial=0.0))

    def error(self, weights: Sequence[Array]) -> float:
        """The largest difference of any weight, relative to the largest weight its parameter has had."""
        errors = [0.0]
        for p, largest, W in zip(self.parameters, self.largest, weights, strict=True):
            assert p.W.shape == W.shape
            if W.size:
                errors.append(float(np.abs(p.W - W).max() / largest))
        return float(np.max(errors))  # unlike max(), NaN wins
