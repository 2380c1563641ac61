"""Flax NNX modules."""

from sparsejax.nn.attention_fn import attention_fn
from sparsejax.nn.masked_layers import MaskedBatchNorm, MaskedConv
from sparsejax.nn.optimizer import Optimizer
from sparsejax.nn.site_layers import InverseSparseConv, SiteBatchNorm, StridedSparseConv, SubmanifoldConv
from sparsejax.nn.sparse_attention import SparseAttention
from sparsejax.nn.sparse_conv import SparseConv
from sparsejax.nn.sparse_kernel import Indices, SparseKernel, merge, split
from sparsejax.nn.sparse_linear import SparseLinear
from sparsejax.nn.sparse_mlp import SparseMLP
from sparsejax.nn.sparsify_model import sparsify_model

__all__ = [
    "Indices",
    "InverseSparseConv",
    "MaskedBatchNorm",
    "MaskedConv",
    "Optimizer",
    "SiteBatchNorm",
    "SparseAttention",
    "SparseConv",
    "SparseKernel",
    "SparseLinear",
    "SparseMLP",
    "StridedSparseConv",
    "SubmanifoldConv",
    "attention_fn",
    "merge",
    "sparsify_model",
    "split",
]
