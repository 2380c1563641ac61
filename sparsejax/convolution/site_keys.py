"""Sites as numbers: a sample and, inside its grid, a row-major key of 32 bits; searches for them in sorted lists."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.convolution.checks import whole_number

LAST_KEY = np.int32(2**31 - 1)

# Up to this many places a table with one entry for each is quicker than searching; it takes 16 MiB.
GRID_PLACES = 2**22


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """`shape` as ints; a ValueError if the places of one sample do not fit 32-bit keys."""
    shape = tuple(whole_number("a size of shape", size) for size in shape)
    if not shape or math.prod(shape) >= LAST_KEY:
        raise ValueError(
            f"shape {shape} has {math.prod(shape)} places; a sample's grid needs at least one dimension and between 1 "
            f"and {LAST_KEY - 1} places: coarsen it, or cut it into several samples"
        )
    return shape


def check_places(samples: int, shape: tuple[int, ...]) -> int:
    """Places of one sample; a ValueError if those of all do not fit 32 bits, as a dense array's must."""
    if samples * math.prod(shape) >= LAST_KEY:
        raise ValueError(f"a dense array of {samples} samples of shape {shape} is too large")
    return math.prod(shape)


def as_int32(numbers: jax.Array | np.ndarray) -> jax.Array:
    """Integers of any dtype as int32. What is beyond these becomes their end, which is in no grid."""
    own, ends = np.iinfo(numbers.dtype), np.iinfo(np.int32)
    # NumPy's 64 bits must be cut before JAX, which may have 32 only, sees them.
    return jnp.asarray(numbers.clip(max(own.min, ends.min), min(own.max, ends.max)).astype(np.int32))


def ravel(coords: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Row-major keys, int32 (...), of coordinates int32 (..., dimensions) that lie inside `shape`."""
    key = jnp.zeros(coords.shape[:-1], jnp.int32)
    for axis, size in enumerate(shape):
        key = key * size + coords[..., axis].astype(jnp.int32)
    return key


def unravel(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Coordinates, int32 (..., dimensions), of keys int32 (...)."""
    coords = []
    for size in reversed(shape):
        coords.append(keys % size)
        keys = keys // size
    return jnp.stack(coords[::-1], axis=-1)


def inside(coords: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Whether coordinates lie in the grid, bool (...)."""
    return jnp.all((coords >= 0) & (coords < jnp.array(shape)), axis=-1)


def unique(batch: jax.Array, keys: jax.Array, samples: int, capacity: int):
    """Sorts pairs (sample, key) and drops duplicates; pairs of sample `samples` are empty.

    Args:
        batch: int32 (n,), samples.
        keys: int32 (n,).
        samples: how many samples there are.
        capacity: how many pairs are kept, the smallest.

    Returns:
        `(batch, keys, count, overflow)`: (capacity,), (capacity,), int32, bool.
    """
    batch, keys = jax.lax.sort((batch, keys), num_keys=2)
    place, count = places(batch, keys, samples)
    place = jnp.where(first_of_equals(batch, keys) & (batch < samples), place, capacity)
    return (
        jnp.full(capacity, samples, jnp.int32).at[place].set(batch, mode="drop"),
        jnp.full(capacity, LAST_KEY, jnp.int32).at[place].set(keys, mode="drop"),
        jnp.minimum(count, capacity),
        count > capacity,
    )


def first_of_equals(batch: jax.Array, keys: jax.Array) -> jax.Array:
    """In a sorted list of pairs, whether each is the first of its kind."""
    differs = (batch[1:] != batch[:-1]) | (keys[1:] != keys[:-1])
    return jnp.concatenate([jnp.ones(min(1, len(keys)), bool), differs])


def places(batch: jax.Array, keys: jax.Array, samples: int) -> tuple[jax.Array, jax.Array]:
    """In a sorted list of pairs, the number of each among the distinct ones, and how many of these there are."""
    new = first_of_equals(batch, keys) & (batch < samples)
    return jnp.cumsum(new, dtype=jnp.int32) - 1, jnp.sum(new, dtype=jnp.int32)


def look_up(
    batch: jax.Array,
    keys: jax.Array,
    samples: int,
    size: int,
    wanted_batch: jax.Array,
    wanted_keys: jax.Array,
    wanted: jax.Array,
    *,
    grid: bool,
) -> jax.Array:
    """Rows of pairs in a sorted list.

    Args:
        batch: int32 (n,), samples of the list.
        keys: int32 (n,), its keys.
        samples: how many samples there are.
        size: places of a sample's grid.
        wanted_batch: int32 (...), samples to find.
        wanted_keys: int32 (...), their keys.
        wanted: bool (...), False for what shall not be found.
        grid: True for a table with an entry for each place, False for a binary search.

    Returns:
        int32 (...): the row, n for what is not there.
    """
    count = len(keys)
    if count == 0 or samples == 0:
        return jnp.full(wanted.shape, count, jnp.int32)
    if grid:
        at = jnp.where(batch < samples, batch * size + keys, samples * size)
        table = jnp.full(samples * size, count, jnp.int32).at[at].set(jnp.arange(count, dtype=jnp.int32), mode="drop")
        at = jnp.where(wanted, wanted_batch * size + wanted_keys, samples * size)
        return table.at[at].get(mode="fill", fill_value=count)
    starts = jnp.searchsorted(batch, jnp.arange(samples + 1, dtype=jnp.int32)).astype(jnp.int32)
    sample = jnp.clip(wanted_batch, 0, samples - 1)
    low, end = starts[sample], starts[sample + 1]

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        less = keys[jnp.minimum(middle, count - 1)] < wanted_keys
        searching = low < high
        return jnp.where(searching & less, middle + 1, low), jnp.where(searching & ~less, middle, high)

    row, _ = jax.lax.fori_loop(0, count.bit_length(), halve, (low, end))
    found = wanted & (row < end) & (keys[jnp.minimum(row, count - 1)] == wanted_keys)
    return jnp.where(found, row, count).astype(jnp.int32)
