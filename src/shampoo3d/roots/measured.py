"""What a root costs by device and method, measured. Pure data.

In products of two matrices of its size, float32, p = 4, a ridge of 1e-6, by ``benchmarks/roots.py``; other exponents
and methods are in ``benchmarks/results/roots.json``. CUDA is not measured.
"""

COST: dict[str, dict[str, dict[int, float]]] = {
    "cpu": {
        "eigh": {8: 59, 16: 108, 32: 82, 64: 44, 128: 24, 256: 12},
        "minimax": {8: 77, 16: 108, 32: 90, 64: 68, 128: 47, 256: 36},
    },
}
