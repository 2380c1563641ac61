"""Masks at one bit an entry, for storage and checkpoints."""

import jax
import jax.numpy as jnp

from sparsejax.masks.layout import unshard


def pack_mask(mask: jax.Array) -> jax.Array:
    """Packs eight entries of the last axis into one byte; the number of axes stays, and so does their sharding.

    Args:
        mask: bool array of one or more axes.

    Returns:
        uint8 array of shape `(*mask.shape[:-1], ceil(mask.shape[-1] / 8))`, the first entry in the highest bit (as
        `numpy.packbits`), unused bits 0.

    Raises:
        TypeError: `mask` is not bool.
        ValueError: `mask` has no axis.

    Example:
        >>> pack_mask(jnp.array([[True, False, True], [False, False, True]]))
        Array([[160],
               [ 32]], dtype=uint8)
    """
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"a mask is a bool array, got {mask.dtype}")
    if mask.ndim == 0:
        raise ValueError("a mask of no axes cannot be packed; reshape it to (1,)")
    return jnp.packbits(unshard(mask, -1, multiple_of=8), axis=-1)


def unpack_mask(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The mask that `pack_mask` packed.

    Args:
        packed: uint8 array from `pack_mask`.
        shape: shape of the mask.

    Returns:
        bool array of that shape.

    Raises:
        TypeError: `packed` is not uint8.
        ValueError: `packed` cannot come from a mask of that shape.

    Example:
        >>> unpack_mask(jnp.array([160], jnp.uint8), (3,))
        Array([ True, False,  True], dtype=bool)
    """
    packed, shape = jnp.asarray(packed), tuple(shape)
    if packed.dtype != jnp.uint8:
        raise TypeError(f"a packed mask is a uint8 array, got {packed.dtype}")
    if not shape or packed.shape != (*shape[:-1], -(-shape[-1] // 8)):
        raise ValueError(f"a packed mask of shape {packed.shape} does not hold a mask of shape {shape}")
    if not packed.size:
        return jnp.zeros(shape, jnp.bool_)
    if shape[-1] % 8:
        packed = unshard(packed, -1)
    return jnp.unpackbits(packed, axis=-1, count=shape[-1]).astype(jnp.bool_)
