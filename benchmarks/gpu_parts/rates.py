"""Roots, statistics and directions as parts of the rate at which the device multiplies stacks of matrices.

A root takes as long as so many products of its own size ("GEMM equivalents"). Its FLOPs are those of the products that
it is made of; of an eigen-decomposition 9 n^3 are counted, as in textbooks, and 2 n^3 for putting the root together.
Their part of the GEMM rate is the time that as many FLOPs take in ``torch.bmm`` of the same stack and precision, over
the time of the root.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from gpu_parts.bench import FAULT, OK, Bench, Found
from roots import Reference, norm, synthetic
from step import Case, Clock, products
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from shampoo3d import Computation
from shampoo3d.numerics.matmul_precision import full_products, reduced_products
from shampoo3d.numerics.roots import inverse_roots
from shampoo3d.settings.computation import RootMethod

P = 2  # of the default preset
CONDITION, UNLIKE = "1e8", 2
IN_A_ROW = 10
"""Products that are timed together, so that launches are hidden."""
Precision = Callable[[], AbstractContextManager[None]]
PRECISIONS: dict[str, tuple[Precision, tuple[float, ...]]] = {
    "float32": (full_products, (1e-5, 1e-4)),
    "TF32": (reduced_products, (1e-4,)),
}
"""Contexts, and ridges of roots; with smaller ones than 1e-4 roots use all digits whatever the context."""
WORST = 0.2
"""The error above which there is a fault: minimax knows the ridge to a tenth only, and TF32 has three digits."""


def stack_of(n: int, bench: Bench) -> tuple[Tensor, Tensor]:
    """Return a few matrices on the CPU, and on the device many that are like them."""
    few = synthetic(CONDITION, n, UNLIKE).float()
    count = max(UNLIKE, bench.size.elements // n**2)
    return few, few.to(bench.device).repeat(-(-count // UNLIKE), 1, 1)


def gemm_seconds(A: Tensor, clock: Clock, repeats: int) -> float:
    out = torch.empty_like(A)
    return clock.median(lambda: [torch.bmm(A, A, out=out) for _ in range(IN_A_ROW)], repeats) / IN_A_ROW


def gemm(bench: Bench, clock: Clock) -> Found:
    for n in bench.size.roots:
        A = stack_of(n, bench)[1]
        row: dict[str, float] = {"n": n, "matrices": len(A)}
        for name, (precision, _) in PRECISIONS.items():
            with precision():
                row[f"{name} TFLOP/s"] = 2 * n**3 * len(A) / gemm_seconds(A, clock, bench.size.repeats) / 1e12
        row["bfloat16 TFLOP/s"] = 2 * n**3 * len(A) / gemm_seconds(A.bfloat16(), clock, bench.size.repeats) / 1e12
        yield "batched GEMM", row


def flops_of(work: Callable[[], object], method: str, A: Tensor) -> float:
    if method == "eigh":
        return 11.0 * A.shape[-1] ** 3 * len(A)
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def roots(bench: Bench, clock: Clock) -> Found:
    for name, n, method in _cases(bench):
        precision, ridges = PRECISIONS[name]
        few, many = stack_of(n, bench)
        with precision():
            gemm = gemm_seconds(many, clock, bench.size.repeats) / len(many)
        # Libraries decompose large matrices one after the other, or nearly: some of them tell what one takes.
        A = many[: max(UNLIKE, len(many) // 4)] if method == "eigh" else many
        for eps in ridges[:1] if method == "eigh" else ridges:

            def work(A: Tensor = A, eps: float = eps, method: RootMethod = method) -> tuple[Tensor, Tensor]:
                return inverse_roots(A, P, eps, method=method)

            with precision():
                found, failed = work()
                flops = flops_of(work, method, A) / len(A)
                repeats = 1 if method == "eigh" or bench.left() < bench.seconds / 2 else bench.size.repeats
                seconds = clock.median(work, repeats) / len(A)
            exact = Reference(few).power(-1 / P, eps)
            error = float((norm(found[:UNLIKE].cpu().double() - exact) / norm(exact)).max())
            sound = not failed.any() and error <= WORST
            row = {
                "n": n,
                "matrices": len(A),
                "method": method,
                "products": name,
                "ridge": eps,
                "ms per matrix": 1e3 * seconds,
                "GEMM equivalents": seconds / gemm,
                "part of the GEMM rate": flops / (2 * n**3) * gemm / seconds,
                "error": error,
                "verdict": OK if sound else f"{FAULT}: error {error:.2g}, {int(failed.sum())} failed",
            }
            yield "roots", row


def _cases(bench: Bench) -> Iterator[tuple[str, int, RootMethod]]:
    methods: tuple[RootMethod, ...] = ("minimax", "eigh")
    for method in methods:  # the one that the package takes on a GPU first
        for n in bench.size.roots:
            for name in PRECISIONS if method == "minimax" else ("float32",):
                if bench.left() > 0:
                    yield name, n, method


def stacks(bench: Bench, clock: Clock) -> Found:
    """Statistics and directions of one layer, as parts of the rate of float32 products."""
    width, blocks = bench.size.stacks
    for block in blocks:
        for name, (precision, _) in PRECISIONS.items():
            for kept in ("state", "bfloat16"):
                if bench.left() < 0:
                    return
                computation = Computation(products="bfloat16" if kept == "bfloat16" else "state")
                with precision():
                    found = products(Case(width, block, 1), bench.size.repeats, 4, bench.device, computation)
                yield (
                    "statistics and directions",
                    {
                        "width": width,
                        "block": block,
                        "PyTorch's switch": name,
                        "Computation(products=...)": kept,
                        "bmm TFLOP/s": found["bmm_gflops_per_second"] / 1e3,
                        "bmm ms": 1e3 * found["bmm_seconds"],
                        "ms": 1e3 * found["stack_seconds"],
                        "of the bmm rate": found["stack_fraction"],
                        "step without roots, ms": 1e3 * found["plain_step_seconds"],
                    },
                )


def rates(bench: Bench) -> Found:
    """Roots and products as parts of the rate of batched GEMM."""
    clock = Clock(bench.device)
    yield from gemm(bench, clock)
    yield from stacks(bench, clock)
    yield from roots(bench, clock)
