"""Attention over listed tiles of the score matrix, forward and backward, on TPU, GPU and CPU."""

from pallas_kernels.block_sparse_attention.api import block_sparse_attention, explain
from pallas_kernels.block_sparse_attention.lists import BlockLists, causal, from_tiles
from pallas_kernels.block_sparse_attention.options import Aux
from pallas_kernels.block_sparse_attention.rules import dense_mask, with_bits
from pallas_kernels.choice import IMPLEMENTATIONS, Choice

__all__ = [
    "IMPLEMENTATIONS",
    "Aux",
    "BlockLists",
    "Choice",
    "block_sparse_attention",
    "causal",
    "dense_mask",
    "explain",
    "from_tiles",
    "with_bits",
]
