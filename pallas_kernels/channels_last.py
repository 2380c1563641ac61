"""The dense convolution of arrays whose channels come last, in any number of dimensions."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.choice import platform_of


def convolve(
    x: jax.Array,
    weights: jax.Array,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
) -> jax.Array:
    """`lax.conv_general_dilated` with channels last.

    On CPUs, where XLA's convolution of volumes is slow, those of their planes are added up, one for each place of the
    window in the first dimension: the same sums in another order.

    Args:
        x: float (samples, *shape, in).
        weights: float (*window, in / groups, out), in the dtype of `x`.
        stride: for each dimension, as what follows.
        padding: (low, high).
        dilation: distance of the taps.
        groups: feature groups.

    Returns:
        (samples, *shape_out, out) in the dtype of `x`.

    Example:
        >>> convolve(jnp.arange(4.0).reshape(1, 4, 1), jnp.ones((2, 1, 1)), [1], [(0, 0)], [1], 1)[0, :, 0].tolist()
        [1.0, 3.0, 5.0]
    """
    dims = x.ndim - 2
    window, meshed = weights.shape[:-2], not jax.sharding.get_abstract_mesh().empty
    depth = (x.shape[1] + sum(padding[0]) - dilation[0] * (window[0] - 1) - 1) // stride[0] + 1
    if dims > 2 and depth > 0 and max(window) > 1 and not meshed and platform_of(x, weights) == "cpu":
        kind = jnp.promote_types(x.dtype, jnp.float32)
        whole = jnp.pad(x.astype(kind), ((0, 0), padding[0], *[(0, 0)] * dims))
        total = 0
        for tap, kernel in enumerate(weights.astype(kind)):
            first = tap * dilation[0]
            planes = jax.lax.slice_in_dim(whole, first, first + (depth - 1) * stride[0] + 1, stride[0], axis=1)
            planes = planes.reshape(-1, *planes.shape[2:])
            total += convolve(planes, kernel, stride[1:], padding[1:], dilation[1:], groups)
        return total.reshape(len(x), depth, *total.shape[1:]).astype(x.dtype)
    space = tuple(range(1, dims + 1))
    numbers = jax.lax.ConvDimensionNumbers((0, dims + 1, *space), (dims + 1, dims, *range(dims)), (0, dims + 1, *space))
    return jax.lax.conv_general_dilated(
        x, weights, stride, padding, rhs_dilation=dilation, dimension_numbers=numbers, feature_group_count=groups
    )
