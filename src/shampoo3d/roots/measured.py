"""What a root costs by device and method, measured. Pure data.

In products of two matrices of its size, float32, p = 4, a ridge of 1e-6, by ``benchmarks/roots.py``; other exponents
and methods are in ``benchmarks/results/roots.json``. CUDA is not measured.
"""

COST: dict[str, dict[str, dict[int, float]]] = {
    "cpu": {
        "eigh": {8: 59, 16: 108, 32: 55, 64: 45, 128: 25, 256: 15, 512: 9, 1024: 8},
        "minimax": {8: 77, 16: 110, 32: 86, 64: 72, 128: 50, 256: 37, 512: 32, 1024: 30},
    },
}
