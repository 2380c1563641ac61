"""Products with matrices that store n of every m neighbouring inputs, forward and backward, on TPU, GPU and CPU."""

from pallas_kernels.choice import IMPLEMENTATIONS, Choice
from pallas_kernels.nm_matmul.api import explain, nm_matmul
from pallas_kernels.nm_matmul.positions import from_dense, pack_positions, to_dense, unpack_positions

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "explain",
    "from_dense",
    "nm_matmul",
    "pack_positions",
    "to_dense",
    "unpack_positions",
]
