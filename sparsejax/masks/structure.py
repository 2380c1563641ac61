"""What all structures have in common: scores are pooled into units, units are chosen, and their mask is spread."""

import functools

import jax

from sparsejax.masks.layout import match_sharding


def build_mask(structure, scores: jax.Array, count: int | jax.Array) -> jax.Array:
    """The mask that keeps `count` units of a structure, compiled once for each structure and shape.

    Args:
        structure: one of the structures, or any hashable object with `pool`, `choose` and `spread`.
        scores: real array.
        count: how many units are kept.

    Returns:
        Bool array with the shape and sharding of `scores`.

    Example:
        >>> import jax.numpy as jnp
        >>> from sparsejax.masks.block import Block
        >>> build_mask(Block((1, 2)), jnp.array([[1.0, 2.0, 3.0, 4.0]]), 1).tolist()
        [[False, False, True, True]]
    """
    return match_sharding(_build_mask(structure, scores, count), scores)


@functools.partial(jax.jit, static_argnums=0)
def _build_mask(structure, scores: jax.Array, count: int | jax.Array) -> jax.Array:
    return structure.spread(structure.choose(structure.pool(scores), count), scores.shape, like=scores)
