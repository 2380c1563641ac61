"""Sizes of gradient blocks that are not stored, for growing: a zero grid whose cotangent they are."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul.shapes import Sizes

Array = Any

POOLINGS = ("l2", "mean", "max")


def block_gradient_sizes(x: Array, dy: Array, sizes: Sizes, pooling: str, summed: tuple[str, ...] = ()) -> Array:
    """Size of every block of x^T dy, computed one block row at a time: never more than [bk, N] in memory.

    Args:
        x: [M, K].
        dy: [M, N].
        sizes: gives the blocks.
        pooling: "l2" (Frobenius norm), "mean" or "max" of absolute values; elements past the edge do not count.
        summed: inside `jax.shard_map`, the mesh axes that hold further rows of x and dy.

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
        g = jax.lax.psum(g, summed) if summed else g
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attach_probe(
    sizes: Sizes, pooling: str, summed: tuple[str, ...], y: Array, x: Array, probe: Array, when: Array
) -> Array:
    """y unchanged; the cotangent of `probe` becomes the sizes of the blocks of x^T dy where `when` is true, else zeros.

    Args:
        sizes: gives the blocks.
        pooling: see `block_gradient_sizes`.
        summed: likewise.
        y: [M, N].
        x: [M, K]; no gradient arrives here from this function.
        probe: [Kb, Nb].
        when: bool [].
    """
    del sizes, pooling, summed, x, probe, when
    return y


def _forward(sizes, pooling, summed, y, x, probe, when):
    del sizes, pooling, summed
    # Of the probe its type is enough.
    return y, (x, probe[:0, :0], when)


def _backward(sizes, pooling, summed, saved, dy):
    x, like, when = saved

    def measured(x, dy):
        # Nothing is differentiated through scores, and the root of the size of a zero block could not be.
        x, dy = jax.lax.stop_gradient((x, dy))
        return block_gradient_sizes(x, dy, sizes, pooling, summed).astype(like.dtype)

    def nothing(x, dy):
        # Padding keeps the kind of `like`: on which mesh axes it differs between devices.
        return jnp.pad(like, ((0, sizes.rows), (0, sizes.columns)))

    return dy, None, jax.lax.cond(when, measured, nothing, x, dy), None


attach_probe.defvjp(_forward, _backward)
