"""SOAP, KL-Shampoo and KL-SOAP in plain float64 NumPy, one parameter at a time, written from their papers' equations.

SOAP: Vyas et al. 2024, arXiv 2409.11321, Algorithm 3 with the order of operations of the authors' code:

- the first gradient only makes statistics, weighted 1 - shampoo_beta from zero, and their eigenvectors; W stays;
- from then on t = 1, 2, ...: M and V advance with G and with the square of the rotated G, W moves by the rotated M over
  sqrt(V) + eps, with both bias corrections in the step size, so that eps is added to the *uncorrected* root; then W
  decays by lr weight_decay of what it is *after* that; then the statistics take G in; then, where k divides t, each
  basis follows its L by one product with it and a QR decomposition, its columns sorted first and V's entries with them;
- parameters with one axis, and axes longer than `largest`, have no basis.

The authors keep M rotated and turn it back and forth whenever a basis changes: M in the original space is the same.

KL-Shampoo and KL-SOAP: Lin et al. 2025, arXiv 2509.03378, as read here:

- `L_i <- beta L_i + (1 - beta) / prod_(j != i) d_j  U U^T` with `U = G_(i)` whitened along all other axes j by `L_j^-1`
  of *before* this step, for all i at once; the first gradient is not whitened, since nothing is known, and the mean
  of its L_i's diagonal, over 1 - beta, is added to that as the identity that the average starts from (the authors
  start from constants, which depend on the scale of gradients); with c the mean of the squares of that gradient all r
  of the L_i are multiplied by c^(1/r - 1), so that the diagonal of their product is c;
- KL-Shampoo moves by `M x_1 L_1^(-1/2) x_2 ...`, roots computed after every k-th accumulation, with a ridge of `ridge`
  times the largest eigenvalue as in `reference.py`;
- KL-SOAP is SOAP with these statistics; `L_j^-1 = Q_j diag(lambda_j)^-1 Q_j^T` with `lambda_j = diag(Q_j^T L_j Q_j)`,
  not below `ridge` times the largest. While Q_j stays, the paper's average of `diag(Q_j^T U U^T Q_j)` is the same
  number, except that the authors' code starts it from a constant and does not begin anew with a new Q_j; that code
  also bounds lambda absolutely, does not sort, and takes the axes of 3-d tensors one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reference import Array, inverse_root, mode_product, unfolding


@dataclass(frozen=True)
class SoapSettings:
    """The names of the authors' code where it has one."""

    lr: float = 3e-3
    betas: tuple[float, float] = (0.95, 0.95)
    shampoo_beta: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    every: int = 10
    largest: int = 10000
    correct_bias: bool = True
    kl: bool = False
    ridge: float = 1e-12


def rotated(G: Array, Q: dict[int, Array]) -> Array:
    """G x_1 Q_1^T x_2 Q_2^T ..."""
    for i, basis in Q.items():
        G = mode_product(G, basis.T, i)
    return G


def rotated_back(G: Array, Q: dict[int, Array]) -> Array:
    """G x_1 Q_1 x_2 Q_2 ..."""
    for i, basis in Q.items():
        G = mode_product(G, basis, i)
    return G


def estimated(L: Array, Q: Array) -> Array:
    """diag(Q^T L Q)."""
    return np.array(np.diag(Q.T @ L @ Q))


class Factored:
    """The statistics of one parameter, from gradients as they are or whitened."""

    def __init__(self, shape: Sequence[int], s: SoapSettings) -> None:
        self.s, self.shape = s, tuple(shape)
        axes = [i for i, d in enumerate(shape) if len(shape) > 1 and d <= s.largest]
        self.L = {i: np.zeros((shape[i], shape[i])) for i in axes}
        self.inverses: dict[int, Array] = {}

    def update(self, G: Array) -> None:
        """All L from all inverses of before; no inverses, no whitening."""
        for i in self.L:
            weight = 1 - self.s.shampoo_beta
            whitened = G
            if self.s.kl:
                weight *= self.shape[i] / G.size
                for j, inverse in self.inverses.items():
                    whitened = whitened if j == i else mode_product(whitened, inverse, j)
            product = unfolding(whitened, i) @ unfolding(G, i).T
            self.L[i] = self.s.shampoo_beta * self.L[i] + weight * product
            if self.s.kl and not self.inverses:
                mean = np.trace(self.L[i]) / len(self.L[i])
                self.L[i] += mean / (1 - self.s.shampoo_beta) * np.eye(len(self.L[i]))
                self.L[i] *= np.mean(G**2) ** (1 / len(self.L) - 1)


class Soap:
    """SOAP of one parameter, or KL-SOAP."""

    def __init__(self, W: Array, s: SoapSettings) -> None:
        self.W, self.s, self.t = np.array(W, dtype=np.float64), s, -1
        self.M, self.V = np.zeros_like(self.W), np.zeros_like(self.W)
        self.factors = Factored(self.W.shape, s)
        self.Q: dict[int, Array] = {}

    def step(self, G: Array) -> None:
        self.t += 1
        if self.t == 0:
            self.factors.update(G)
            self.Q = {i: np.linalg.eigh(L)[1][:, ::-1] for i, L in self.factors.L.items()}
        else:
            self.move(G)
            self.factors.update(G)
            if self.t % self.s.every == 0:
                self.turn()
        if self.s.kl:
            self.factors.inverses = {i: self.inverse(i) for i in self.Q}

    def move(self, G: Array) -> None:
        s, (beta1, beta2) = self.s, self.s.betas
        self.M = beta1 * self.M + (1 - beta1) * G
        self.V = beta2 * self.V + (1 - beta2) * rotated(G, self.Q) ** 2
        size = s.lr
        if s.correct_bias:
            size *= np.sqrt(1 - beta2**self.t) / (1 - beta1**self.t)
        self.W = self.W - size * rotated_back(rotated(self.M, self.Q) / (np.sqrt(self.V) + s.eps), self.Q)
        self.W = self.W - s.lr * s.weight_decay * self.W

    def turn(self) -> None:
        for i, L in self.factors.L.items():
            order = np.argsort(-estimated(L, self.Q[i]), kind="stable")
            self.V = np.take(self.V, order, i)
            self.Q[i] = np.linalg.qr(L @ self.Q[i][:, order])[0]

    def inverse(self, i: int) -> Array:
        Q, L = self.Q[i], self.factors.L[i]
        lambdas = estimated(L, Q)
        return (Q / np.maximum(lambdas, self.s.ridge * lambdas.max())) @ Q.T


class KLShampoo:
    """KL-Shampoo of one parameter: no second moment, no grafting."""

    def __init__(self, W: Array, s: SoapSettings) -> None:
        self.W, self.s, self.t = np.array(W, dtype=np.float64), s, -1
        self.M = np.zeros_like(self.W)
        self.factors = Factored(self.W.shape, s)
        self.roots: dict[int, Array] = {}

    def step(self, G: Array) -> None:
        self.t += 1
        if self.t:
            beta1, _ = self.s.betas
            self.M = beta1 * self.M + (1 - beta1) * G
            size = self.s.lr / (1 - beta1**self.t if self.s.correct_bias else 1.0)
            self.W = self.W - size * rotated_back(self.M, self.roots)
            self.W = self.W - self.s.lr * self.s.weight_decay * self.W
        self.factors.update(G)
        if self.t % self.s.every == 0:
            self.roots = {i: inverse_root(L, 2, self.s.ridge, 2.0**-52) for i, L in self.factors.L.items()}
            self.factors.inverses = {i: P @ P for i, P in self.roots.items()}
