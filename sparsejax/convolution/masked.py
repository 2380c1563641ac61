"""Convolution and pooling of dense arrays whose inactive sites count as absent."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.channels_last import convolve
from sparsejax.convolution.checks import check_array, check_features, whole_number
from sparsejax.convolution.shapes import pads, per_dimension
from sparsejax.masks.select import select_top


@functools.partial(jax.tree_util.register_dataclass, data_fields=("mask",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class SiteMask:
    """Which sites are active, at one resolution; at others it is derived.

    Args:
        mask: bool (samples, *grid), True = active.

    Example:
        >>> SiteMask(jnp.array([[True, False]])).at((4,)).tolist()
        [[True, True, False, False]]
    """

    mask: jax.Array

    def at(self, shape: Sequence[int]) -> jax.Array:
        """The mask at another resolution, bool (samples, *shape).

        A finer one repeats every site; in a coarser one a site is active if any of those in it is.

        Raises:
            ValueError: the mask is not bool, or along some axis neither size is a multiple of the other.
        """
        mask = self.mask
        check_array("mask", mask, jnp.bool_)
        if len(shape) != mask.ndim - 1:
            raise ValueError(f"shape {tuple(shape)} has {len(shape)} dimensions, the mask has {mask.ndim - 1}")
        for axis, size in enumerate(shape, start=1):
            have = mask.shape[axis]
            if size == have:
                continue
            if have and size % have == 0:
                mask = jnp.repeat(mask, size // have, axis=axis)
            elif have and have % size == 0:
                split = (*mask.shape[:axis], size, have // size, *mask.shape[axis + 1 :])
                mask = jnp.any(mask.reshape(split), axis=axis + 1)
            else:
                raise ValueError(
                    f"a mask of {self.mask.shape[1:]} has no form at {tuple(shape)}: along dimension {axis - 1} "
                    f"neither of {have} and {size} is a multiple of the other; pass mask_out, or sizes that are"
                )
        return mask


def random_patch_mask(key: jax.Array, samples: int, grid: Sequence[int], kept: int) -> SiteMask:
    """A random mask with exactly `kept` active patches in every sample.

    Args:
        key: a JAX random key.
        samples: samples.
        grid: patches along each dimension.
        kept: active patches of a sample.

    Example:
        >>> mask = random_patch_mask(jax.random.key(0), 2, (4, 4), 6).mask
        >>> mask.shape, mask.sum((1, 2)).tolist()
        ((2, 4, 4), [6, 6])

    References:
        Tian et al., Designing BERT for Convolutional Networks, 2023, arXiv:2301.03580, section 3.1.
    """
    size = math.prod(grid)
    if not 0 <= kept <= size:
        raise ValueError(f"kept is {kept}; allowed are 0 to {size}, the patches of {tuple(grid)}")
    noise = jax.random.uniform(key, (samples, *grid))
    return SiteMask(jax.vmap(lambda scores: select_top(scores, kept))(noise))


def masked_conv(
    x: jax.Array,
    weights: jax.Array,
    mask: SiteMask | None,
    *,
    mask_out: SiteMask | None = None,
    bias: jax.Array | None = None,
    stride: int | Sequence[int] = 1,
    padding="SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> jax.Array:
    """A convolution that reads active sites only and is zero elsewhere.

    Args:
        x: float (samples, *shape, in). Values at inactive sites do not matter, NaN included.
        weights: float (*window, in / groups, out).
        mask: the active sites; None for an ordinary convolution.
        mask_out: the output's active sites; by default those of `mask` at the output's resolution.
        bias: float (out,), or None.
        stride: steps.
        padding: "SAME", "VALID", a number, or a number or (low, high) for each dimension. None is that of
            `strided_map`.
        dilation: distance of the taps.
        groups: feature groups; `in` for a depthwise convolution.

    Returns:
        (samples, *shape_out, out) in the dtype of `x`.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Example:
        >>> x = jnp.array([1.0, 2.0, jnp.nan, 4.0]).reshape(1, 4, 1)
        >>> mask = SiteMask(jnp.array([[True, True, False, True]]))
        >>> masked_conv(x, jnp.ones((3, 1, 1)), mask)[0, :, 0].tolist()
        [3.0, 3.0, 0.0, 4.0]

    References:
        Tian et al., Designing BERT for Convolutional Networks, 2023, arXiv:2301.03580, section 3.2.
    """
    check_array("x", x)
    dims, groups = x.ndim - 2, whole_number("groups", groups)
    if weights.ndim != x.ndim or weights.shape[-2] * groups != x.shape[-1] or weights.shape[-1] % groups:
        raise ValueError(
            f"weights have shape {weights.shape}; x of shape {x.shape} with {groups} groups needs "
            f"({dims} window sides, {x.shape[-1] // groups}, a multiple of {groups})"
        )
    check_features(weights.shape[-1], bias=bias)
    step, spread = per_dimension("stride", stride, dims), per_dimension("dilation", dilation, dims)
    around = pads(x.shape[1:-1], weights.shape[:-2], step, spread, padding)
    out = convolve(apply_mask(x, mask), weights.astype(x.dtype), step, around, spread, groups)
    if bias is not None:
        out = out + bias.astype(out.dtype)
    return apply_mask(out, mask if mask_out is None else mask_out)


def masked_pool(
    x: jax.Array,
    mask: SiteMask | None,
    window: int | Sequence[int],
    *,
    stride: int | Sequence[int] | None = None,
    padding="VALID",
    mask_out: SiteMask | None = None,
    reduce: str = "max",
) -> jax.Array:
    """Pooling over active sites; the others do not count.

    Args:
        x: float (samples, *shape, channels).
        mask: the active sites; None for all.
        window: sides of the window.
        stride: steps; the window's sides by default.
        padding: as in `masked_conv`; padding never counts.
        mask_out: the output's active sites; by default those of `mask` at its resolution.
        reduce: "max", "mean" or "sum".

    Returns:
        (samples, *shape_out, channels) in the dtype of `x`, summed at least in float32; zero at inactive sites and
        where a window holds no active one.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Example:
        >>> x = jnp.array([-1.0, 5.0, -2.0, -3.0]).reshape(1, 4, 1)
        >>> mask = SiteMask(jnp.array([[True, False, True, True]]))
        >>> masked_pool(x, mask, 2)[0, :, 0].tolist()
        [-1.0, -2.0]
    """
    check_array("x", x)
    dims, kind = x.ndim - 2, jnp.promote_types(x.dtype, jnp.float32)
    sides = per_dimension("window", window, dims)
    step = per_dimension("stride", window if stride is None else stride, dims)
    around = pads(x.shape[1:-1], sides, step, (1,) * dims, padding)
    windows = ((1, *sides, 1), (1, *step, 1), ((0, 0), *around, (0, 0)))
    there = active_sites(x, mask)
    number = jax.lax.reduce_window(there.astype(jnp.float32), 0.0, jax.lax.add, *windows)
    if reduce == "max":
        least = np.asarray(-np.inf, x.dtype)
        out = jax.lax.reduce_window(jnp.where(there, x, least), least, jax.lax.max, *windows)
    elif reduce in ("mean", "sum"):
        out = jax.lax.reduce_window(jnp.where(there, x, 0).astype(kind), np.zeros((), kind), jax.lax.add, *windows)
        out = (out / jnp.maximum(number, 1) if reduce == "mean" else out).astype(x.dtype)
    else:
        raise ValueError(f"reduce is {reduce!r}; allowed are 'max', 'mean' and 'sum'")
    out = jnp.where(number > 0, out, 0)
    return apply_mask(out, mask if mask_out is None else mask_out)


def masked_global_pool(x: jax.Array, mask: SiteMask | None, reduce: str = "mean") -> jax.Array:
    """Pools each sample over its active sites.

    Args:
        x: float (samples, *shape, channels).
        mask: the active sites; None for all.
        reduce: "mean", "max" or "sum".

    Returns:
        (samples, channels) in the dtype of `x`, summed at least in float32; zeros for a sample without active sites.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    check_array("x", x)
    axes = tuple(range(1, x.ndim - 1))
    there = active_sites(x, mask)
    if reduce == "max":
        best = jnp.max(jnp.where(there, x, -jnp.inf), axis=axes)
        return jnp.where(jnp.any(there, axis=axes), best, 0)
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce is {reduce!r}; allowed are 'mean', 'max' and 'sum'")
    total = jnp.sum(jnp.where(there, x, 0), axis=axes, dtype=jnp.promote_types(x.dtype, jnp.float32))
    if reduce == "mean":
        total = total / jnp.maximum(jnp.sum(there, axis=axes), 1).astype(total.dtype)
    return total.astype(x.dtype)


def apply_mask(x: jax.Array, mask: SiteMask | None) -> jax.Array:
    """Zeros at inactive sites of x (samples, *shape, channels), whatever was there; all of x where `mask` is None."""
    return x if mask is None else jnp.where(active_sites(x, mask), x, 0)


def active_sites(x: jax.Array, mask: SiteMask | None) -> jax.Array:
    """The mask of x (samples, *shape, channels), bool (samples, *shape, 1); one of a single sample counts for all.

    Raises:
        ValueError: the mask is not a `SiteMask`, not bool, or of another number of samples or resolution.
    """
    if mask is None:
        return jnp.ones((*x.shape[:-1], 1), bool)
    if not isinstance(mask, SiteMask):
        raise ValueError(f"the mask is of type {type(mask).__name__}; wrap bool (samples, *grid) in SiteMask(...)")
    there = mask.at(x.shape[1:-1])[..., None]
    if len(there) not in (1, len(x)):
        raise ValueError(f"the mask is of {len(there)} samples; x of shape {x.shape} needs {len(x)}, or one for all")
    return jnp.broadcast_to(there, (*x.shape[:-1], 1))
