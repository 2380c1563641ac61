"""Block-sparse products from plain XLA operations: a loop over output blocks, each a few products of gathered blocks.

Activations are held feature-major, [blocks, features, M], inside: a gather of blocks is then a stack of rows that one
product reads as it is. Trip counts follow the lists, so columns of unequal length cost what they hold.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul.lists import BlockLists, flatten
from pallas_kernels.block_sparse_matmul.shapes import Sizes

Array = Any

# Depth of one product that is aimed at; deeper ones gain no speed and gather more at a time.
_DEPTH = 512


def supports(x: Array, values: Array, lists: BlockLists, sizes: Sizes) -> str | None:
    """None: this path takes every call."""
    del x, values, lists, sizes


def _stride(sizes: Sizes, lines: int, depth: int) -> int:
    """Blocks that one product takes: about half of what a line holds, so that little of the last product is padding."""
    mean = sizes.groups * sizes.capacity / lines
    return max(1, min(round(mean / 2), _DEPTH // depth))


def _feature_major(x: Array, blocks: int, width: int) -> Array:
    """[M, features] as [blocks, width, M], zeros past the edge."""
    return jnp.pad(x, ((0, 0), (0, blocks * width - x.shape[1]))).T.reshape(blocks, width, x.shape[0])


def _rows_again(y: Array, features: int) -> Array:
    """[blocks, width, M] as [M, features]."""
    return y.reshape(-1, y.shape[-1])[:features].T


def _line(start: Array, count: Array, stride: int, order: Array, step):
    """Calls step(acc, slots, valid) for the slots of one line, `stride` at a time."""

    def body(turn, acc):
        at = turn * stride + jnp.arange(stride)
        slots = order[jnp.minimum(start + at, order.shape[0] - 1)]
        return step(acc, slots, at < count, start + turn * stride)

    return lambda acc: jax.lax.fori_loop(0, (count + stride - 1) // stride, body, acc)


def forward(x: Array, values: Array, lists: BlockLists, sizes: Sizes) -> Array:
    """y [M, N] of x [M, K]."""
    flat, wide = flatten(lists, sizes), jnp.promote_types(x.dtype, jnp.float32)
    xt = _feature_major(x, sizes.rows, sizes.bk)
    stored = values.reshape(-1, sizes.bk, sizes.bn)
    stride = _stride(sizes, sizes.columns, sizes.bk)

    def add(acc, slots, valid, place):
        del place
        some = jnp.where(valid[:, None, None], stored[slots], 0).reshape(-1, sizes.bn)
        inputs = xt[jnp.minimum(flat.rows[slots], sizes.rows - 1)].reshape(-1, x.shape[0])
        return acc + jax.lax.dot_general(some, inputs, (((0,), (0,)), ((), ())), preferred_element_type=wide)

    def column(line):
        return _line(*line, stride, flat.out_slot, add)(_zeros((sizes.bn, x.shape[0]), wide, x)).astype(x.dtype)

    return _rows_again(jax.lax.map(column, (flat.out_start, flat.out_count)), sizes.outputs)


def _zeros(shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
    """Zeros that differ between devices, as loops over them require, wherever `like` does."""
    return jnp.zeros(shape, dtype) + (like[0, 0] * 0).astype(dtype)


def backward(x: Array, values: Array, lists: BlockLists, sizes: Sizes, dy: Array) -> tuple[Array, Array]:
    """dx [M, K] and dvalues [G, C, bk, bn]."""
    flat, wide, m = flatten(lists, sizes), jnp.promote_types(x.dtype, jnp.float32), x.shape[0]
    xt, dyt = _feature_major(x, sizes.rows, sizes.bk), _feature_major(dy, sizes.columns, sizes.bn)
    stored = values.reshape(-1, sizes.bk, sizes.bn)
    stride = _stride(sizes, sizes.rows, sizes.bn)

    def add(acc, slots, valid, place):
        del place
        some = jnp.where(valid[:, None, None], stored[slots], 0)
        outputs = dyt[jnp.minimum(flat.cols[slots], sizes.columns - 1)]
        return acc + jnp.einsum("ukn,unm->km", some, outputs, preferred_element_type=wide)

    def row(line):
        return _line(*line, stride, flat.in_slot, add)(_zeros((sizes.bk, m), wide, x)).astype(x.dtype)

    dx = _rows_again(jax.lax.map(row, (flat.in_start, flat.in_count)), sizes.inputs)
    across = _stride(sizes, sizes.columns, sizes.bk)

    def column(j, grads):
        def put(grads, slots, valid, place):
            # What lies behind the last slot of a line is overwritten by the next line, or dropped at the end.
            del valid
            inputs = xt[jnp.minimum(flat.rows[slots], sizes.rows - 1)].reshape(-1, m)
            g = jax.lax.dot_general(inputs, dyt[j], (((1,), (1,)), ((), ())), preferred_element_type=wide)
            g = g.reshape(across, sizes.bk, sizes.bn).astype(grads.dtype)
            return jax.lax.dynamic_update_slice_in_dim(grads, g, place, 0)

        return _line(flat.out_start[j], flat.out_count[j], across, flat.out_slot, put)(grads)

    slots = sizes.groups * sizes.capacity
    grads = _zeros((slots + across, sizes.bk, sizes.bn), values.dtype, x)
    grads = jax.lax.fori_loop(0, sizes.columns, column, grads)[:slots]
    used = (jnp.arange(sizes.capacity) < lists.out_ptr[:, -1:]).reshape(-1)
    grads = jnp.where(used[:, None, None], grads, 0)
    return dx, jnp.zeros_like(grads).at[flat.out_slot].set(grads, unique_indices=True).reshape(values.shape)
