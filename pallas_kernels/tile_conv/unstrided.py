"""Convolutions over tiles as kernels of accelerators take them: without a stride, a list of taps, each at an offset."""

import itertools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.tile_conv.geometry import Geometry

Array = Any
Offsets = tuple[tuple[int, ...], ...]
"""Where each tap reads, from its place."""


def offsets_of(geometry: Geometry) -> tuple[Offsets, np.ndarray]:
    """Offsets without a stride, and for each of them and each place between two steps its tap, int (offsets, places).

    The number of taps stands for none.

    Example:
        >>> offsets, taps = offsets_of(Geometry((4,), (3,), (2,), (1,), (0,)))
        >>> offsets, taps.tolist()
        (((0,), (1,)), [[0, 1], [2, 3]])
    """
    taps = list(itertools.product(*(range(size) for size in geometry.window)))
    found: dict[tuple[int, ...], np.ndarray] = {}
    for number, tap in enumerate(taps):
        at = np.array(tap) * geometry.dilation - np.array(geometry.low)
        offset = tuple(int(o) for o in at // np.array(geometry.stride))
        place = np.ravel_multi_index(tuple(at % np.array(geometry.stride)), geometry.stride)
        found.setdefault(offset, np.full(math.prod(geometry.stride), len(taps)))[place] = number
    return tuple(found), np.stack(list(found.values()))


def unstrided(x: Array, weights: Array, geometry: Geometry) -> tuple[Array, Array]:
    """Tiles (capacity, *tile_out, places * in) and weights (offsets, places * in, out), in the dtype of x.

    Places between two steps become features.
    """
    _, taps = offsets_of(geometry)
    inputs, outputs = weights.shape[-2:]
    weights = weights.astype(x.dtype).reshape(-1, inputs, outputs)
    if math.prod(geometry.stride) == 1:
        return x, weights
    weights = jnp.take(weights, taps, axis=0, mode="fill", fill_value=0).reshape(len(taps), -1, outputs)
    dims = geometry.dims
    split = [n for pair in zip(geometry.tile_out, geometry.stride, strict=True) for n in pair]
    order = 0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2), 2 * dims + 1
    return x.reshape(len(x), *split, inputs).transpose(order).reshape(len(x), *geometry.tile_out, -1), weights


def mirrored(offsets: Offsets) -> Offsets:
    """The offsets of the derivative by x."""
    return tuple(tuple(-o for o in offset) for offset in offsets)
