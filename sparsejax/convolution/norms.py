"""Norms over active sites: statistics of these alone, zeros elsewhere. For dense arrays and for rows of sites."""

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_conv.reference import rows_of
from sparsejax.convolution.checks import check_array, check_features, whole_number
from sparsejax.convolution.masked import SiteMask, active_sites
from sparsejax.convolution.sites import Sites


def masked_batch_norm(
    x: jax.Array,
    mask: SiteMask | jax.Array | None,
    *,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    mean: jax.Array | None = None,
    variance: jax.Array | None = None,
    epsilon: float = 1e-5,
    axis_name: str | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Batch norm over the active sites of all samples.

    Args:
        x: float (..., channels): (samples, *shape, channels), or the features (capacity, channels) of sites.
        mask: a `SiteMask`, or bool (..., 1) such as `sites.used`; None for all.
        scale: float (channels,), or None.
        bias: float (channels,), or None.
        mean: running means, (channels,); with `variance` they replace the batch's.
        variance: running variances.
        epsilon: added to the variance.
        axis_name: mesh axis over which statistics are summed.

    Returns:
        `(y, (mean, variance))`: `y` like `x`, zero at inactive sites; the batch's statistics, float32 (channels,), the
        variance biased (divided by the count, as Flax keeps it; torch's running variance is unbiased). Without any
        active site they are 0.

    Example:
        >>> x = jnp.array([[1.0], [3.0], [jnp.nan]])
        >>> y, (mean, variance) = masked_batch_norm(x, jnp.array([[True], [True], [False]]))
        >>> mean.tolist(), variance.tolist(), y.round(3)[:, 0].tolist()
        ([2.0], [1.0], [-1.0, 1.0, 0.0])
    """
    check_features(x.shape[-1], scale=scale, bias=bias, mean=mean, variance=variance)
    there = _active(mask, x)
    axes = tuple(range(x.ndim - 1))
    clean = jnp.where(there, x, 0).astype(jnp.promote_types(x.dtype, jnp.float32))

    def total(values):
        values = jnp.sum(values, axis=axes)
        return values if axis_name is None else jax.lax.psum(values, axis_name)

    number = jnp.maximum(total(there.astype(clean.dtype)), 1)
    batch_mean = total(clean) / number
    batch_variance = total(jnp.where(there, clean - batch_mean, 0) ** 2) / number
    if (mean is None) != (variance is None):
        raise ValueError("give both mean and variance, or neither")
    used = (batch_mean, batch_variance) if mean is None else (mean, variance)
    y = _scaled((clean - used[0]) * jax.lax.rsqrt(used[1] + epsilon), scale, bias)
    return jnp.where(there, y, 0).astype(x.dtype), (batch_mean, batch_variance)


def masked_layer_norm(
    x: jax.Array,
    mask: SiteMask | jax.Array | None,
    *,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    epsilon: float = 1e-6,
) -> jax.Array:
    """Layer norm over the channels of every active site; zeros elsewhere.

    Args:
        x: float (..., channels).
        mask: as in `masked_batch_norm`.
        scale: float (channels,), or None.
        bias: float (channels,), or None.
        epsilon: added to the variance.
    """
    check_features(x.shape[-1], scale=scale, bias=bias)
    there = _active(mask, x)
    clean = jnp.where(there, x, 0).astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = clean - jnp.mean(clean, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + epsilon)
    return jnp.where(there, _scaled(y, scale, bias), 0).astype(x.dtype)


def masked_group_norm(
    x: jax.Array,
    mask: SiteMask | None,
    groups: int,
    *,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    epsilon: float = 1e-6,
) -> jax.Array:
    """Group norm of every sample over its active sites and the channels of each group; zeros elsewhere.

    Args:
        x: float (samples, *shape, channels).
        mask: the active sites; None for all.
        groups: must divide the channels.
        scale: float (channels,), or None.
        bias: float (channels,), or None.
        epsilon: added to the variance.

    Raises:
        ValueError: `groups` does not divide the channels.
    """
    channels = x.shape[-1]
    check_features(channels, scale=scale, bias=bias)
    if whole_number("groups", groups) and channels % groups:
        raise ValueError(f"groups is {groups}; it must divide the {channels} channels")
    there = _active(mask, x)[..., None]
    split = x.reshape(*x.shape[:-1], groups, channels // groups)
    clean = jnp.where(there, split, 0).astype(jnp.promote_types(x.dtype, jnp.float32))
    axes = (*range(1, x.ndim - 1), x.ndim)
    number = jnp.maximum(jnp.sum(there, axis=axes, keepdims=True) * (channels // groups), 1).astype(clean.dtype)
    centred = jnp.where(there, clean - jnp.sum(clean, axis=axes, keepdims=True) / number, 0)
    y = centred * jax.lax.rsqrt(jnp.sum(centred**2, axis=axes, keepdims=True) / number + epsilon)
    return jnp.where(there[..., 0], _scaled(y.reshape(x.shape), scale, bias), 0).astype(x.dtype)


def sites_group_norm(
    sites: Sites,
    groups: int,
    *,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    epsilon: float = 1e-6,
) -> jax.Array:
    """Group norm of every sample over its sites and the channels of each group: `masked_group_norm` for sites.

    Rows of a sample are added up in an order that GPUs may change from run to run, unless the flag
    `--xla_gpu_deterministic_ops=true` is in XLA_FLAGS; elsewhere the bits are always the same.

    Args:
        sites: the sites.
        groups: must divide the channels.
        scale: float (channels,), or None.
        bias: float (channels,), or None.
        epsilon: added to the variance.

    Returns:
        (capacity, channels) in the dtype of the features; zeros in empty rows.

    Raises:
        ValueError: `groups` does not divide the channels.

    Example:
        >>> from sparsejax.convolution.sites import from_mask
        >>> x = jnp.array([1.0, 3.0, jnp.nan, 5.0]).reshape(2, 2, 1)
        >>> sites = from_mask(x, ~jnp.isnan(x[..., 0]), capacity=4)
        >>> sites_group_norm(sites, 1).round(3)[:, 0].tolist()
        [-1.0, 1.0, 0.0, 0.0]
    """
    channels = sites.feats.shape[1]
    check_features(channels, scale=scale, bias=bias)
    if whole_number("groups", groups) and channels % groups:
        raise ValueError(f"groups is {groups}; it must divide the {channels} channels")
    check_array("feats", sites.feats)
    feats = sites.feats.astype(jnp.promote_types(sites.feats.dtype, jnp.float32))
    split = feats.reshape(-1, groups, channels // groups)

    def mean(values):
        """Of each sample and group, at its sites."""
        total = jnp.zeros((sites.batch_size, groups), feats.dtype)
        total = total.at[sites.batch].add(jnp.sum(values, axis=-1), mode="drop", indices_are_sorted=True)
        number = jnp.zeros(sites.batch_size, feats.dtype).at[sites.batch].add(1, mode="drop", indices_are_sorted=True)
        means = total / jnp.maximum(number * split.shape[-1], 1)[:, None]
        return rows_of(means, sites.batch)[..., None]

    centred = jnp.where(sites.used[..., None], split - mean(split), 0)
    y = _scaled((centred * jax.lax.rsqrt(mean(centred**2) + epsilon)).reshape(feats.shape), scale, bias)
    return jnp.where(sites.used, y, 0).astype(sites.feats.dtype)


def _active(mask, x) -> jax.Array:
    check_array("x", x)
    if mask is None or isinstance(mask, SiteMask):
        return active_sites(x, mask)
    check_array("mask", mask, jnp.bool_, (*x.shape[:-1], 1))
    return mask


def _scaled(y, scale, bias):
    y = y if scale is None else y * scale
    return y if bias is None else y + bias
