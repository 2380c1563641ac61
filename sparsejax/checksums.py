"""Integer checksums of arrays, computed where they lie."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np


def checksums(leaves: Mapping[str, object]) -> dict[str, tuple[int, int | None]]:
    """Checksums of arrays, computed where they lie: nothing is gathered, and the sharding does not change the result.

    Every element's bits are mixed with its row-major position by a bijection of 32 bits, and the results are summed
    modulo 2**32: a change within one word of 32 bits always changes the sum, any other change goes unseen with
    probability 2**-32.

    Args:
        leaves: `{name: array or Python number}`.

    Returns:
        `{name: (checksum, nnz)}`; nnz is the number of True entries of a bool array, else None.

    Example:
        >>> import numpy as np
        >>> checksums({"host": np.arange(3, dtype=np.int32)})
        {'host': (602481317, None)}
    """
    results: dict[str, tuple] = {}
    by_devices: dict[frozenset, dict[str, jax.Array]] = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, jax.Array):
            by_devices.setdefault(frozenset(leaf.sharding.device_set), {})[name] = leaf
        else:
            results[name] = _checksum(np.asarray(leaf), np)
    for group in by_devices.values():  # one computation cannot span arrays on different sets of devices
        results |= jax.device_get(_device_checksums(group))
    return {name: (int(results[name][0]), _int_or_none(results[name][1])) for name in leaves}


def _int_or_none(value):
    return None if value is None else int(value)


@jax.jit
def _device_checksums(leaves):
    return {name: _checksum(leaf, jnp) for name, leaf in leaves.items()}


def _checksum(array, xp):
    nnz = xp.sum(array, dtype=xp.int32 if xp is jnp else xp.int64) if array.dtype == bool else None
    return bits_checksum(array, xp), nnz


def bits_checksum(array, xp=jnp):
    """The checksum of one array, as `checksums` describes it, as a uint32 scalar; inside `jit` too.

    Args:
        array: an array; typed random keys only where `xp` is `jax.numpy`.
        xp: `jax.numpy` or `numpy`, whichever the array is of.

    Example:
        >>> int(bits_checksum(jnp.arange(3)))
        602481317
    """
    words = _words(array, xp)
    position, stride = xp.uint32(0), 1
    for axis in reversed(range(words.ndim)):
        position = position + _iota(words.shape, axis, xp) * xp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    mixed = words ^ (position * xp.uint32(0x9E3779B9) + xp.uint32(0x7F4A7C15))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the finalizer of MurmurHash3, a bijection
        mixed = (mixed ^ (mixed >> xp.uint32(shift))) * xp.uint32(factor)
    return xp.sum(mixed ^ (mixed >> xp.uint32(16)), dtype=xp.uint32)


def _iota(shape, axis, xp):
    if xp is jnp:
        return jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return np.arange(shape[axis], dtype=np.uint32).reshape([-1 if i == axis else 1 for i in range(len(shape))])


def _words(array, xp):
    """The bits of an array as uint32, of at least one axis; 64-bit elements get a trailing axis of two words."""
    if xp is jnp and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = xp.stack([xp.real(array), xp.imag(array)], axis=-1)
    array = array[None] if array.ndim == 0 else array
    if array.dtype == bool:
        return array.astype(xp.uint32)
    if xp is np:
        words = np.ascontiguousarray(array).view(f"uint{8 * min(array.dtype.itemsize, 4)}")
        words = words.reshape(*array.shape, -1) if array.dtype.itemsize > 4 else words
        return words.astype(np.uint32)
    info = jnp.finfo(array.dtype) if jnp.issubdtype(array.dtype, jnp.floating) else jnp.iinfo(array.dtype)
    width = f"uint{min(info.bits, 32)}"
    return jax.lax.bitcast_convert_type(array, width).astype(jnp.uint32)
