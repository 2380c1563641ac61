"""Convolution over lists of rows, forward and backward, with work that follows the pairs of neighbours."""

from pallas_kernels.sparse_conv.api import IMPLEMENTATIONS, sparse_conv
from pallas_kernels.sparse_conv.lists import PairLists, from_table

__all__ = ["IMPLEMENTATIONS", "PairLists", "from_table", "sparse_conv"]
