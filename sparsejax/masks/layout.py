"""Splitting axes into groups, whatever the sharding: where groups lie across devices, the axis is gathered first."""

import math

import jax
from jax.sharding import NamedSharding, PartitionSpec


def split_axis(x: jax.Array, axis: int, group: int) -> jax.Array:
    """Splits an axis into `(number of groups, group)`, two axes.

    Args:
        x: array of any shape.
        axis: the axis; negative numbers count from the end.
        group: length of a group; divides the axis.

    Returns:
        Array of one more axis.

    Example:
        >>> import jax.numpy as jnp
        >>> split_axis(jnp.zeros((8, 3)), -2, 4).shape
        (2, 4, 3)
    """
    axis %= x.ndim
    x = unshard(x, axis, multiple_of=group)
    return x.reshape(*x.shape[:axis], x.shape[axis] // group, group, *x.shape[axis + 1 :])


def merge_axis(x: jax.Array, axis: int) -> jax.Array:
    """Joins an axis with the next one; undoes `split_axis`.

    Args:
        x: array of two or more axes.
        axis: the first of the two.

    Returns:
        Array of one axis less.

    Example:
        >>> import jax.numpy as jnp
        >>> merge_axis(jnp.zeros((2, 4, 3)), 0).shape
        (8, 3)
    """
    axis %= x.ndim
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def unshard(x: jax.Array, axis: int, *, multiple_of: int = 0) -> jax.Array:
    """Gathers an explicitly sharded axis, unless every device holds a multiple of `multiple_of` entries of it.

    Args:
        x: array of any shape.
        axis: the axis.
        multiple_of: 0 to gather always.

    Returns:
        The array with the axis replicated, or as it was. Automatic shardings are the compiler's business.
    """
    axis %= x.ndim
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis]
    if names is None:
        return x
    shards = math.prod(sharding.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))
    if multiple_of and x.shape[axis] % (shards * multiple_of) == 0:
        return x
    spec = PartitionSpec(*(None if index == axis else entry for index, entry in enumerate(sharding.spec)))
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))


def match_sharding(x: jax.Array, like: jax.Array) -> jax.Array:
    """Gives an array the sharding of another of its shape.

    Args:
        x: the array.
        like: the array whose sharding it gets.

    Returns:
        The array. While traced, only explicit shardings are matched; automatic ones are the compiler's business.
    """
    if isinstance(x, jax.core.Tracer) or isinstance(like, jax.core.Tracer):
        sharding = jax.typeof(like).sharding
        return x if jax.typeof(x).sharding == sharding else jax.sharding.reshard(x, sharding)
    return x if x.sharding.is_equivalent_to(like.sharding, x.ndim) else jax.device_put(x, like.sharding)
