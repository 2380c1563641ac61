"""Masks: structures, exact selection, how much each layer keeps, which leaves are sparse, and packing."""

from sparsejax.masks.block import Block as Block
from sparsejax.masks.channel import Channel as Channel
from sparsejax.masks.counts import exact_fraction as exact_fraction
from sparsejax.masks.counts import keep_count as keep_count
from sparsejax.masks.counts import layer_counts as layer_counts
from sparsejax.masks.counts import share as share
from sparsejax.masks.counts import share_floor as share_floor
from sparsejax.masks.counts import to_ppm as to_ppm
from sparsejax.masks.distributions import erdos_renyi as erdos_renyi
from sparsejax.masks.distributions import erdos_renyi_kernel as erdos_renyi_kernel
from sparsejax.masks.distributions import erk_plus as erk_plus
from sparsejax.masks.distributions import global_ as global_
from sparsejax.masks.distributions import layerwise as layerwise
from sparsejax.masks.distributions import uniform as uniform
from sparsejax.masks.distributions import uniform_plus as uniform_plus
from sparsejax.masks.nm import NM as NM
from sparsejax.masks.packing import pack_mask as pack_mask
from sparsejax.masks.packing import unpack_mask as unpack_mask
from sparsejax.masks.select import select_top as select_top
from sparsejax.masks.select import select_top_global as select_top_global
from sparsejax.masks.unstructured import Unstructured as Unstructured
