"""Accuracy and cost of every method of inverse roots, and whether a previous root helps to find the next one.

One thread, CPU seconds; about ten minutes. Usage: ``python benchmarks/roots.py [--out roots.json] [--quick]``.

Accuracy is measured against float64 ``eigh`` of the very matrices that the method got, with the definition of
``docs/roots.md``. Cost is given in GEMM equivalents: in units of this machine's own ``bmm`` of the same stack, timed
next to it. The statistics called "training" are factors of a small GPT's gradients while 3D-Shampoo trains it.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from record import setting, write
from torch import Tensor, nn

from shampoo3d import Shampoo, ShampooHyperParams
from shampoo3d.cli.train.gpt import Block, Embedding, Position, loss
from shampoo3d.cli.train.shards import Shards
from shampoo3d.cli.train.text import read_text
from shampoo3d.numerics.roots import inverse_roots
from shampoo3d.settings.computation import refusal

METHODS = ("eigh", "minimax")
EXPONENTS = (2, 4, 8)
RIDGES = (1e-6, 1e-12)
CONDITIONS = ("1e0", "1e4", "1e8", "1e12", "1e16", "rank n/4")
SIZES = {torch.float32: (1, 2, 16, 64, 256, 512, 1024, 2048), torch.float64: (1, 2, 16, 64)}
TIMED = (8, 16, 32, 64, 128, 256, 512, 1024)
WIDTH, LAYERS, CONTEXT, BATCH = 128, 2, 64, 16
TRAINED = 60


# ---- matrices ----


def synthetic(kind: str, n: int, count: int) -> Tensor:
    """(count, n, n) in float64: logarithmically spaced eigenvalues in a random basis, or X X^T of deficient rank."""
    generator = torch.Generator().manual_seed(n)
    if kind == "rank n/4":
        X = torch.randn(count, n, max(1, n // 4), generator=generator, dtype=torch.float64)
        return X @ X.mT
    Q = torch.linalg.qr(torch.randn(count, n, n, generator=generator, dtype=torch.float64))[0]
    eigenvalues = float(kind) ** -torch.linspace(0, 1, n, dtype=torch.float64)
    return (Q * eigenvalues) @ Q.mT


def blocks(G: Tensor) -> Tensor:
    """A gradient as (count, WIDTH, WIDTH)."""
    rows, columns = G.shape
    return G.view(rows // WIDTH, WIDTH, columns // WIDTH, WIDTH).transpose(1, 2).reshape(-1, WIDTH, WIDTH)


def training(beta2: float, moments: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Factors L and R (count, d, d) of every block, and the gradients that they precondition, at the given steps."""
    torch.manual_seed(0)
    text = read_text(None, CONTEXT)
    embedding = Embedding(len(text.vocabulary), WIDTH)
    body = nn.Sequential(
        Position(CONTEXT, WIDTH), *(Block(WIDTH, 4, LAYERS, Shards()) for _ in range(LAYERS)), nn.LayerNorm(WIDTH)
    )
    params = [*embedding.parameters(), *body.parameters()]
    matrices = [p for block in list(body)[1:-1] for p in block.parameters() if p.ndim == 2]
    hp = ShampooHyperParams(beta2=beta2, matrix_eps=1e-6, block_size=WIDTH)
    optimizer = Shampoo(params, lr=1e-2, hyperparams=hp)
    factors = torch.zeros(())
    for t in range(1, max(moments) + 1):
        starts = torch.randint(len(text.train) - CONTEXT, (BATCH, 1))
        window = text.train[starts + torch.arange(CONTEXT + 1)].long()
        optimizer.zero_grad()
        loss(embedding(body(embedding(window[:, :-1]))), window[:, 1:]).backward()
        G = torch.cat([blocks(p.grad) for p in matrices])
        sides = torch.cat([G, G.mT])
        factors = beta2 * factors + (1.0 if beta2 == 1.0 else 1 - beta2) * sides @ sides.mT
        if t in moments:
            yield factors.clone(), sides
        optimizer.step()


# ---- accuracy ----


class Reference:
    """The definition in float64, of matrices (count, n, n) in the dtype that the methods see."""

    def __init__(self, A: Tensor) -> None:
        self.values, self.Q = torch.linalg.eigh(A.double())
        self.largest = self.values[:, -1:]
        self.least = torch.finfo(A.dtype).eps * self.largest

    def power(self, exponent: float, eps: float) -> Tensor:
        values = (self.values.maximum(self.least) + eps * self.largest).pow(exponent)
        return (self.Q * values[:, None, :]) @ self.Q.mT


def norm(X: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(X)


def judged(A: Tensor, reference: Reference, p: int, eps: float, method: str, G: Tensor) -> Tensor:
    """Relative error, 1 - cos of the direction P G, residual ``||P^p L - I||_F / sqrt(n)``, failure: (4, count)."""
    roots, failed = inverse_roots(A, p, eps, method=method)
    P, exact = roots.double(), reference.power(-1 / p, eps)
    error = norm(P - exact) / norm(exact)
    # From the distance of unit vectors, which keeps the digits that 1 - cos itself would lose.
    u, v = P @ G, exact @ G
    angle = norm(u / norm(u)[:, None, None] - v / norm(v)[:, None, None]).square() / 2
    product = torch.linalg.matrix_power(P, p) @ reference.power(1, eps)
    residual = norm(product - torch.eye(A.shape[-1], dtype=torch.float64)) / A.shape[-1] ** 0.5
    return torch.stack([error, angle, residual, failed.double()])


def short(x: float) -> str:
    return f"{x:.1e}".replace("e-0", "e-").replace("e+0", "e")


def synthetic_rows(quick: bool) -> Iterator[str]:
    for dtype, kind in itertools.product(SIZES, CONDITIONS):
        for n in SIZES[dtype]:
            if n > (256 if quick else 1024) and (quick or kind not in ("1e8", "rank n/4")):
                continue
            A = synthetic(kind, n, 4 if n <= 64 else 1).to(dtype)
            reference = Reference(A)
            G = reference.power(0.5, 0.0) @ torch.randn(n, n, generator=torch.Generator().manual_seed(1)).double()
            for p, eps, method in itertools.product(EXPONENTS, RIDGES, METHODS):
                if (n > 1024 and p != 4) or (n > 512 and eps != RIDGES[0]):
                    continue
                *worst, failed = judged(A, reference, p, eps, method, G).unbind()
                numbers = " ".join(short(float(x.max())) for x in worst)
                case = f"{str(dtype)[6:]} {kind.replace(' ', '_')} {n} {p} {eps:g} {method}"
                yield f"{case} {numbers} {int(failed.sum())}"


def training_rows() -> Iterator[str]:
    for beta2 in (0.95, 1.0):
        ((A, G),) = training(beta2, (TRAINED,))
        reference = Reference(A)
        for p, eps, method in itertools.product(EXPONENTS, RIDGES, METHODS):
            *measures, failed = judged(A, reference, p, eps, method, G.double()).unbind()
            numbers = " ".join(f"{short(float(x.median()))} {short(float(x.max()))}" for x in measures)
            yield f"{beta2:g} {p} {eps:g} {method} {numbers} {int(failed.sum())}"


# ---- cost ----


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def cost_rows(quick: bool) -> Iterator[str]:
    for n in TIMED:
        if quick and n > 256:
            continue
        count = max(1, min(256, 2**19 // n**2))
        A = synthetic("1e8", n, count).float()
        repeats = 5 if n < 512 else 1
        for p, method in itertools.product((1, 2, 3, 4, 6, 8), METHODS):
            if refusal(method, p, False) or (n >= 512 and p not in (2, 4)):
                continue
            inverse_roots(A[:1], p, 1e-6, method=method)
            gemm = cpu_seconds(lambda A=A: torch.bmm(A, A), 5)
            seconds = cpu_seconds(lambda A=A, p=p, m=method: inverse_roots(A, p, 1e-6, method=m), repeats)
            yield f"{n} {p} {method} {1e3 * seconds / count:.3g} {seconds / gemm:.3g}"


# ---- warm start ----


def warm_rows() -> Iterator[str]:
    """Coupled Newton from the root of earlier statistics, in float64: what could be won, and what comes out."""
    for beta2 in (0.95, 1.0):
        (old, _), (near, _), (now, _) = training(beta2, (TRAINED - 10, TRAINED - 1, TRAINED))
        for (age, before), p in itertools.product(((1, near), (10, old)), (1, 2, 4)):
            start, target = Reference(before), Reference(now)
            previous, half = start.power(-1 / p, 1e-6), start.power(-0.5, 1e-6)
            M = half @ target.power(1.0, 1e-6) @ half
            values = torch.linalg.eigvalsh(M)
            condition = (values[:, -1] / values[:, 0]).median()
            scale = values[:, -1, None, None]
            X, M = previous / scale ** (1 / p), M / scale
            for _ in range(60):
                T = ((p + 1) * torch.eye(WIDTH, dtype=torch.float64) - M) / p
                X, M = X @ T, torch.linalg.matrix_power(T, p) @ M
            exact = target.power(-1 / p, 1e-6)
            stale, error = norm(previous - exact) / norm(exact), norm(X - exact) / norm(exact)
            numbers = (values[:, 0].min(), values[:, -1].median(), values[:, -1].max(), condition, stale.median())
            yield f"{beta2:g} {age} {p} {' '.join(short(float(x)) for x in (*numbers, error.median(), error.max()))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    parser.add_argument("--quick", action="store_true", help="leave out sizes above 256")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trained = f"GPT of width {WIDTH}, {LAYERS} layers, {TRAINED} steps, blocks of {WIDTH}"
    tables = {
        "cost": (
            "float32, one thread, CPU milliseconds per matrix, condition 1e8, eps 1e-6",
            "n p method milliseconds gemm_equivalents",
            cost_rows(arguments.quick),
        ),
        "training": (
            f"float32, factors of a {trained}",
            "beta2 p eps method error_median error_max 1-cos_median 1-cos_max residual_median residual_max failed",
            training_rows(),
        ),
        "warm_start": (
            f"float64, eps 1e-6, coupled Newton from the root of earlier factors of a {trained}",
            "beta2 steps_ago p smallest_eigenvalue largest_median largest condition stale_error error error_max",
            warm_rows(),
        ),
        "synthetic": (
            "worst of 4 matrices up to n = 64, one above",
            "dtype condition n p eps method error 1-cos residual failed",
            synthetic_rows(arguments.quick),
        ),
    }
    result = setting()
    for name, (how, columns, rows) in tables.items():
        print(f"--- {name}: {columns}", flush=True)
        kept = []
        for row in rows:
            print(row, flush=True)
            kept.append(row)
        result[name] = {"setting": how, "columns": columns, "rows": kept}
        if arguments.out:
            write(arguments.out, result)


if __name__ == "__main__":
    main()
