"""In what order things are computed, and whether: one leaf after the other, and only when it is time."""

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


def run_if(due, then, otherwise):
    """`jax.lax.cond`, without compiling anything where `due` is already known.

    Args:
        due: a bool, or a bool scalar, traced or not.
        then: function without arguments.
        otherwise: function without arguments, of the same result types.

    Returns:
        The result of one of them.
    """
    if isinstance(due, jax.core.Tracer):
        return jax.lax.cond(due, then, otherwise)
    return then() if due else otherwise()
