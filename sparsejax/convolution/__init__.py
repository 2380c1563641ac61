"""Sparse convolution: three engines with the same parameters, and one result at active sites.

`masked_conv` works on dense arrays, `tile_conv` on the tiles that are active, `sparse_conv` on lists of sites.
"""

from pallas_kernels.sparse_conv import KernelMap as KernelMap
from sparsejax.convolution.masked import SiteMask as SiteMask
from sparsejax.convolution.masked import apply_mask as apply_mask
from sparsejax.convolution.masked import masked_conv as masked_conv
from sparsejax.convolution.masked import masked_global_pool as masked_global_pool
from sparsejax.convolution.masked import masked_pool as masked_pool
from sparsejax.convolution.masked import random_patch_mask as random_patch_mask
from sparsejax.convolution.norms import masked_batch_norm as masked_batch_norm
from sparsejax.convolution.norms import masked_group_norm as masked_group_norm
from sparsejax.convolution.norms import masked_layer_norm as masked_layer_norm
from sparsejax.convolution.norms import sites_group_norm as sites_group_norm
from sparsejax.convolution.plan import ConvPlan as ConvPlan
from sparsejax.convolution.plan import conv_plan as conv_plan
from sparsejax.convolution.site_conv import sites_global_pool as sites_global_pool
from sparsejax.convolution.site_conv import sparse_conv as sparse_conv
from sparsejax.convolution.site_conv import sparse_pool as sparse_pool
from sparsejax.convolution.site_maps import strided_map as strided_map
from sparsejax.convolution.site_maps import subm_map as subm_map
from sparsejax.convolution.sites import Sites as Sites
from sparsejax.convolution.sites import check_overflow as check_overflow
from sparsejax.convolution.sites import from_coords as from_coords
from sparsejax.convolution.sites import from_mask as from_mask
from sparsejax.convolution.sites import to_dense as to_dense
from sparsejax.convolution.tiles import TileSet as TileSet
from sparsejax.convolution.tiles import from_tiles as from_tiles
from sparsejax.convolution.tiles import tile_conv as tile_conv
from sparsejax.convolution.tiles import tile_set as tile_set
from sparsejax.convolution.tiles import to_tiles as to_tiles
