"""Convolution over tiles in plain JAX: each tile is put together with its halo, then one VALID convolution runs.

Only border strips are gathered from neighbours. If tile b is the neighbour of a in some direction, a is that of b in
the opposite one: the derivative of the gather is a gather, so nothing is scattered and all runs give the same bits.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import channels_last
from pallas_kernels.tile_conv.geometry import Geometry


def supports(x: jax.Array, weights: jax.Array, neighbours: jax.Array, geometry: Geometry) -> None:
    """None: this path takes every call."""
    del x, weights, neighbours, geometry


def convolve(x: jax.Array, weights: jax.Array, neighbours: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolves tiles with their halos, in the accumulation type."""
    dims = geometry.dims
    high = tuple(max(0, reach) for reach in geometry.high)
    whole = with_halo(x, neighbours, geometry.low, high)
    # A stride larger than the window leaves the end of a tile unread.
    trimmed = whole[(slice(None), *(slice(None, reach if reach < 0 else None) for reach in geometry.high))]
    kind = jnp.promote_types(x.dtype, jnp.float32)
    around = ((0, 0),) * dims
    return channels_last.convolve(
        trimmed.astype(kind), weights.astype(kind), geometry.stride, around, geometry.dilation, geometry.groups
    )


def with_halo(x, neighbours, low, high):
    """Tiles (n, *tile, c) with `low` and `high` more places around, read from the tiles next to them."""
    dims = len(low)

    def build(direction):
        axis = len(direction)
        if axis == dims:
            strip = x[(slice(None), *map(_strip, direction, low, high, x.shape[1:-1]))]
            if not any(direction):
                return strip
            return _next(strip, neighbours[:, _number(direction)], neighbours[:, _number([-d for d in direction])])
        present = [step for step, size in ((-1, low[axis]), (0, 1), (1, high[axis])) if size]
        return jnp.concatenate([build((*direction, step)) for step in present], axis=axis + 1)

    return build(())


def _strip(step: int, low: int, high: int, size: int) -> slice:
    return {-1: slice(size - low, size), 0: slice(None), 1: slice(0, high)}[step]


def _number(direction) -> int:
    """Place of a direction among the 3^n of a table of neighbours."""
    return sum((step + 1) * 3 ** (len(direction) - 1 - axis) for axis, step in enumerate(direction))


@jax.custom_vjp
def _next(strips, towards, back):
    del back
    return jnp.take(strips, towards, axis=0, mode="fill", fill_value=0)


def _next_forward(strips, towards, back):
    return _next(strips, towards, back), (towards, back)


def _next_backward(saved, gradient):
    towards, back = saved
    nothing = np.zeros(towards.shape, jax.dtypes.float0)
    return _next(gradient, back, towards), nothing, nothing


_next.defvjp(_next_forward, _next_backward)


def directions(dims: int) -> list[tuple[int, ...]]:
    """The 3^dims directions in the order of the tables of neighbours."""
    return list(itertools.product((-1, 0, 1), repeat=dims))
