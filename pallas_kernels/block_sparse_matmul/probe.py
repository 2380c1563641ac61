"""Sizes of gradient blocks that are not stored, for growing: a zero grid whose cotangent they are."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul.shapes import Sizes

Array = Any

POOLINGS = ("l2", "mean", "max")


def block_gradient_sizes(x: Array, dy: Array, sizes: Sizes, pooling: str) -> Array:
    """Size of every block of x^T dy, computed one block row at a time: never more than [bk, N] in memory.

    Args:
        x: [M, K].
        dy: [M, N].
        sizes: gives the blocks.
        pooling: "l2" (Frobenius norm), "mean" or "max" of absolute values; elements past the edge do not count.

    Returns:
        [Kb, Nb], float32 (float64 for float64).
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    bk, bn = sizes.bk, sizes.bn
    x = jnp.pad(x, ((0, 0), (0, -sizes.inputs % bk)))
    pad = -sizes.outputs % bn

    def row(i):
        part = jax.lax.dynamic_slice_in_dim(x, i * bk, bk, axis=1)
        g = jax.lax.dot_general(part, dy, (((0,), (0,)), ((), ())), preferred_element_type=wide)
        g = jnp.pad(g, ((0, 0), (0, pad))).reshape(bk, sizes.columns, bn)
        if pooling == "l2":
            return jnp.sqrt((g * g).sum((0, 2)))
        g = jnp.abs(g)
        return g.max((0, 2)) if pooling == "max" else g.sum((0, 2))

    grid = jax.lax.map(row, jnp.arange(sizes.rows))
    if pooling == "mean":
        height = jnp.minimum(bk, sizes.inputs - bk * jnp.arange(sizes.rows))
        width = jnp.minimum(bn, sizes.outputs - bn * jnp.arange(sizes.columns))
        grid = grid / (height[:, None] * width).astype(wide)
    return grid


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attach_probe(sizes: Sizes, pooling: str, y: Array, x: Array, probe: Array, when: Array) -> Array:
    """y unchanged; the cotangent of `probe` becomes the sizes of the blocks of x^T dy where `when` is true, else zeros.

    Args:
        sizes: gives the blocks.
        pooling: see `block_gradient_sizes`.
        y: [M, N].
        x: [M, K]; no gradient arrives here from this function.
        probe: [Kb, Nb].
        when: bool [].
    """
    del sizes, pooling, x, probe, when
    return y


def _forward(sizes, pooling, y, x, probe, when):
    del sizes, pooling
    # Of the probe its type is enough.
    return y, (x, jnp.zeros((0,), probe.dtype), when)


def _backward(sizes, pooling, saved, dy):
    x, like, when = saved
    measured = lambda x, dy: block_gradient_sizes(x, dy, sizes, pooling).astype(like.dtype)  # noqa: E731
    nothing = lambda x, dy: jnp.zeros((sizes.rows, sizes.columns), like.dtype)  # noqa: E731
    return dy, None, jax.lax.cond(when, measured, nothing, x, dy), None


attach_probe.defvjp(_forward, _backward)
