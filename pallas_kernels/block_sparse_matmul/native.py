"""Block-sparse products by the C++ kernels of cpu.cc, on XLA's thread pool, in float32 or float64."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import compat, native
from pallas_kernels.block_sparse_matmul.lists import BlockLists
from pallas_kernels.block_sparse_matmul.shapes import Sizes

Array = Any

SOURCE = Path(__file__).with_name("cpu.cc")
TARGETS = tuple(f"bsmm_{name}_{kind}" for name in ("forward", "dx", "dvalues") for kind in ("f32", "f64"))


def supports(x: Array, values: Array, lists: BlockLists, sizes: Sizes) -> str | None:
    """None, or why this path refuses the call."""
    del x, values, lists, sizes
    if jax.default_backend() != "cpu":
        return f"it runs on the CPU, and the default backend is {jax.default_backend()}"
    return native.unavailable(SOURCE, TARGETS)


def _call(name: str, shape: tuple[int, ...], left: Array, right: Array, order: tuple, sizes: Sizes) -> Array:
    """One handler; 16-bit numbers are computed with as float32."""
    dtype = left.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    operands = (left.astype(wide), right.astype(wide), *(x.astype(jnp.int32) for x in order))
    result = compat.like_varying(shape, wide, *operands)
    target = f"bsmm_{name}_{'f64' if wide == jnp.float64 else 'f32'}"
    call = jax.ffi.ffi_call(target, result, vmap_method="sequential")
    return call(*operands, kb=np.int64(sizes.rows), nb=np.int64(sizes.columns)).astype(dtype)


def forward(x: Array, values: Array, lists: BlockLists, sizes: Sizes) -> Array:
    """y [M, N] of x [M, K]."""
    order = (lists.rows, lists.cols, lists.out_ptr, lists.out_slot)
    return _call("forward", (x.shape[0], sizes.outputs), x, values, order, sizes)


def backward(x: Array, values: Array, lists: BlockLists, sizes: Sizes, dy: Array) -> tuple[Array, Array]:
    """dx [M, K] and dvalues [G, C, bk, bn]; two calls, so that the compiler drops the one that nobody reads."""
    by_input = (lists.rows, lists.cols, lists.in_ptr, lists.in_slot)
    by_output = (lists.rows, lists.cols, lists.out_ptr, lists.out_slot)
    dx = _call("dx", (x.shape[0], sizes.inputs), dy, values, by_input, sizes)
    return dx, _call("dvalues", values.shape, x, dy, by_output, sizes)
