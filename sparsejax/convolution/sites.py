"""Active sites as a list of rows, sorted by sample and key, with a static capacity."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.sparse_conv.reference import rows_of
from sparsejax.convolution.checks import check_array, whole_number
from sparsejax.convolution.masked import SiteMask, active_sites
from sparsejax.convolution.site_keys import (
    LAST_KEY,
    as_int32,
    check_places,
    check_shape,
    first_of_equals,
    inside,
    places,
    ravel,
    unravel,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("batch", "keys", "feats", "count", "overflow"),
    meta_fields=("shape", "batch_size"),
)
@dataclasses.dataclass(frozen=True)
class Sites:
    """Features at active sites: one row each, empty rows at the end.

    Args:
        batch: int32 (capacity,), the sample of each row, ascending; `batch_size` for empty rows.
        keys: int32 (capacity,), row-major place in the sample's grid, ascending within a sample.
        feats: float (capacity, channels); zeros in empty rows.
        count: int32, rows in use.
        overflow: bool, whether there were more sites than rows; the last ones were dropped.
        shape: the grid of one sample, static.
        batch_size: samples, static.
    """

    batch: jax.Array
    keys: jax.Array
    feats: jax.Array
    count: jax.Array
    overflow: jax.Array
    shape: tuple[int, ...]
    batch_size: int

    @property
    def capacity(self) -> int:
        """Rows."""
        return self.keys.shape[0]

    @property
    def used(self) -> jax.Array:
        """Bool (capacity, 1), False for empty rows; the mask for norms."""
        return (jnp.arange(self.capacity) < self.count)[:, None]

    @property
    def coords(self) -> jax.Array:
        """Int32 (capacity, dimensions); zeros in empty rows."""
        return jnp.where(self.used, unravel(self.keys, self.shape), 0)

    def with_feats(self, feats: jax.Array) -> "Sites":
        """The same sites with other features, (capacity, any)."""
        if feats.ndim != 2 or feats.shape[0] != self.capacity:
            raise ValueError(f"feats have shape {feats.shape}; needed is ({self.capacity}, channels)")
        return dataclasses.replace(self, feats=feats)


def from_coords(
    batch: jax.Array,
    coords: jax.Array,
    feats: jax.Array,
    *,
    shape: tuple[int, ...],
    batch_size: int,
    capacity: int,
    valid: jax.Array | None = None,
    duplicates: str = "sum",
) -> Sites:
    """Makes sites from points, whose order does not matter.

    Args:
        batch: int (n,), the sample of each point.
        coords: int (n, dimensions). Points outside `shape`, or of no sample, are left out, those of 64-bit NumPy arrays
            too.
        feats: float (n, channels).
        shape: the grid of one sample, less than 2^31 places.
        batch_size: samples.
        capacity: rows of the result. If there are more sites, `overflow` is set and those of the highest sample and key
            are dropped; see `check_overflow`.
        valid: bool (n,), False for points to leave out.
        duplicates: "sum", "mean" or "max" of points at one site.

    Returns:
        The sites.

    Raises:
        ValueError: shapes or dtypes do not fit, or a sample's grid is too large.

    Points of one site are added up in an order that GPUs may change from run to run, unless the flag
    `--xla_gpu_deterministic_ops=true` is in XLA_FLAGS; without duplicates, and elsewhere, the bits are always the same.

    Example:
        >>> sites = from_coords(jnp.array([0, 0, 0]), jnp.array([[2], [0], [2]]), jnp.array([[1.0], [5.0], [2.0]]),
        ...     shape=(4,), batch_size=1, capacity=3)
        >>> sites.keys[:2].tolist(), sites.feats[:, 0].tolist(), int(sites.count)
        ([0, 2], [5.0, 3.0, 0.0], 2)
    """
    shape = check_shape(shape)
    capacity, batch_size = whole_number("capacity", capacity, 0), whole_number("batch_size", batch_size, 0)
    check_array("batch", batch, jnp.integer)
    check_array("coords", coords, jnp.integer)  # positions must be rounded to places of the grid
    check_array("feats", feats)
    points = len(feats)
    if batch.shape != (points,) or coords.shape != (points, len(shape)) or feats.ndim != 2:
        raise ValueError(
            f"batch has shape {batch.shape}, coords {coords.shape}, feats {feats.shape}; needed are (n,), "
            f"(n, {len(shape)}) and (n, channels)"
        )
    if valid is not None:
        check_array("valid", valid, jnp.bool_, (points,))
    if duplicates not in ("sum", "mean", "max"):
        raise ValueError(f"duplicates is {duplicates!r}; allowed are 'sum', 'mean' and 'max'")
    batch, coords, feats = as_int32(batch), as_int32(coords), jnp.asarray(feats)
    there = inside(coords, shape) & (batch >= 0) & (batch < batch_size)
    there = there if valid is None else there & valid
    batch = jnp.where(there, batch, batch_size)
    keys = jnp.where(there, ravel(jnp.where(there[:, None], coords, 0), shape), LAST_KEY)
    batch, keys, order = jax.lax.sort((batch, keys, jnp.arange(points, dtype=jnp.int32)), num_keys=2)
    place, count = places(batch, keys, batch_size)
    there = batch < batch_size
    place = jnp.where(there, place, capacity)
    feats = jnp.where(there[:, None], feats[order], 0)
    rows = jnp.where(first_of_equals(batch, keys), place, capacity)
    if duplicates == "max":
        merged = jnp.full((capacity, feats.shape[1]), -jnp.inf, feats.dtype).at[place].max(feats, mode="drop")
        merged = jnp.where((jnp.arange(capacity) < count)[:, None], merged, 0)
    else:
        merged = jnp.zeros((capacity, feats.shape[1]), jnp.promote_types(feats.dtype, jnp.float32))
        merged = merged.at[place].add(feats, mode="drop")
        if duplicates == "mean":
            number = jnp.zeros(capacity, jnp.int32).at[place].add(1, mode="drop")
            merged = merged / jnp.maximum(number, 1)[:, None]
        merged = merged.astype(feats.dtype)
    return Sites(
        jnp.full(capacity, batch_size, jnp.int32).at[rows].set(batch, mode="drop"),
        jnp.full(capacity, LAST_KEY, jnp.int32).at[rows].set(keys, mode="drop"),
        merged,
        jnp.minimum(count, capacity),
        count > capacity,
        shape,
        batch_size,
    )


def from_mask(x: jax.Array, mask: jax.Array | SiteMask, *, capacity: int) -> Sites:
    """Makes sites from a dense array and a mask; values elsewhere are not read.

    Args:
        x: float (samples, *shape, channels).
        mask: bool (samples, *shape), True = active; or a `SiteMask`.
        capacity: rows of the result, as in `from_coords`.

    Returns:
        The sites.

    Raises:
        ValueError: shapes or dtypes do not fit, or there are 2^31 places or more.

    Example:
        >>> x = jnp.arange(4.0).reshape(1, 4, 1)
        >>> from_mask(x, x[..., 0] > 1, capacity=3).feats[:, 0].tolist()
        [2.0, 3.0, 0.0]
    """
    check_array("x", x)
    mask = active_sites(x, mask)[..., 0] if isinstance(mask, SiteMask) else mask
    check_array("mask", mask, jnp.bool_, x.shape[:-1])
    shape, capacity = check_shape(mask.shape[1:]), whole_number("capacity", capacity, 0)
    samples, size = len(mask), check_places(len(mask), shape)
    flat = mask.reshape(-1)
    [row] = jnp.nonzero(flat, size=capacity, fill_value=samples * size)
    row = row.astype(jnp.int32)
    there = row < samples * size
    count = jnp.sum(flat, dtype=jnp.int32)
    return Sites(
        jnp.where(there, row // size, samples),
        jnp.where(there, row % size, LAST_KEY),
        rows_of(x.reshape(samples * size, x.shape[-1]), row),
        jnp.minimum(count, capacity),
        count > capacity,
        shape,
        samples,
    )


def to_dense(sites: Sites) -> jax.Array:
    """The dense array (samples, *shape, channels), zeros where no site is.

    Example:
        >>> x = jnp.arange(4.0).reshape(1, 4, 1)
        >>> to_dense(from_mask(x, x[..., 0] > 1, capacity=3))[0, :, 0].tolist()
        [0.0, 0.0, 2.0, 3.0]
    """
    size = check_places(sites.batch_size, sites.shape)
    place = jnp.where(sites.used[:, 0], sites.batch * size + sites.keys, sites.batch_size * size)
    dense = jnp.zeros((sites.batch_size * size, sites.feats.shape[1]), sites.feats.dtype)
    return dense.at[place].set(sites.feats, mode="drop").reshape(sites.batch_size, *sites.shape, sites.feats.shape[1])


def check_overflow(*sites) -> None:
    """Raises a ValueError if sites or tiles did not fit their capacity; call it outside jit.

    Args:
        *sites: `Sites` or `TileSet`s.
    """
    for number, each in enumerate(sites):
        if np.any(np.asarray(each.overflow)):
            raise ValueError(
                f"argument {number}, a {type(each).__name__} of capacity {each.capacity}, had more entries than that, "
                "and the last ones were dropped; make it with a larger capacity"
            )
