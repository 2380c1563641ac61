"""Convolution over rows: the call, what it checks, and which paths there are."""

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_conv import reference, xla
from pallas_kernels.sparse_conv.lists import PairLists

IMPLEMENTATIONS = {"reference": reference.convolve, "xla": xla.convolve}


def sparse_conv(
    x: jax.Array,
    weights: jax.Array,
    lists: PairLists,
    *,
    bias: jax.Array | None = None,
    groups: int = 1,
    implementation: str | None = None,
) -> jax.Array:
    """`out[o] = bias + sum over taps k and pairs (i, o) of k: x[i] @ weights[k]`.

    Args:
        x: float (capacity_in, in).
        weights: float (taps, in / groups, out); inputs and outputs are grouped as by `lax.conv_general_dilated`.
        lists: the pairs.
        bias: float (out,), or None.
        groups: feature groups; `in` for a depthwise convolution.
        implementation: None for the best; "xla", or "reference".

    Returns:
        (capacity_out, out) in the dtype of `x`, summed at least in float32; rows that are not in use are zero.

    Raises:
        ValueError: shapes or groups do not fit, or there is no such implementation.

    Example:
        >>> from pallas_kernels.sparse_conv.lists import from_table
        >>> lists = from_table(jnp.array([[2, 0], [0, 1]]), 2, jnp.int32(2), jnp.int32(2))
        >>> sparse_conv(jnp.array([[1.0], [10.0]]), jnp.array([[[5.0]], [[1.0]]]), lists).tolist()
        [[1.0], [15.0]]
    """
    taps, inputs, outputs = weights.shape if weights.ndim == 3 else (None, None, None)
    if taps != lists.sources.shape[0]:
        raise ValueError(
            f"weights have shape {weights.shape}; these lists need ({lists.sources.shape[0]}, in / groups, out)"
        )
    if groups < 1 or outputs % groups or x.shape != (lists.capacity_in, inputs * groups):
        raise ValueError(
            f"x has shape {x.shape}; with weights {weights.shape} and {groups} groups it must be "
            f"({lists.capacity_in}, {inputs * groups}), and groups must divide {outputs} outputs"
        )
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias has shape {bias.shape}, it must be ({outputs},)")
    name = implementation or "xla"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {name!r}; allowed are None, {', '.join(map(repr, IMPLEMENTATIONS))}")
    out = IMPLEMENTATIONS[name](x, weights, lists, groups)
    if bias is not None:
        used = jnp.arange(lists.capacity_out) < lists.rows_out
        out = out + jnp.where(used[:, None], bias, 0).astype(out.dtype)
    return out.astype(x.dtype)
