"""Convolution and pooling over lists of sites."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels import sparse_conv as kernel
from pallas_kernels.sparse_conv import KernelMap
from pallas_kernels.sparse_conv.reference import rows_of
from sparsejax.convolution.checks import check_array
from sparsejax.convolution.sites import Sites


def sparse_conv(
    feats: jax.Array,
    weights: jax.Array,
    kernel_map: KernelMap,
    *,
    bias: jax.Array | None = None,
    groups: int = 1,
    implementation: str | None = None,
) -> jax.Array:
    """Convolution over sites: submanifold, strided, dilated or transposed, as the map says.

    Time and memory follow the pairs of neighbouring sites. Forward and both gradients give the same bits in every run.

    Args:
        feats: float (capacity_in, in), zeros in empty rows.
        weights: float (*window, in / groups, out), with the map's window: those of the dense convolution. For a
            transposed convolution, with `map.T`, they map from its inputs to its outputs; the adjoint of a convolution
            has its last axes swapped.
        kernel_map: from `subm_map` or `strided_map`.
        bias: float (out,), or None; empty rows stay zero.
        groups: feature groups; `in` for a depthwise convolution.
        implementation: None for the best; "reference", "xla", "native" (CPU) or "gpu" works or raises.

    Returns:
        (capacity_out, out) in the dtype of `feats`, summed at least in float32.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> from sparsejax.convolution.site_maps import subm_map
        >>> from sparsejax.convolution.sites import from_mask
        >>> x = jnp.array([1.0, 2.0, 9.0, 4.0]).reshape(1, 4, 1)
        >>> sites = from_mask(x, x[..., 0] < 9, capacity=3)
        >>> sparse_conv(sites.feats, jnp.ones((3, 1, 1)), subm_map(sites, 3))[:, 0].tolist()
        [3.0, 3.0, 4.0]
    """
    if kernel_map.window is not None and weights.shape[:-2] != kernel_map.window:
        raise ValueError(
            f"weights have shape {weights.shape}; this map's window is {kernel_map.window}, before in / groups and out"
        )
    taps = weights.reshape(math.prod(weights.shape[:-2]), *weights.shape[-2:])
    return kernel.sparse_conv(feats, taps, kernel_map, bias=bias, groups=groups, implementation=implementation)


def sparse_pool(feats: jax.Array, kernel_map: KernelMap, reduce: str = "max") -> jax.Array:
    """Pooling over sites; missing sites do not count.

    Args:
        feats: float (capacity_in, channels).
        kernel_map: from `strided_map` or `subm_map`.
        reduce: "max", "mean" or "sum".

    Returns:
        (capacity_out, channels) in the dtype of `feats`, summed at least in float32; empty rows are zero. A maximum of
        values with NaN is NaN.

    Raises:
        ValueError: `feats` has not the map's rows, or is not floating.

    Example:
        >>> from sparsejax.convolution.site_maps import strided_map
        >>> from sparsejax.convolution.sites import from_mask
        >>> x = jnp.array([-1.0, -2.0, 0.0, 4.0]).reshape(1, 4, 1)
        >>> sites = from_mask(x, x[..., 0] != 0, capacity=3)
        >>> sparse_pool(sites.feats, strided_map(sites, 2, 2)[1])[:2, 0].tolist()
        [-1.0, 4.0]
    """
    if feats.ndim != 2 or len(feats) != kernel_map.capacity_in:
        raise ValueError(f"feats have shape {feats.shape}; this map needs ({kernel_map.capacity_in}, channels)")
    check_array("feats", feats)
    if reduce == "max":
        return _max_pool(feats, kernel_map)
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce is {reduce!r}; allowed are 'max', 'mean' and 'sum'")
    total = _sum_pool(feats.astype(jnp.promote_types(feats.dtype, jnp.float32)), kernel_map)
    if reduce == "mean":
        number = jnp.sum(kernel_map.fwd < kernel_map.capacity_in, axis=0)
        total = total / jnp.maximum(number, 1)[:, None].astype(total.dtype)
    return total.astype(feats.dtype)


def sites_global_pool(sites: Sites, reduce: str = "mean") -> jax.Array:
    """Pools each sample over its sites.

    Rows of a sample are added up in an order that GPUs may change from run to run, unless the flag
    `--xla_gpu_deterministic_ops=true` is in XLA_FLAGS; elsewhere the bits are always the same.

    Args:
        sites: the sites.
        reduce: "mean", "max" or "sum".

    Returns:
        (samples, channels); zeros for a sample without sites.
    """
    samples, feats = sites.batch_size, sites.feats
    check_array("feats", feats)
    shape = (samples, feats.shape[1])
    number = jnp.zeros(samples, jnp.int32).at[sites.batch].add(1, mode="drop", indices_are_sorted=True)[:, None]
    if reduce == "max":
        best = jnp.full(shape, -jnp.inf, feats.dtype).at[sites.batch].max(feats, mode="drop")
        return jnp.where(number > 0, best, 0)
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce is {reduce!r}; allowed are 'mean', 'max' and 'sum'")
    total = jnp.zeros(shape, jnp.promote_types(feats.dtype, jnp.float32))
    total = total.at[sites.batch].add(feats, mode="drop", indices_are_sorted=True)
    return (total if reduce == "sum" else total / jnp.maximum(number, 1)).astype(feats.dtype)


def _over_taps(function, start, tables):
    return jax.lax.scan(lambda carry, tap: (function(carry, *tap), None), start, tables)[0]


@jax.custom_vjp
def _sum_pool(feats, kernel_map):
    start = jnp.zeros((kernel_map.capacity_out, feats.shape[1]), feats.dtype)
    return _over_taps(lambda total, rows: total + rows_of(feats, rows), start, (kernel_map.fwd,))


def _sum_forward(feats, kernel_map):
    return _sum_pool(feats, kernel_map), kernel_map


def _sum_backward(kernel_map, gradient):
    return _sum_pool(gradient, kernel_map.T), None


_sum_pool.defvjp(_sum_forward, _sum_backward)


@jax.custom_vjp
def _max_pool(feats, kernel_map):
    return _max_forward(feats, kernel_map)[0]


def _max_forward(feats, kernel_map):
    taps, rows = kernel_map.fwd.shape

    def better(carry, sources, tap):
        best, winner = carry
        found = (sources < kernel_map.capacity_in)[:, None]
        value = rows_of(feats, sources)
        wins = found & ((value > best) | (jnp.isnan(value) & ~jnp.isnan(best)) | (winner == taps))
        return jnp.where(wins, value, best), jnp.where(wins, tap, winner)

    start = jnp.zeros((rows, feats.shape[1]), feats.dtype), jnp.full((rows, feats.shape[1]), taps)
    best, winner = _over_taps(better, start, (kernel_map.fwd, jnp.arange(taps)))
    return best, (winner, kernel_map)


def _max_backward(saved, gradient):
    winner, kernel_map = saved

    def collect(total, targets, tap):
        return total + jnp.where(rows_of(winner, targets, -1) == tap, rows_of(gradient, targets), 0)

    taps, rows = kernel_map.bwd.shape
    start = jnp.zeros((rows, gradient.shape[1]), jnp.promote_types(gradient.dtype, jnp.float32))
    return _over_taps(collect, start, (kernel_map.bwd, jnp.arange(taps))).astype(gradient.dtype), None


_max_pool.defvjp(_max_forward, _max_backward)
