"""Parameters that store only what is kept, and smaller ones after whole channels are pruned."""

from sparsejax.parameters.block_sparse import BlockSparse
from sparsejax.parameters.convert import to_dense, to_sparse
from sparsejax.parameters.gradients import apply_updates, value_and_grad
from sparsejax.parameters.nm_sparse import NMSparse
from sparsejax.parameters.repack import repack
from sparsejax.parameters.shrink import ShrinkReport, shrink
from sparsejax.parameters.shrink_groups import Group, Groups, tied_axes
from sparsejax.parameters.shrink_model import model_groups, shrink_model

__all__ = [
    "BlockSparse",
    "Group",
    "Groups",
    "NMSparse",
    "ShrinkReport",
    "apply_updates",
    "model_groups",
    "repack",
    "shrink",
    "shrink_model",
    "tied_axes",
    "to_dense",
    "to_sparse",
    "value_and_grad",
]
