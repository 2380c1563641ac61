"""Convolution over rows: the call, its gradients, and which paths there are.

A path is a module with `supports(x, weights, kernel_map, groups)`, which returns None or the reason for refusing,
`forward(x, weights, kernel_map, groups)`, and `weight_gradient(x, dy, kernel_map, shape, groups)`; both return at least
float32. The derivative by x is the forward pass of the transposed map and weights.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import choice as choices
from pallas_kernels import compat
from pallas_kernels.choice import Choice, path
from pallas_kernels.sparse_conv.lists import KernelMap

KERNEL = "sparse_conv"


def sparse_conv(
    x: jax.Array,
    weights: jax.Array,
    kernel_map: KernelMap,
    *,
    bias: jax.Array | None = None,
    groups: int = 1,
    implementation: str | None = None,
) -> jax.Array:
    """`out[o] = bias + sum over taps k with a neighbour i of o: x[i] @ weights[k]`.

    Time and memory follow the pairs of neighbours. Forward and both gradients give the same bits in every run.

    Args:
        x: float (capacity_in, in).
        weights: float (taps, in / groups, out); inputs and outputs are grouped as by `lax.conv_general_dilated`.
        kernel_map: the neighbours.
        bias: float (out,), or None.
        groups: feature groups; `in` for a depthwise convolution.
        implementation: None takes the fastest that supports the call (`explain` tells which and why); "reference",
            "xla", "native" (CPU) or "gpu" works or raises.

    Returns:
        (capacity_out, out) in the dtype of `x`, summed at least in float32; rows that are not in use are zero.

    Raises:
        ValueError: shapes or groups do not fit, or the named implementation does not support the call.

    Example:
        >>> table = jnp.array([[2, 0], [0, 1]])
        >>> kernel_map = KernelMap(table, jnp.array([[1, 2], [0, 1]]), jnp.int32(2), jnp.int32(2))
        >>> sparse_conv(jnp.array([[1.0], [10.0]]), jnp.array([[[5.0]], [[1.0]]]), kernel_map).tolist()
        [[1.0], [15.0]]
    """
    _check(x, weights, kernel_map, groups)
    if bias is not None and bias.shape != weights.shape[-1:]:
        raise ValueError(f"bias has shape {bias.shape}, it must be {weights.shape[-1:]}")
    weights = weights.astype(x.dtype)
    name = choices.settled(explain(x, weights, kernel_map, groups=groups, implementation=implementation))
    if name == "reference":
        out = path(KERNEL, name).forward(x, weights, kernel_map, groups)
    else:
        out = _convolve(name, groups, *compat.vary_alike((x, weights, kernel_map)))
    if bias is not None:
        used = jnp.arange(kernel_map.capacity_out) < kernel_map.rows_out
        out = out + jnp.where(used[:, None], bias, 0).astype(out.dtype)
    return out.astype(x.dtype)


def explain(
    x: jax.Array,
    weights: jax.Array,
    kernel_map: KernelMap,
    *,
    groups: int = 1,
    implementation: str | None = None,
) -> Choice:
    """Which path `sparse_conv` takes for these arguments, and why others refuse. Computes nothing.

    Args:
        x: as in `sparse_conv`; ShapeDtypeStructs will do, here and for the other arrays.
        weights: likewise.
        kernel_map: likewise.
        groups: likewise.
        implementation: likewise.

    Returns:
        A Choice, readable when printed.

    Example:
        >>> table = jnp.zeros((1, 2), jnp.int32)
        >>> kernel_map = KernelMap(table, table, jnp.int32(2), jnp.int32(2))
        >>> explain(jnp.ones((2, 3)), jnp.ones((1, 3, 4)), kernel_map, implementation="xla").name
        'xla'
    """
    _check(x, weights, kernel_map, groups)
    return choices.choose(KERNEL, implementation, choices.platform_of(x, weights), x, weights, kernel_map, groups)


def _check(x, weights, kernel_map, groups) -> None:
    taps = kernel_map.fwd.shape[0]
    if weights.ndim != 3 or weights.shape[0] != taps:
        raise ValueError(f"weights have shape {weights.shape}; this map needs ({taps}, in / groups, out)")
    _, inputs, outputs = weights.shape
    if groups < 1 or outputs % groups or x.shape != (kernel_map.capacity_in, inputs * groups):
        raise ValueError(
            f"x has shape {x.shape}; with weights {weights.shape} and {groups} groups it must be "
            f"({kernel_map.capacity_in}, {inputs * groups}), and groups must divide {outputs} outputs"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}; it must be floating")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve(name, groups, x, weights, kernel_map):
    return path(KERNEL, name).forward(x, weights, kernel_map, groups)


def _convolve_fwd(name, groups, x, weights, kernel_map):
    return _convolve(name, groups, x, weights, kernel_map), (x, weights, kernel_map)


def _convolve_bwd(name, groups, saved, gradient):
    x, weights, kernel_map = saved
    run, gradient = path(KERNEL, name), gradient.astype(x.dtype)
    dx = run.forward(gradient, _transposed(weights, groups), kernel_map.T, groups)
    dw = run.weight_gradient(x, gradient, kernel_map, weights.shape, groups)
    return dx.astype(x.dtype), dw.astype(weights.dtype), None


_convolve.defvjp(_convolve_fwd, _convolve_bwd)


def _transposed(weights, groups):
    taps, inputs, outputs = weights.shape
    split = weights.reshape(taps, inputs, groups, outputs // groups)
    return split.transpose(0, 3, 2, 1).reshape(taps, outputs // groups, groups * inputs)
