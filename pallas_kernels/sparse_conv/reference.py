"""Convolution over rows, one tap after the other over all rows; the derivatives are JAX's own."""

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_conv.lists import PairLists


def convolve(x: jax.Array, weights: jax.Array, lists: PairLists, groups: int) -> jax.Array:
    """Adds up every tap's product by a scatter over its whole list, in the accumulation type."""
    taps, _, features = weights.shape
    out = jnp.zeros((lists.capacity_out, features), accumulator(x))
    for tap in range(taps):
        rows = jnp.take(x, lists.sources[tap], axis=0, mode="fill", fill_value=0)
        out = out.at[lists.targets[tap]].add(times(rows, weights[tap], groups), mode="drop")
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


def accumulator(x: jax.Array):
    """The dtype of sums: at least float32."""
    return jnp.promote_types(x.dtype, jnp.float32)
