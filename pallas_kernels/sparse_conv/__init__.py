"""Convolution over lists of rows, forward and backward, with work that follows the pairs of neighbours."""

from pallas_kernels.sparse_conv.api import explain, sparse_conv
from pallas_kernels.sparse_conv.lists import KernelMap, PairLists, pair_lists

__all__ = ["KernelMap", "PairLists", "explain", "pair_lists", "sparse_conv"]
