"""N:M products from plain XLA operations.

Where at least `GATHERED` columns share a pattern, the inputs that a group of columns meets are gathered, and the
product is a dense one of n / m of the size. Otherwise the matrix is written out while it is multiplied: the stored form
then saves memory between products, not time.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.nm_matmul.positions import from_dense, inputs_of, to_dense
from pallas_kernels.nm_matmul.shapes import Sizes

Array = Any

GATHERED = 32
"""Columns with one pattern from which on gathering is the faster way."""


def supports(x: Array, values: Array, positions: Array, sizes: Sizes) -> str | None:
    """None: this path takes every call."""
    del x, values, positions, sizes


def _dense(values: Array, positions: Array, sizes: Sizes) -> Array:
    return to_dense(values, positions, n=sizes.n, m=sizes.m, share=sizes.share)


def _by_group(values: Array, positions: Array, sizes: Sizes) -> tuple[Array, Array]:
    """Stored values [N / share, K n / m, share] and the inputs they meet, [N / share, K n / m]."""
    stored = values.reshape(sizes.stored, -1, sizes.share).swapaxes(0, 1)
    return stored, inputs_of(positions, sizes).T


def forward(x: Array, values: Array, positions: Array, sizes: Sizes) -> Array:
    """y [M, N] of x [M, K]."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if sizes.share < GATHERED:
        return jnp.matmul(x, _dense(values, positions, sizes), preferred_element_type=wide).astype(x.dtype)
    xt = x.T

    def columns(group):
        some, inputs = group
        product = jax.lax.dot_general(some, xt[inputs], (((0,), (0,)), ((), ())), preferred_element_type=wide)
        return product.astype(x.dtype)

    y = jax.lax.map(columns, _by_group(values, positions, sizes))
    return y.reshape(sizes.outputs, x.shape[0]).T


def backward(x: Array, values: Array, positions: Array, sizes: Sizes, dy: Array) -> tuple[Array, Array]:
    """dx [M, K] and dvalues [K n / m, N]."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if sizes.share < GATHERED:
        dx = jnp.matmul(dy, _dense(values, positions, sizes).T, preferred_element_type=wide).astype(x.dtype)
        whole = jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())), preferred_element_type=wide)
        found = from_dense(whole, positions, n=sizes.n, m=sizes.m, share=sizes.share)
        return dx, found.astype(values.dtype)
    xt, dyt = x.T, dy.T.reshape(-1, sizes.share, x.shape[0])

    def columns(dxt, group):
        some, inputs, out = group
        dxt = dxt.at[inputs].add(jnp.matmul(some, out, preferred_element_type=wide), unique_indices=True)
        found = jax.lax.dot_general(xt[inputs], out, (((1,), (1,)), ((), ())), preferred_element_type=wide)
        return dxt, found.astype(values.dtype)

    start = jnp.zeros(xt.shape, wide) + (x[0, 0] * 0).astype(wide)
    dxt, found = jax.lax.scan(columns, start, (*_by_group(values, positions, sizes), dyt))
    return dxt.T.astype(x.dtype), found.swapaxes(0, 1).reshape(values.shape)
