"""Common GPUs by their data sheets, with assumed efficiencies: nothing here was measured."""

from __future__ import annotations

from .hardware import Curve, Hardware, Link

EFFICIENCY = {
    "float64": {64: 0.2, 128: 0.4, 256: 0.5, 512: 0.6},
    "float32": {64: 0.2, 128: 0.4, 256: 0.5, 512: 0.6},
    "bfloat16": {64: 0.02, 128: 0.08, 256: 0.2, 512: 0.4, 1024: 0.5, 4096: 0.65},
}
"""Share of the peak that batched products reach, by the side of one."""
MEMORY = LINK = 0.8
"""Share of their bandwidth that operations on single elements and collectives reach."""
TRAINING = 0.4
"""Share of the peak in bfloat16 that forward and backward passes reach."""
DECOMPOSED = 0.02
"""Share of the peak in float32 that batched decompositions reach, which are many small operations in a row."""
DECOMPOSITIONS = {"eigh": 6.5, "qr": 4 / 3}
"""Multiply-adds of a decomposition, in cubes of the side."""
OPERATION, KERNEL, STEP, TENSOR, SHARD = 5e-6, 2e-6, 5e-4, 2e-5, 5e-5
INSIDE, BETWEEN = 10e-6, 20e-6
"""Latencies of a hop."""


def _gpu(
    name: str, peaks: tuple[float, float, float], memory: float, inside: float, between: float, node: int = 8
) -> Hardware:
    """Describe a GPU by its data sheet.

    Args:
        peaks: 10^12 operations per second in float64, float32 and bfloat16 (dense).
        memory, inside, between: 10^9 bytes per second, of the links in one direction.
    """
    peak = {dtype: of * 1e12 / 2 for dtype, of in zip(EFFICIENCY, peaks, strict=True)}
    return Hardware(
        name,
        {dtype: Curve({d: share * peak[dtype] for d, share in of.items()}) for dtype, of in EFFICIENCY.items()},
        Curve({1: MEMORY * memory * 1e9}),
        {
            kind: Curve({d: cubes * d**3 / (DECOMPOSED * peak["float32"]) for d in (32, 1024)})
            for kind, cubes in DECOMPOSITIONS.items()
        },
        OPERATION,
        KERNEL,
        STEP,
        TENSOR,
        SHARD,
        Link(INSIDE, LINK * inside * 1e9),
        Link(BETWEEN, LINK * between * 1e9),
        node,
        TRAINING * peak["bfloat16"],
    )


PRESETS = {
    "a100": _gpu("NVIDIA A100 80GB SXM", (19.5, 19.5, 312), 2039, 300, 25),
    "h100": _gpu("NVIDIA H100 SXM", (67, 67, 989), 3350, 450, 50),
    "h200": _gpu("NVIDIA H200 SXM", (67, 67, 989), 4800, 450, 50),
    "b200": _gpu("NVIDIA B200", (37, 75, 2250), 8000, 900, 50),
    "mi300x": _gpu("AMD Instinct MI300X", (163.4, 163.4, 1307), 5300, 448, 50),
}
"""Floating-point peaks are those of plain PyTorch: float32 without TF32."""
