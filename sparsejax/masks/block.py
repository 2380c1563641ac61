"""Masks that keep or prune rectangular blocks of the last two axes."""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from sparsejax.masks.counts import keep_count
from sparsejax.masks.keys import as_float
from sparsejax.masks.layout import match_sharding, merge_axis, split_axis, unshard
from sparsejax.masks.select import refill_top, select_top
from sparsejax.masks.structure import build_mask


@dataclasses.dataclass(frozen=True)
class Block:
    """The elements of a block of the last two axes are kept or pruned together.

    Blocks at the end of an axis are smaller where the axis is no multiple of the block. Every index of the leading axes
    has blocks of its own; all of them compete.

    Args:
        shape: rows and columns of a block.
        pooling: the score of a block: the "mean", "max" or "l2" norm of the scores of its elements.
        groups: the columns of blocks are split into this many equal groups, each of which keeps the same number of
            blocks (one more in the first of them where the count does not divide). Stored parameters are sharded over
            groups: a mesh axis that divides the groups holds the same number of blocks on every device.

    Raises:
        TypeError: `shape` is no sequence of whole numbers, or `groups` is no whole number.
        ValueError: `shape` is not two positive numbers, `pooling` is none of the three, or `groups` is below 1.

    Example:
        >>> Block((1, 2)).mask(jnp.array([[1.0, 2.0, 3.0], [0.0, 9.0, 4.0]]), 0.5).tolist()
        [[False, False, False], [True, True, True]]

    References:
        Gray, Radford and Kingma, GPU Kernels for Block-Sparse Weights, 2017.
    """

    shape: tuple[int, int]
    pooling: Literal["mean", "max", "l2"] = "mean"
    groups: int = 1
    fixed_density = None

    def __post_init__(self):
        if not isinstance(self.shape, Sequence) or not all(isinstance(side, numbers.Integral) for side in self.shape):
            raise TypeError(f"Block(shape={self.shape!r}): give two whole numbers, rows and columns, as Block((4, 4))")
        if not isinstance(self.groups, numbers.Integral):
            raise TypeError(f"Block(groups={self.groups!r}): give a whole number")
        object.__setattr__(self, "shape", tuple(self.shape))
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f"Block(shape=...) is two positive numbers, rows and columns, got {self.shape}")
        if self.pooling not in ("mean", "max", "l2"):
            raise ValueError(f'Block(pooling=...) is "mean", "max" or "l2", got {self.pooling!r}')
        if self.groups < 1:
            raise ValueError(f"Block(groups=...) is a number of groups, 1 or more, got {self.groups}")

    def mask(self, scores: jax.Array, sparsity: float) -> jax.Array:
        """Keeps the blocks with the largest scores.

        Args:
            scores: real array of two or more axes.
            sparsity: fraction of blocks pruned, counted exactly as written.

        Returns:
            Bool array with the shape and sharding of `scores`; ties go to the lower flat index of blocks.

        Raises:
            ValueError: an axis is shorter than the block.
        """
        scores = jnp.asarray(scores)
        self.check(scores.shape)
        count = keep_count(math.prod(self.grid(scores.shape)), sparsity)
        return build_mask(self, scores, count)

    def check(self, shape: tuple[int, ...], path: str = "") -> None:
        """Raises a ValueError that names `path` if the last two axes of a shape are shorter than a block."""
        if len(shape) < 2 or shape[-2] < self.shape[0] or shape[-1] < self.shape[1]:
            where = f"{path}: " if path else ""
            raise ValueError(
                f"{where}a block of {self.shape} is larger than the last two axes of shape {tuple(shape)}; choose a "
                f"smaller block, or leave it dense with rules={{{path or '<path>'!r}: None}}"
            )
        columns = self.grid(shape)[-1]
        if columns % self.groups:
            where = f"{path}: " if path else ""
            raise ValueError(
                f"{where}the {columns} columns of blocks of shape {tuple(shape)} do not split into {self.groups} equal "
                f"groups for {self}; choose groups that divide {columns}"
            )

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the array of units: the leading axes, and the number of blocks along the last two."""
        return (*shape[:-2], -(-shape[-2] // self.shape[0]), -(-shape[-1] // self.shape[1]))

    def pool(self, scores: jax.Array) -> jax.Array:
        """Scores of the blocks over the elements they really have, at least in float32. NaN makes a score NaN."""
        scores = as_float(jnp.asarray(scores))
        if self.pooling == "max":
            return jnp.max(self._blocks(scores, -jnp.inf), axis=(-3, -1))
        if self.pooling == "l2":
            return jnp.sqrt(jnp.sum(self._blocks(jnp.square(scores), 0), axis=(-3, -1)))
        rows, columns = (
            jnp.minimum(block, size - block * jnp.arange(-(-size // block)))
            for size, block in zip(scores.shape[-2:], self.shape, strict=True)
        )
        return jnp.sum(self._blocks(scores, 0), axis=(-3, -1)) / (rows[:, None] * columns)

    def spread(self, unit_mask: jax.Array, shape: tuple[int, ...], *, like: jax.Array | None = None) -> jax.Array:
        """Mask of the elements from the mask of the blocks.

        Args:
            unit_mask: bool array of shape `grid(shape)`.
            shape: shape of the elements.
            like: an array of that shape whose sharding the mask gets.

        Returns:
            Bool array of `shape`.
        """
        mask = unit_mask
        for axis, block in zip((-2, -1), self.shape, strict=True):
            if shape[axis] % block:
                mask = unshard(mask, axis)
            after = mask.ndim + axis + 1
            mask = jnp.expand_dims(mask, after)
            mask = jnp.broadcast_to(mask, (*mask.shape[:after], block, *mask.shape[after + 1 :]))
            mask = lax.slice_in_dim(merge_axis(mask, after - 1), 0, shape[axis], axis=axis)
        return mask if like is None else match_sharding(mask, like)

    def choose(self, unit_scores: jax.Array, count: int | jax.Array, *, where: jax.Array | None = None) -> jax.Array:
        """The `count` best blocks among those that `where` allows, in each group its share; see `select_top`."""
        return self._in_groups(select_top, unit_scores, count, where)

    def refill(
        self, unit_scores: jax.Array, kept: jax.Array, count: int | jax.Array, *, where: jax.Array | None = None
    ) -> jax.Array:
        """`kept` and the best other blocks, so that there are `count`, in each group its share; see `refill_top`."""

        def refill(scores, number, where):
            kept, where = where
            return refill_top(scores, kept, number, where=where)

        if self.groups == 1:
            return refill(unit_scores, count, (kept, where))
        where = jnp.ones_like(kept) if where is None else where
        return self._in_groups(refill, unit_scores, count, (kept, where))

    def group_counts(self, count: int | jax.Array) -> jax.Array:
        """How many of `count` blocks each group keeps: int32 of shape (groups,)."""
        return count // self.groups + (jnp.arange(self.groups, dtype=jnp.int32) < count % self.groups)

    def to_groups(self, units: jax.Array) -> jax.Array:
        """Lays an array of units `(..., rows, columns)` out as `(groups, ..., rows, columns of a group)`."""
        return jnp.moveaxis(split_axis(units, -1, units.shape[-1] // self.groups), -2, 0)

    def from_groups(self, grouped: jax.Array) -> jax.Array:
        """Undoes `to_groups`."""
        return merge_axis(jnp.moveaxis(grouped, 0, -2), grouped.ndim - 2)

    def _in_groups(self, function, unit_scores, count, where):
        if self.groups == 1:
            return function(unit_scores, count, where=where)
        # Counts have no sharding: where the groups lie across devices, there is nothing to map both over alike.
        grouped = jax.tree.map(lambda units: unshard(self.to_groups(units), 0), (unit_scores, where))
        number = self.group_counts(jnp.asarray(count, jnp.int32))
        return self.from_groups(jax.vmap(lambda s, n, w: function(s, n, where=w))(grouped[0], number, grouped[1]))

    def _blocks(self, scores: jax.Array, padding: float) -> jax.Array:
        """Splits the last two axes, padded to whole blocks, into (rows of blocks, rows, columns of blocks, columns)."""
        for axis, block in zip((-2, -1), self.shape, strict=True):
            if missing := -scores.shape[axis] % block:
                widths = [(0, 0)] * scores.ndim
                widths[axis] = (0, missing)
                scores = jnp.pad(unshard(scores, axis), widths, constant_values=padding)
        return split_axis(split_axis(scores, -1, self.shape[1]), -3, self.shape[0])
