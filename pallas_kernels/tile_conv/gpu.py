"""Convolution over tiles on Hopper GPUs: for each place, products of many tiles with one tap after the other.

XLA puts every tile together with its halo, by gathers that follow the lists. A program owns one place of many tiles and
some output features, and sums over taps and input features: what a tap reads is a matrix, one row a tile, which TMA
fetches wherever in the tiles it lies. The derivative by the input is the same kernel with taps on the other side and
weights transposed, since neighbours are mutual. That by the weights owns some features of one tap and walks over places
and tiles; where there are too few of these to fill the GPU, several programs share the places, and their sums are added
up afterwards, in order. Tiles behind the last one in use are skipped. A stride is taken away first: the places between
two steps become features.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import gpu_ring
from pallas_kernels.gpu_ring import PROGRAMS, ROWS, columns_of, tile_of
from pallas_kernels.tile_conv.geometry import Geometry
from pallas_kernels.tile_conv.unstrided import Offsets, mirrored, offsets_of, unstrided
from pallas_kernels.tile_conv.xla import with_halo

Array = Any

SPLIT_STEPS = 32
"""Fewest steps of 64 tiles that one of several programs sums over."""


def _features(x, axis: int):
    """Zeros behind, so that there are a multiple of 64."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = 0, -x.shape[axis] % ROWS
    return jnp.pad(x, widths) if widths[axis][1] else x


class _Whole:
    """Tiles with their halos as a matrix: a row for each tile, the features of one place after those of another."""

    def __init__(self, x, neighbours, offsets: Offsets, rows: int):
        capacity, *self.sides, _ = x.shape
        low = [max(0, -min(o)) for o in zip(*offsets, strict=True)]
        high = [max(0, max(o)) for o in zip(*offsets, strict=True)]
        used = neighbours[:, neighbours.shape[1] // 2] < capacity
        x = jnp.where(used.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
        whole = _features(with_halo(x, neighbours, low, high), -1)
        self.features = whole.shape[-1]
        self.matrix = gpu_ring.pad(whole.reshape(capacity, -1), rows, 1)
        self.steps = [math.prod(whole.shape[axis + 2 : -1]) for axis in range(len(self.sides))]
        self.taps = jnp.asarray((np.array(offsets) + np.array(low)) @ np.array(self.steps), jnp.int32)
        self.used = jnp.max(jnp.where(used, jnp.arange(1, capacity + 1), 0), initial=0).astype(jnp.int32).reshape(1)

    @property
    def places(self) -> int:
        return math.prod(self.sides)

    def column(self, place, start):
        """The first column of what a tap that starts there reads for a place."""
        for side, step in zip(reversed(self.sides), reversed(self.steps), strict=True):
            start = start + lax.rem(place, jnp.int32(side)) * step
            place = lax.div(place, jnp.int32(side))
        return start * self.features


def _product(x, weights, neighbours, offsets: Offsets, name: str, interpret):
    capacity, outputs = x.shape[0], weights.shape[-1]
    columns = columns_of(outputs + -outputs % ROWS)
    tile = tile_of(2, 2 if capacity > 2 * ROWS else 1, columns, 2)
    whole = _Whole(x, neighbours, offsets, tile.rows)
    weights = _features(_features(weights, 1), 2)
    taps, inputs, wide = weights.shape
    chunks = inputs // ROWS

    def body(refs, i, place, j):
        tiles, kernel, starts, used = refs
        rows = pl.ds(i * tile.rows, tile.rows)

        def copies(t, a, b):
            tap, chunk = lax.div(t, jnp.int32(chunks)), lax.rem(t, jnp.int32(chunks)) * ROWS
            yield tiles.at[rows, pl.ds(whole.column(place, starts[tap]) + chunk, ROWS)], a
            yield kernel.at[tap, pl.ds(chunk, ROWS), pl.ds(j * columns, columns)], b

        def factors(t, a, b, worker, piece):
            del t
            return a.at[pl.ds((worker * tile.pieces + piece) * ROWS, ROWS)], b

        def target(first):
            return pl.ds(i * tile.rows + first, ROWS), pl.ds(place * wide + j * columns, columns)

        return jnp.where(i * tile.rows < used[0], taps * chunks, 0), copies, factors, target

    # Neighbouring programs read the same places, so the cache brings them in once.
    grid = {"row": whole.matrix.shape[0] // tile.rows, "place": whole.places, "column": wide // columns}
    ring = [gpu_ring.shared((tile.stages, *shape), x.dtype) for shape in ((tile.rows, ROWS), (ROWS, columns))]
    result = jax.ShapeDtypeStruct((whole.matrix.shape[0], whole.places * wide), x.dtype)
    operands = whole.matrix, weights, whole.taps, whole.used
    y = gpu_ring.launch(name, body, tile, ring, result, grid, operands, interpret)
    return y[:capacity].reshape(*x.shape[:-1], wide)[..., :outputs]


def _weight_gradient(x, dy, neighbours, offsets: Offsets, interpret):
    whole, inputs, outputs = _Whole(x, neighbours, offsets, ROWS), x.shape[-1], dy.shape[-1]
    dy = _features(dy, -1)
    wide, taps = dy.shape[-1], len(offsets)
    dy = gpu_ring.pad(dy.reshape(len(x), -1), ROWS, 1)
    columns, rows = columns_of(wide), columns_of(whole.features)
    parts, tiles = wide // columns, whole.features // rows
    steps = whole.places * (dy.shape[0] // ROWS)
    splits = max(1, min(PROGRAMS // (taps * parts * tiles), steps // SPLIT_STEPS))
    tile = tile_of(rows // ROWS, 1, columns, 4)

    def body(refs, split, part, tap):
        tiles_ref, dy_ref, starts, used = refs
        down, across = lax.div(part, jnp.int32(parts)), lax.rem(part, jnp.int32(parts))
        chunks = lax.div(used[0] + (ROWS - 1), jnp.int32(ROWS))
        each = lax.div(whole.places * chunks + (splits - 1), jnp.int32(splits))
        first = split * each

        def copies(t, a, b):
            place = lax.div(first + t, chunks)
            at = pl.ds((first + t - place * chunks) * ROWS, ROWS)
            yield tiles_ref.at[at, pl.ds(whole.column(place, starts[tap]) + down * rows, rows)], a
            yield dy_ref.at[at, pl.ds(place * wide + across * columns, columns)], b

        def factors(t, a, b, worker, piece):
            del t
            return a.at[:, pl.ds((worker * tile.pieces + piece) * ROWS, ROWS)].transpose((1, 0)), b

        def target(first):
            return split, tap, pl.ds(down * rows + first, ROWS), pl.ds(across * columns, columns)

        return jnp.clip(whole.places * chunks - first, 0, each), copies, factors, target

    grid = {"split": splits, "part": parts * tiles, "tap": taps}
    ring = [gpu_ring.shared((tile.stages, ROWS, width), x.dtype) for width in (rows, columns)]
    result = jax.ShapeDtypeStruct((splits, taps, whole.features, wide), jnp.float32)
    operands = whole.matrix, dy, whole.taps, whole.used
    found = gpu_ring.launch("tile_conv_dweights", body, tile, ring, result, grid, operands, interpret)
    return found.sum(0)[:, :inputs, :outputs]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _convolve(x, weights, neighbours, offsets, interpret):
    """(capacity, *tile, in) and (taps, in, out) to (capacity, *tile, out): the tap reads at its offset."""
    return _product(x, weights, neighbours, offsets, "tile_conv_forward", interpret)


def _convolve_forward(x, weights, neighbours, offsets, interpret):
    return _convolve(x, weights, neighbours, offsets, interpret), (x, weights, neighbours)


def _convolve_backward(offsets, interpret, saved, dy):
    x, weights, neighbours = saved
    dy = dy.astype(x.dtype)
    dx = _product(dy, weights.swapaxes(1, 2), neighbours, mirrored(offsets), "tile_conv_dx", interpret)
    dw = _weight_gradient(x, dy, neighbours, offsets, interpret)
    return dx, dw.astype(weights.dtype), None


_convolve.defvjp(_convolve_forward, _convolve_backward)


def convolve(x: Array, weights: Array, neighbours: Array, geometry: Geometry, *, interpret: Any = None) -> Array:
    """(capacity, *tile_out, out) in the dtype of x; arguments as `supports` accepts them.

    Args:
        x, weights, neighbours, geometry: as for `tile_conv`; in a row that is not in use all neighbours are missing,
            the tile itself too.
        interpret: None, or `plgpu.InterpretGPUParams(...)` to run on any machine (JAX 0.12).
    """
    return _convolve(*unstrided(x, weights, geometry), neighbours, offsets_of(geometry)[0], interpret)


def supports(x: Array, weights: Array, neighbours: Array, geometry: Geometry) -> str | None:
    """None, or why this path refuses the call."""
    del weights, neighbours
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {x.dtype}; the tensor cores take bfloat16 or float16"
    if geometry.groups > 1:
        return f"{geometry.groups} feature groups, whose products are too small for the tensor cores"
    if not x.size:
        return "there are no tiles"
    return None
