"""Masks that choose element by element."""

import dataclasses

import jax
import jax.numpy as jnp

from sparsejax.masks.counts import keep_count
from sparsejax.masks.select import refill_top, select_top


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Every element is kept or pruned by itself.

    Example:
        >>> Unstructured().mask(jnp.array([[4.0, 1.0], [2.0, 3.0]]), 0.5).tolist()
        [[True, False], [False, True]]
    """

    fixed_density = None

    def mask(self, scores: jax.Array, sparsity: float) -> jax.Array:
        """Keeps the elements with the largest scores.

        Args:
            scores: real array of any shape.
            sparsity: fraction of elements pruned, counted exactly as written.

        Returns:
            Bool array with the shape and sharding of `scores` and `keep_count(scores.size, sparsity)` entries True;
            ties go to the lower flat index.
        """
        scores = jnp.asarray(scores)
        return select_top(scores, keep_count(scores.size, sparsity))

    def check(self, shape: tuple[int, ...], path: str = "") -> None:
        """Accepts every shape."""

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the array of units: `shape` itself."""
        return tuple(shape)

    def pool(self, scores: jax.Array) -> jax.Array:
        """Scores of the units: the scores themselves."""
        return jnp.asarray(scores)

    def spread(self, unit_mask: jax.Array, shape: tuple[int, ...], *, like: jax.Array | None = None) -> jax.Array:
        """Mask of the elements from the mask of the units: the same."""
        return unit_mask

    def choose(self, unit_scores: jax.Array, count: int | jax.Array, *, where: jax.Array | None = None) -> jax.Array:
        """The `count` best units among those that `where` allows; see `select_top`."""
        return select_top(unit_scores, count, where=where)

    def refill(
        self, unit_scores: jax.Array, kept: jax.Array, count: int | jax.Array, *, where: jax.Array | None = None
    ) -> jax.Array:
        """`kept` and the best other units, so that there are `count`; see `refill_top`."""
        return refill_top(unit_scores, kept, count, where=where)
