"""Active tiles of a dense array, kept together: a layer's work follows their number."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import tile_conv as kernel
from sparsejax.convolution.checks import check_array, whole_number
from sparsejax.convolution.shapes import per_dimension


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("ids", "neighbours", "count", "overflow"),
    meta_fields=("batch_size", "grid", "tile"),
)
@dataclasses.dataclass(frozen=True)
class TileSet:
    """The active tiles of (samples, *shape): a list with static capacity.

    Args:
        ids: int32 (capacity,), row-major over samples and grid, ascending; `batch_size * prod(grid)` for empty rows.
        neighbours: int32 (capacity, 3^dimensions), for each tile the row of the next one in every direction.
        count: int32, rows in use.
        overflow: bool, whether there were more tiles than rows; the last ones were dropped.
        batch_size: samples, static.
        grid: tiles along each dimension, static.
        tile: sides of a tile, static.
    """

    ids: jax.Array
    neighbours: jax.Array
    count: jax.Array
    overflow: jax.Array
    batch_size: int
    grid: tuple[int, ...]
    tile: tuple[int, ...]

    @property
    def capacity(self) -> int:
        """Rows."""
        return self.ids.shape[0]

    @property
    def used(self) -> jax.Array:
        """Bool (capacity,), False for empty rows."""
        return jnp.arange(self.capacity) < self.count

    def strided(self, stride: int | Sequence[int]) -> "TileSet":
        """The same tiles after a convolution with this stride, which makes them smaller.

        Raises:
            ValueError: the stride does not divide a side.
        """
        steps = per_dimension("stride", stride, len(self.tile))
        if any(size % step for size, step in zip(self.tile, steps, strict=True)):
            raise ValueError(f"stride {steps} does not divide tiles of {self.tile}; take larger tiles")
        return dataclasses.replace(self, tile=tuple(size // s for size, s in zip(self.tile, steps, strict=True)))


def tile_set(mask: jax.Array, tile: int | Sequence[int], *, capacity: int) -> TileSet:
    """Lists the active tiles.

    Args:
        mask: bool (samples, *grid), one entry for each tile, True = active.
        tile: sides of a tile.
        capacity: rows; `int(mask.sum())` fits exactly, a power of two above it saves recompiling.

    Returns:
        The tiles.

    Example:
        >>> tiles = tile_set(jnp.array([[True, False, True, True]]), 8, capacity=4)
        >>> tiles.ids.tolist(), tiles.neighbours[:3].tolist()
        ([0, 2, 3, 4], [[4, 0, 4], [4, 1, 2], [1, 2, 4]])
    """
    check_array("mask", mask, jnp.bool_)
    capacity = whole_number("capacity", capacity, 0)
    samples, *grid = mask.shape
    sides = per_dimension("tile", tile, len(grid))
    total = samples * math.prod(grid)
    flat = mask.reshape(-1)
    ids = jnp.nonzero(flat, size=capacity, fill_value=total)[0].astype(jnp.int32)
    row = jnp.full(total, capacity, jnp.int32).at[ids].set(jnp.arange(capacity, dtype=jnp.int32), mode="drop")
    row = row.reshape(samples, *grid)
    padded = jnp.pad(row, ((0, 0), *((1, 1) for _ in grid)), constant_values=capacity)
    columns = []
    for direction in kernel.directions(len(grid)):
        shifted = padded[(slice(None), *(slice(1 + d, 1 + d + size) for d, size in zip(direction, grid, strict=True)))]
        columns.append(jnp.take(shifted.reshape(-1), ids, mode="fill", fill_value=capacity))
    count = jnp.sum(flat, dtype=jnp.int32)
    neighbours = jnp.stack(columns, axis=1)
    return TileSet(ids, neighbours, jnp.minimum(count, capacity), count > capacity, samples, tuple(grid), sides)


def to_tiles(x: jax.Array, tiles: TileSet) -> jax.Array:
    """Takes the active tiles out of a dense array.

    Args:
        x: (samples, *shape, channels), where shape is grid times tile.
        tiles: the tiles.

    Returns:
        (capacity, *tile, channels); zeros in empty rows.
    """
    shape = tuple(count * size for count, size in zip(tiles.grid, tiles.tile, strict=True))
    if x.shape[:-1] != (tiles.batch_size, *shape):
        raise ValueError(f"x has shape {x.shape}; these tiles need ({tiles.batch_size}, {shape}, channels)")
    dims = len(shape)
    split = [size for pair in zip(tiles.grid, tiles.tile, strict=True) for size in pair]
    order = (0, *range(1, 2 * dims + 1, 2), *range(2, 2 * dims + 1, 2), 2 * dims + 1)
    cut = x.reshape(tiles.batch_size, *split, x.shape[-1]).transpose(order)
    cut = cut.reshape(-1, *tiles.tile, x.shape[-1])
    return jnp.take(cut, tiles.ids, axis=0, mode="fill", fill_value=0)


def from_tiles(x: jax.Array, tiles: TileSet) -> jax.Array:
    """Puts tiles back into a dense array, zeros elsewhere; the inverse of `to_tiles` on active tiles.

    Args:
        x: (capacity, *tile, channels).
        tiles: the tiles.

    Returns:
        (samples, *shape, channels).
    """
    if x.shape[:-1] != (tiles.capacity, *tiles.tile):
        raise ValueError(f"x has shape {x.shape}; these tiles need ({tiles.capacity}, {tiles.tile}, channels)")
    dims, channels = len(tiles.grid), x.shape[-1]
    total = tiles.batch_size * math.prod(tiles.grid)
    cut = jnp.zeros((total, *tiles.tile, channels), x.dtype).at[tiles.ids].set(x, mode="drop")
    cut = cut.reshape(tiles.batch_size, *tiles.grid, *tiles.tile, channels)
    pairs = [axis for d in range(dims) for axis in (1 + d, 1 + dims + d)]
    shape = [count * size for count, size in zip(tiles.grid, tiles.tile, strict=True)]
    return cut.transpose(0, *pairs, 2 * dims + 1).reshape(tiles.batch_size, *shape, channels)


def tile_conv(
    x: jax.Array,
    weights: jax.Array,
    tiles: TileSet,
    *,
    bias: jax.Array | None = None,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    implementation: str | None = None,
) -> jax.Array:
    """`masked_conv` with padding "SAME" on tiles that stay together from layer to layer.

    Args:
        x: float (capacity, *tile, in), from `to_tiles` or another layer. Sites outside the tiles count as zeros.
        weights: float (*window, in / groups, out).
        tiles: the tiles. A window must not reach farther than the next tile.
        bias: float (out,), or None.
        stride: steps; must divide the tile's sides. The output belongs to `tiles.strided(stride)`.
        dilation: distance of the taps.
        groups: feature groups.
        implementation: None for the best; "reference", "xla", "tpu" or "gpu" works or raises.

    Returns:
        (capacity, *tile / stride, out) in the dtype of `x`; zeros in empty rows.

    Raises:
        ValueError: shapes do not fit, a window reaches too far, or the named implementation does not take the call.

    Example:
        >>> tiles = tile_set(jnp.array([[True, True, False]]), 2, capacity=2)
        >>> x = to_tiles(jnp.arange(1.0, 7.0).reshape(1, 6, 1), tiles)
        >>> tile_conv(x, jnp.ones((3, 1, 1)), tiles)[..., 0].tolist()
        [[3.0, 6.0], [9.0, 7.0]]
    """
    dims = len(tiles.grid)
    steps, spread = per_dimension("stride", stride, dims), per_dimension("dilation", dilation, dims)
    window = tuple(weights.shape[:-2])
    if len(window) != dims:
        raise ValueError(f"weights have shape {weights.shape}; needed are {dims} sides, in / groups and out")
    # As "SAME" pads the whole array, whose sides are multiples of the stride.
    low = tuple(max(0, (side - 1) * d + 1 - s) // 2 for side, d, s in zip(window, spread, steps, strict=True))
    geometry = kernel.Geometry(tiles.tile, window, steps, spread, low, whole_number("groups", groups))
    return kernel.tile_conv(
        x, weights, tiles.neighbours, tiles.used, geometry, bias=bias, implementation=implementation
    )
