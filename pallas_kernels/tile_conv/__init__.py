"""Convolution over the tiles of an array that are there, forward and backward, with work that follows their number."""

from pallas_kernels.tile_conv.api import tile_conv
from pallas_kernels.tile_conv.geometry import Geometry
from pallas_kernels.tile_conv.xla import directions

__all__ = ["Geometry", "directions", "tile_conv"]
