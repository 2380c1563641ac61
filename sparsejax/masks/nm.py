"""N:M masks: n kept of every m consecutive elements of an axis."""

import dataclasses
import math
import numbers
from fractions import Fraction

import jax
import jax.numpy as jnp

from sparsejax.masks.counts import as_written
from sparsejax.masks.keys import as_float, sort_keys
from sparsejax.masks.layout import match_sharding, merge_axis, split_axis
from sparsejax.masks.structure import build_mask


@dataclasses.dataclass(frozen=True)
class NM:
    """Of every `m` consecutive elements along an axis, `n` are kept.

    Args:
        n: how many are kept of a group.
        m: length of a group.
        axis: the axis that groups run along; -2 is the reduction axis of kernels laid out in x out, the one that
            hardware and compressed kernels need.
        share: how many consecutive columns (entries of the last axis) have one pattern in common.

    Raises:
        TypeError: an argument is not a whole number.
        ValueError: not 1 <= n <= m, `share` is below 1, or groups run along the very axis that patterns are shared on.

    Example:
        >>> NM(2, 4).mask(jnp.array([[0.1], [0.9], [0.5], [0.2]])).tolist()
        [[False], [True], [True], [False]]

    References:
        Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, 2021, section 3.
    """

    n: int
    m: int
    axis: int = -2
    share: int = 1

    def __post_init__(self):
        for name in ("n", "m", "axis", "share"):
            if not isinstance(getattr(self, name), numbers.Integral):
                raise TypeError(f"NM({name}={getattr(self, name)!r}): give a whole number")
        if not 1 <= self.n <= self.m:
            raise ValueError(f"NM keeps n of m elements with 1 <= n <= m, got n={self.n}, m={self.m}")
        if self.share < 1:
            raise ValueError(f"NM(share=...) is a number of columns, 1 or more, got {self.share}")
        if self.share > 1 and self.axis == -1:
            raise ValueError("NM(axis=-1) groups columns, which then cannot share patterns; use share=1 or axis=-2")

    @property
    def fixed_density(self) -> Fraction:
        """The fraction kept, n / m."""
        return Fraction(self.n, self.m)

    def mask(self, scores: jax.Array, sparsity: float | None = None) -> jax.Array:
        """Keeps the `n` largest scores of every group, ties going to the lower index.

        Args:
            scores: real array; where columns share a pattern, their scores are added up first.
            sparsity: may be left out; if given it must be 1 - n / m.

        Returns:
            Bool array with the shape and sharding of `scores`.

        Raises:
            ValueError: the shape does not divide into groups, or `sparsity` is another one.
        """
        scores = jnp.asarray(scores)
        self.check(scores.shape)
        if sparsity is not None:
            given, own = as_written(sparsity, "sparsity"), 1 - self.fixed_density
            if given is None or abs(given - own) > Fraction(1, 1_000_000):
                raise ValueError(f"NM({self.n}, {self.m}) has sparsity {own} = {float(own):.6g}, not {sparsity!r}")
        kept = math.prod(self.grid(scores.shape)) // self.m * self.n
        return build_mask(self, scores, kept)

    def check(self, shape: tuple[int, ...], path: str = "") -> None:
        """Raises a ValueError that names `path` if a shape does not divide into groups and shared columns."""
        where = f"{path}: " if path else ""
        remedy = f"leave it dense with rules={{{path or '<path>'!r}: None}}"
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(f"{where}shape {tuple(shape)} has no axis {self.axis} for {self}; {remedy}")
        if self.share > 1 and self.axis % len(shape) == len(shape) - 1:
            raise ValueError(f"{where}shape {tuple(shape)}: {self} would share patterns along the groups; use share=1")
        if shape[self.axis] % self.m:
            raise ValueError(
                f"{where}axis {self.axis} of shape {tuple(shape)} does not divide into groups of {self.m} for "
                f"NM({self.n}, {self.m}); choose an m that divides {shape[self.axis]}, or {remedy}"
            )
        if shape[-1] % self.share:
            raise ValueError(
                f"{where}the {shape[-1]} columns of shape {tuple(shape)} do not divide into shares of {self.share} for "
                f"{self}; choose a share that divides {shape[-1]}, or {remedy}"
            )

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the array of units: `shape` with `share` columns counted as one."""
        return tuple(shape) if self.share == 1 else (*shape[:-1], shape[-1] // self.share)

    def pool(self, scores: jax.Array) -> jax.Array:
        """Scores of the units: sums over columns that share a pattern, at least in float32."""
        scores = jnp.asarray(scores)
        if self.share == 1:
            return scores
        return jnp.sum(split_axis(as_float(scores), -1, self.share), axis=-1)

    def spread(self, unit_mask: jax.Array, shape: tuple[int, ...], *, like: jax.Array | None = None) -> jax.Array:
        """Mask of the elements from the mask of the units.

        Args:
            unit_mask: bool array of shape `grid(shape)`.
            shape: shape of the elements.
            like: an array of that shape whose sharding the mask gets.

        Returns:
            Bool array of `shape`.
        """
        mask = unit_mask
        if self.share > 1:
            mask = merge_axis(jnp.broadcast_to(mask[..., None], (*mask.shape, self.share)), -2)
        return mask if like is None else match_sharding(mask, like)

    def choose(self, unit_scores: jax.Array, count: int | jax.Array, *, where: jax.Array | None = None) -> jax.Array:
        """The best units of every group.

        Args:
            unit_scores: scores of the units.
            count: units to keep in all; every group keeps this number divided by the number of groups, rounded up.
            where: bool array; only units where it is True are candidates, and groups with too few keep fewer.

        Returns:
            Bool array of the shape of `unit_scores`.
        """
        unit_scores, axis = jnp.asarray(unit_scores), self.axis % jnp.ndim(unit_scores)
        where = None if where is None else split_axis(jnp.asarray(where), axis, self.m)
        rank = self._rank(split_axis(unit_scores, axis, self.m), where)
        return self._joined(rank < self._quota(unit_scores, count), where, unit_scores)

    def refill(
        self, unit_scores: jax.Array, kept: jax.Array, count: int | jax.Array, *, where: jax.Array | None = None
    ) -> jax.Array:
        """`kept` and the best other units of every group, up to the same quota as in `choose`.

        Args:
            unit_scores: scores of the units.
            kept: bool array: units that stay.
            count: units to keep in all, as in `choose`; a group that keeps more already stays as it is.
            where: bool array; only units where it is True may be added.

        Returns:
            Bool array of the shape of `unit_scores`.
        """
        unit_scores, kept, axis = jnp.asarray(unit_scores), jnp.asarray(kept), self.axis % jnp.ndim(unit_scores)
        free = split_axis(~kept if where is None else where & ~kept, axis, self.m)
        held = jnp.sum(split_axis(kept, axis, self.m), axis=axis + 1, keepdims=True, dtype=jnp.int32)
        rank = self._rank(split_axis(unit_scores, axis, self.m), free)
        return kept | self._joined(rank < self._quota(unit_scores, count) - held, free, unit_scores)

    def _quota(self, unit_scores: jax.Array, count: int | jax.Array) -> int | jax.Array:
        groups = max(unit_scores.size // self.m, 1)
        return -(-count // groups)

    def _rank(self, scores: jax.Array, where: jax.Array | None) -> jax.Array:
        """How many candidates of its group come before each unit. Pairs are compared: for groups this short that is
        many times faster than a sort, and needs no axis to be whole on one device."""
        axis = self.axis % (scores.ndim - 1) + 1
        keys = sort_keys(scores)
        own, other = jnp.expand_dims(keys, axis + 1), jnp.expand_dims(keys, axis)
        index = jnp.arange(self.m)
        earlier = (index[None, :] < index[:, None]).reshape((self.m, self.m) + (1,) * (scores.ndim - 1 - axis))
        before = (other > own) | ((other == own) & earlier)
        if where is not None:
            before &= jnp.expand_dims(where, axis)
        return jnp.sum(before, axis=axis + 1, dtype=jnp.int32)

    def _joined(self, chosen: jax.Array, where: jax.Array | None, like: jax.Array) -> jax.Array:
        chosen = chosen if where is None else chosen & where
        return match_sharding(merge_axis(chosen, self.axis % like.ndim), like)
