"""Products with matrices of which only some blocks are stored, forward and backward, on TPU, GPU and CPU."""

from pallas_kernels.block_sparse_matmul.api import block_sparse_matmul, explain
from pallas_kernels.block_sparse_matmul.lists import BlockLists, block_lists, from_dense, to_dense
from pallas_kernels.choice import IMPLEMENTATIONS, Choice

__all__ = [
    "IMPLEMENTATIONS",
    "BlockLists",
    "Choice",
    "block_lists",
    "block_sparse_matmul",
    "explain",
    "from_dense",
    "to_dense",
]
