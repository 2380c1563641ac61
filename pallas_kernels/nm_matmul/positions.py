"""Which inputs an N:M matrix stores: positions within groups, as inputs, as a dense matrix, and as few bits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.nm_matmul.shapes import Sizes

Array = Any


def sizes_of(values: Array, positions: Array, n: int, m: int, share: int) -> Sizes:
    """Static sizes of the matrix, checked against the shapes of its leaves.

    Raises:
        ValueError: naming the argument, its shape and what is allowed.
    """
    if not (1 <= n <= m <= 256 and share >= 1):
        raise ValueError(f"n={n}, m={m}, share={share}; needed are 1 <= n <= m <= 256 and share >= 1")
    shape = jnp.shape(values)
    if len(shape) != 2 or not shape[0] or shape[0] % n:
        raise ValueError(f"values has shape {shape}; it must be [inputs / m * n, outputs] with n={n}")
    if not shape[1] or shape[1] % share:
        raise ValueError(f"values has {shape[1]} columns; their number must be a multiple of share={share}")
    if jnp.shape(positions) != (shape[0], shape[1] // share):
        raise ValueError(
            f"positions has shape {jnp.shape(positions)}; values {shape} and share={share} need "
            f"{(shape[0], shape[1] // share)}"
        )
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"positions has dtype {positions.dtype}; it must be an integer array")
    return Sizes(shape[0] // n * m, shape[1], n, m, share)


def inputs_of(positions: Array, sizes: Sizes) -> Array:
    """The input that each stored row meets, int32 [K n / m, N / share]."""
    first = jnp.arange(sizes.stored, dtype=jnp.int32)[:, None] // sizes.n * sizes.m
    return first + positions.astype(jnp.int32)


def to_dense(values: Array, positions: Array, *, n: int, m: int, share: int = 1) -> Array:
    """The matrix [K, N] with zeros where nothing is stored.

    Example:
        >>> to_dense(jnp.array([[1.0], [2.0]]), jnp.array([[0], [3]], jnp.uint8), n=2, m=4).ravel().tolist()
        [1.0, 0.0, 0.0, 2.0]
    """
    sizes = sizes_of(values, positions, n, m, share)
    place = jnp.repeat(positions, share, axis=1).reshape(sizes.groups, n, 1, sizes.outputs)
    here = place.astype(jnp.int32) == jnp.arange(m)[:, None]
    return jnp.where(here, values.reshape(sizes.groups, n, 1, -1), 0).sum(1).reshape(sizes.inputs, -1)


def from_dense(w: Array, positions: Array, *, n: int, m: int, share: int = 1) -> Array:
    """The stored values [K n / m, N] of a matrix [K, N].

    Example:
        >>> from_dense(jnp.arange(4.0)[:, None], jnp.array([[1], [3]], jnp.uint8), n=2, m=4).ravel().tolist()
        [1.0, 3.0]
    """
    sizes = Sizes(w.shape[0], w.shape[1], n, m, share)
    return jnp.take_along_axis(w, jnp.repeat(inputs_of(positions, sizes), share, axis=1), axis=0)


def _bits(m: int) -> int:
    """Bits of a packed position; a power of two, so that none lies across bytes."""
    return next(bits for bits in (1, 2, 4, 8) if m <= 2**bits)


def pack_positions(positions: Array, m: int) -> Array:
    """Positions below m in 1, 2, 4 or 8 bits each, for storage: uint8 [rows / (8 / bits) rounded up, columns].

    Example:
        >>> pack_positions(np.array([[0], [3], [1], [2]], np.uint8), 4).tolist()
        [[156]]
    """
    each = 8 // _bits(m)
    xp = jnp if isinstance(positions, jax.Array) else np
    wide = xp.pad(positions.astype(np.uint8), ((0, -positions.shape[0] % each), (0, 0)))
    shift = (xp.arange(each) * _bits(m)).astype(np.uint8)[:, None]
    parts = wide.reshape(-1, each, wide.shape[1]) << shift
    return parts.sum(1).astype(np.uint8)


def unpack_positions(packed: Array, m: int, rows: int) -> Array:
    """The positions that `pack_positions` packed, uint8 [rows, columns].

    Example:
        >>> unpack_positions(np.array([[156]], np.uint8), 4, 4).ravel().tolist()
        [0, 3, 1, 2]
    """
    each = 8 // _bits(m)
    xp = jnp if isinstance(packed, jax.Array) else np
    shift = (xp.arange(each) * _bits(m)).astype(np.uint8)[:, None]
    parts = (packed[:, None] >> shift) & np.uint8(2 ** _bits(m) - 1)
    return parts.reshape(-1, packed.shape[1])[:rows]
