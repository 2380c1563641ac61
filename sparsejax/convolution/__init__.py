"""Sparse convolution: three engines with the same parameters, and one result at active sites.

`masked_conv` works on dense arrays, `tile_conv` on the tiles that are active, `sparse_conv` on lists of sites.
"""

from pallas_kernels.sparse_conv import KernelMap
from sparsejax.convolution.masked import (
    SiteMask,
    apply_mask,
    masked_conv,
    masked_global_pool,
    masked_pool,
    random_patch_mask,
)
from sparsejax.convolution.norms import masked_batch_norm, masked_group_norm, masked_layer_norm, sites_group_norm
from sparsejax.convolution.plan import ConvPlan, conv_plan
from sparsejax.convolution.site_conv import sites_global_pool, sparse_conv, sparse_pool
from sparsejax.convolution.site_maps import strided_map, subm_map
from sparsejax.convolution.sites import Sites, check_overflow, from_coords, from_mask, to_dense
from sparsejax.convolution.tiles import TileSet, from_tiles, tile_conv, tile_set, to_tiles

__all__ = [
    "ConvPlan",
    "KernelMap",
    "SiteMask",
    "Sites",
    "TileSet",
    "apply_mask",
    "check_overflow",
    "conv_plan",
    "from_coords",
    "from_mask",
    "from_tiles",
    "masked_batch_norm",
    "masked_conv",
    "masked_global_pool",
    "masked_group_norm",
    "masked_layer_norm",
    "masked_pool",
    "random_patch_mask",
    "sites_global_pool",
    "sites_group_norm",
    "sparse_conv",
    "sparse_pool",
    "strided_map",
    "subm_map",
    "tile_conv",
    "tile_set",
    "to_dense",
    "to_tiles",
]
