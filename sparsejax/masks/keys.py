"""Scores as numbers that can be compared: integers in the order of any dtype, floats wide enough to add up."""

import jax
import jax.numpy as jnp
from jax import lax


def sort_keys(x: jax.Array) -> jax.Array:
    """Unsigned integers in the order of `x`; -0.0 and 0.0 are equal, NaN is 0, below -inf.

    They are worked out on the bits, because a CPU that flushes subnormal numbers to zero would take them for ties.

    Args:
        x: real array of any shape.

    Returns:
        Array of unsigned integers as wide as `x` (wider for 8-bit floats and 4-bit integers), of its shape and
        sharding.

    Raises:
        TypeError: `x` is not real.

    Example:
        >>> sort_keys(jnp.array([jnp.nan, -jnp.inf, -0.0, 0.0])).tolist()
        [0, 8388608, 2147483648, 2147483648]
    """
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    if not jnp.issubdtype(x.dtype, jnp.floating) and not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"scores must be real numbers, got {x.dtype}; take a magnitude first")
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    if jnp.finfo(x.dtype).bits <= 8 if is_float else jnp.iinfo(x.dtype).bits < 8:
        # Small floats differ in where they put NaN, small integers are no whole bytes; wider, all are alike and exact.
        x = x.astype(jnp.float32 if is_float else jnp.int8)
    bits = 8 * x.dtype.itemsize
    unsigned, signed = jnp.dtype(f"uint{bits}"), jnp.dtype(f"int{bits}")
    middle = unsigned.type(1 << (bits - 1))
    if x.dtype == unsigned:
        return x
    if x.dtype == signed:
        return lax.bitcast_convert_type(x, unsigned) ^ middle
    # Sign and magnitude become two's complement, where the two zeros meet; an offset then makes that unsigned.
    raw = lax.bitcast_convert_type(x, signed)
    sign = raw >> signed.type(bits - 1)
    magnitude = raw & jnp.iinfo(signed).max
    keys = lax.bitcast_convert_type((magnitude ^ sign) - sign, unsigned) ^ middle
    infinity = lax.bitcast_convert_type(jnp.array(jnp.inf, x.dtype), signed)
    return jnp.where(magnitude > infinity, unsigned.type(0), keys)


def as_float(x: jax.Array) -> jax.Array:
    """Converts to float32 what is no float or a narrower one, so that sums of scores keep their small differences.

    Args:
        x: real array.

    Returns:
        float32 or float64 array.

    Example:
        >>> as_float(jnp.ones(2, jnp.bfloat16)).dtype
        dtype('float32')
    """
    wide = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4
    return x if wide else x.astype(jnp.float32)
