"""Working leaf by leaf, so that the working memory of one leaf is free before that of the next is needed."""

import jax
import jax.numpy as jnp


def after(done: jax.Array, array: jax.Array) -> jax.Array:
    """The array, computed only once `done` is known.

    A compiler that sees no order between leaves keeps the working memory of all of them at once.

    Args:
        done: a count, int32 scalar; it is never negative, but the compiler does not know.
        array: any numeric or bool array.

    Returns:
        The same values.

    Example:
        >>> after(jnp.int32(0), jnp.array([1.0, 2.0])).tolist()
        [1.0, 2.0]
    """
    return jnp.where(done >= 0, array, jnp.zeros_like(array))
