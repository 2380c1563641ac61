"""Parameters that store only what is kept."""

from sparsejax.parameters.block_sparse import BlockSparse
from sparsejax.parameters.convert import to_dense, to_sparse
from sparsejax.parameters.gradients import apply_updates, value_and_grad
from sparsejax.parameters.nm_sparse import NMSparse

__all__ = ["BlockSparse", "NMSparse", "apply_updates", "to_dense", "to_sparse", "value_and_grad"]
