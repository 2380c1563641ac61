"""Convolution over rows, one tap after the other over the whole table; the derivatives are JAX's own."""

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_conv.lists import KernelMap


def supports(x: jax.Array, weights: jax.Array, kernel_map: KernelMap, groups: int) -> str | None:
    """None: it runs everywhere."""
    del x, weights, kernel_map, groups


def forward(x: jax.Array, weights: jax.Array, kernel_map: KernelMap, groups: int) -> jax.Array:
    """Adds up the taps, in the accumulation type."""
    out = 0
    for row, kernel in zip(kernel_map.fwd, weights, strict=True):
        out += times(rows_of(x, row), kernel, groups)
    return out


def times(rows: jax.Array, weights: jax.Array, groups: int) -> jax.Array:
    """Rows (n, in) times one tap (in / groups, out): group by group."""
    kind = accumulator(rows)
    if groups == 1:
        return jnp.dot(rows, weights, preferred_element_type=kind)
    inputs, outputs = weights.shape
    rows = rows.reshape(len(rows), groups, inputs)
    weights = weights.reshape(inputs, groups, outputs // groups)
    return jnp.einsum("ngi,igo->ngo", rows, weights, preferred_element_type=kind).reshape(len(rows), outputs)


def rows_of(x: jax.Array, rows: jax.Array, fill: float = 0) -> jax.Array:
    """Rows of x; `fill` for those that it does not have."""
    if len(x) == 0:  # which JAX does not take from
        return jnp.full((*rows.shape, *x.shape[1:]), fill, x.dtype)
    return jnp.take(x, rows, axis=0, mode="fill", fill_value=fill)


def accumulator(x: jax.Array):
    """The dtype of sums: at least float32."""
    return jnp.promote_types(x.dtype, jnp.float32)
