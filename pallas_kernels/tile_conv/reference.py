"""Convolution over tiles, tap by tap: for every place in a tile, which place of which neighbour the tap reads."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.tile_conv.geometry import Geometry


def supports(x: jax.Array, weights: jax.Array, neighbours: jax.Array, geometry: Geometry) -> None:
    """None: the reference takes every call."""
    del x, weights, neighbours, geometry


def convolve(x: jax.Array, weights: jax.Array, neighbours: jax.Array, geometry: Geometry) -> jax.Array:
    """Adds up the taps, in the accumulation type."""
    count, dims = len(x), geometry.dims
    flat = x.reshape(count, -1, x.shape[-1])
    padded = jnp.concatenate([flat, jnp.zeros_like(flat[:1])])
    table = jnp.concatenate([neighbours, jnp.full_like(neighbours[:1], count)])
    places = list(itertools.product(*(range(size) for size in geometry.tile_out)))
    out = 0.0
    for tap in itertools.product(*(range(size) for size in geometry.window)):
        tiles, inside = [], []
        for place in places:
            at = [
                p * s - low + t * d
                for p, s, low, t, d in zip(place, geometry.stride, geometry.low, tap, geometry.dilation, strict=True)
            ]
            cells = [divmod(a, size) for a, size in zip(at, geometry.tile, strict=True)]
            tiles.append(sum((cell + 1) * 3 ** (dims - 1 - axis) for axis, (cell, _) in enumerate(cells)))
            inside.append(int(np.ravel_multi_index([rest for _, rest in cells], geometry.tile)))
        rows = padded[table[:count, np.array(tiles)], np.array(inside)]
        rows = rows.reshape(*rows.shape[:2], geometry.groups, -1)
        kernel = weights[tap].reshape(weights.shape[-2], geometry.groups, -1)
        kind = jnp.promote_types(x.dtype, jnp.float32)
        out = out + jnp.einsum("npgi,igo->npgo", rows, kernel, preferred_element_type=kind)
    return out.reshape(count, *geometry.tile_out, weights.shape[-1])
