"""Masks that keep or prune whole channels."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sparsejax.masks.counts import keep_count
from sparsejax.masks.keys import as_float
from sparsejax.masks.layout import match_sharding
from sparsejax.masks.select import refill_top, select_top
from sparsejax.masks.structure import build_mask


@dataclasses.dataclass(frozen=True)
class Channel:
    """All elements of one index of an axis are kept or pruned together.

    Args:
        axis: the axis of channels; -1, the outputs, by default.

    Example:
        >>> Channel().mask(jnp.array([[1.0, 4.0], [2.0, 0.0]]), 0.5).tolist()
        [[False, True], [False, True]]

    References:
        Li et al., Pruning Filters for Efficient ConvNets, 2017, section 3.1.
    """

    axis: int = -1
    fixed_density = None

    def mask(self, scores: jax.Array, sparsity: float) -> jax.Array:
        """Keeps the channels with the largest mean score.

        Args:
            scores: real array of one or more axes.
            sparsity: fraction of channels pruned, counted exactly as written.

        Returns:
            Bool array with the shape and sharding of `scores`; ties go to the lower channel.

        Raises:
            ValueError: `scores` has no such axis.
        """
        scores = jnp.asarray(scores)
        self.check(scores.shape)
        count = keep_count(math.prod(self.grid(scores.shape)), sparsity)
        return build_mask(self, scores, count)

    def check(self, shape: tuple[int, ...], path: str = "") -> None:
        """Raises a ValueError that names `path` if a shape has no such axis."""
        if not -len(shape) <= self.axis < len(shape):
            where = f"{path}: " if path else ""
            raise ValueError(
                f"{where}shape {tuple(shape)} has no axis {self.axis} for {self}; choose another axis, or leave it "
                f"dense with rules={{{path or '<path>'!r}: None}}"
            )

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the array of units: the axis of channels, all others 1."""
        axis = self.axis % len(shape)
        return tuple(size if index == axis else 1 for index, size in enumerate(shape))

    def pool(self, scores: jax.Array) -> jax.Array:
        """Scores of the channels: means over all other axes, at least in float32. NaN makes a channel's score NaN."""
        scores = as_float(jnp.asarray(scores))
        others = tuple(index for index in range(scores.ndim) if index != self.axis % scores.ndim)
        return jnp.mean(scores, axis=others, keepdims=True)

    def spread(self, unit_mask: jax.Array, shape: tuple[int, ...], *, like: jax.Array | None = None) -> jax.Array:
        """Mask of the elements from the mask of the channels.

        Args:
            unit_mask: bool array of shape `grid(shape)`.
            shape: shape of the elements.
            like: an array of that shape whose sharding the mask gets.

        Returns:
            Bool array of `shape`.
        """
        mask = jnp.broadcast_to(unit_mask, shape)
        return mask if like is None else match_sharding(mask, like)

    def choose(self, unit_scores: jax.Array, count: int | jax.Array, *, where: jax.Array | None = None) -> jax.Array:
        """The `count` best channels among those that `where` allows; see `select_top`."""
        return select_top(unit_scores, count, where=where)

    def refill(
        self, unit_scores: jax.Array, kept: jax.Array, count: int | jax.Array, *, where: jax.Array | None = None
    ) -> jax.Array:
        """`kept` and the best other channels, so that there are `count`; see `refill_top`."""
        return refill_top(unit_scores, kept, count, where=where)
