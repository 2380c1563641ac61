"""N:M products on Hopper GPUs: a decode kernel that reads the stored values once, at the speed of memory.

For a few rows of x (decoding) the product is bound by what it reads, and the stored form is all that is read: every
warpgroup walks down some groups of a stripe of columns, picks for each stored value the feature at its position by
selects, and adds up in registers. Sums of different groups meet afterwards, in a fixed order.

Many rows (training, prefill) are bound by products, which values in scattered places do not save: sparse `wgmma` is not
offered for Hopper. Those calls are refused; the "xla" path multiplies them, and gives the gradients here.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import gpu_load
from pallas_kernels.nm_matmul import xla
from pallas_kernels.nm_matmul.shapes import Sizes

Array = Any

MAX_ROWS = 4
MAX_M = 8
THREADS = 128
PROGRAMS = 8 * 132
"""Warpgroups that keep enough reads in flight on an H200."""
TOGETHER = 4
"""Groups whose values are read at a time."""


def _width(outputs: int) -> int:
    """Columns of a stripe: so many neighbouring ones a thread that there are stripes enough."""
    each = (8, 4, 2) if outputs >= 2**14 else (4, 2)
    return next(THREADS * e for e in each if outputs % (THREADS * e) == 0)


def forward(x: Array, values: Array, positions: Array, sizes: Sizes, *, interpret: Any = None) -> Array:
    """y [M, N] of x [M, K].

    Args:
        x, values, positions, sizes: as `supports` accepts them.
        interpret: None, or `plgpu.InterpretGPUParams(...)` to run on any machine (JAX 0.12).
    """
    rows, n, m = x.shape[0], sizes.n, sizes.m
    width = _width(sizes.outputs)
    stripes = sizes.outputs // width
    each = pl.cdiv(sizes.groups, pl.cdiv(PROGRAMS, stripes))
    each = pl.cdiv(max(each, 2 * TOGETHER), TOGETHER) * TOGETHER
    splits = pl.cdiv(sizes.groups, each)
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=width // THREADS)

    def kernel(x_ref, values_ref, positions_ref, out_ref):
        split, stripe = lax.axis_index("split"), lax.axis_index("stripe")
        columns = pl.ds(stripe * width, width)

        def full(value):
            return plgpu.layout_cast(jnp.full((width,), value, jnp.float32), layout)

        def read(g):
            stored = [gpu_load(values_ref.at[g * n + s, columns], layout) for s in range(n)]
            places = [gpu_load(positions_ref.at[g * n + s, columns], layout) for s in range(n)]
            features = [[x_ref[r, g * m + p].astype(jnp.float32) for p in range(m)] for r in range(rows)]
            return stored, places, features

        def add(acc, stored, places, features):
            acc = list(acc)
            for value, place in zip(stored, places, strict=True):
                value, place = value.astype(jnp.float32), place.astype(jnp.int32)
                masks = [place == p for p in range(1, m)]
                for r in range(rows):
                    met = full(features[r][0])
                    for p, mask in enumerate(masks, 1):
                        met = jnp.where(mask, full(features[r][p]), met)
                    acc[r] = acc[r] + value * met
            return tuple(acc)

        def groups(count):
            def step(turn, acc):
                # All reads are on their way before the first sum.
                for found in [read(first + turn * count + i) for i in range(count)]:
                    acc = add(acc, *found)
                return acc

            return step

        first = split * each
        here = jnp.minimum(first + each, sizes.groups) - first
        whole = lax.div(here, jnp.int32(TOGETHER))
        sums = lax.fori_loop(jnp.int32(0), whole, groups(TOGETHER), (full(0.0),) * rows)
        if sizes.groups % TOGETHER:
            sums = lax.fori_loop(whole * TOGETHER, here, groups(1), sums)
        for r in range(rows):
            out_ref[split, r, columns] = sums[r]

    kernel.__name__ = "nm_matmul_forward"
    kwargs = {} if interpret is None else {"interpret": interpret}
    parts = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((splits, rows, sizes.outputs), jnp.float32),
        grid=(splits, stripes),
        grid_names=("split", "stripe"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **kwargs,
    )(x, values, positions.astype(jnp.uint8))
    return parts.sum(0).astype(x.dtype)


def backward(x: Array, values: Array, positions: Array, sizes: Sizes, dy: Array) -> tuple[Array, Array]:
    """dx [M, K] and dvalues, by the XLA path."""
    return xla.backward(x, values, positions, sizes, dy)


def supports(x: Array, values: Array, positions: Array, sizes: Sizes) -> str | None:
    """None, or why this path refuses the call."""
    del positions
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) or values.dtype != x.dtype:
        return f"dtypes {x.dtype} and {values.dtype}; the GPU kernel takes bfloat16, float16 or float32, both alike"
    if sizes.share != 1:
        return f"a pattern shared by {sizes.share} columns; implementation='xla' gathers for dense products"
    if x.shape[0] > MAX_ROWS:
        return (
            f"{x.shape[0]} rows; the GPU kernel decodes at most {MAX_ROWS}: more are bound by products, which "
            "values in scattered places do not save"
        )
    if sizes.m > MAX_M:
        return f"groups of m={sizes.m}; the GPU kernel takes at most {MAX_M}"
    if sizes.outputs % (2 * THREADS):
        return f"{sizes.outputs} outputs; the GPU kernel takes multiples of {2 * THREADS}"
    return None
