"""N:M products on Hopper GPUs: a kernel for decoding, and one for patterns that columns share.

For a few rows of x (decoding) the product is bound by what it reads, and the stored form is all that is read: every
warpgroup walks down some groups of a stripe of columns, picks for each stored value the feature at its position by
selects, and adds up in registers. Sums of different groups meet afterwards, in a fixed order.

Where 64 columns or more share a pattern, a program owns some rows of x and columns of one pattern. TMA brings the
features that the pattern meets, which are rows of the transpose of x, and the values; `wgmma` wants features
interleaved, so they pass through registers into that form. Only n / m of the products are formed.

Other calls with many rows (training, prefill) are bound by products, which values in scattered places do not save:
sparse `wgmma` is not offered for Hopper. They are refused; the "xla" path multiplies them, and gives all gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_ring
from pallas_kernels.compat import gpu_load
from pallas_kernels.gpu_ring import columns_of, tile_of
from pallas_kernels.nm_matmul import xla
from pallas_kernels.nm_matmul.positions import inputs_of
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
    return (_decoded if sizes.share == 1 else _shared)(x, values, positions, sizes, interpret)


def _decoded(x, values, positions, sizes: Sizes, interpret):
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


def _shared(x, values, positions, sizes: Sizes, interpret):
    rows, columns = x.shape[0], columns_of(sizes.share)
    tile = tile_of(2 if rows > gpu_ring.ROWS else 1, 1, columns, 2, scratch=8 * gpu_ring.ROWS**2)
    features = gpu_ring.pad(x, tile.rows, 1).T
    values = gpu_ring.pad(values, gpu_ring.ROWS, 1)
    inputs = inputs_of(positions, sizes).T
    inputs = jnp.pad(inputs, ((0, 0), (0, values.shape[0] - inputs.shape[1])))

    def body(refs, i, j):
        features_ref, values_ref, inputs_ref, ready = refs
        group = lax.div(j * columns, jnp.int32(sizes.share))

        def copies(t, a, b):
            yield values_ref.at[pl.ds(t * gpu_ring.ROWS, gpu_ring.ROWS), pl.ds(j * columns, columns)], b
            for r in range(gpu_ring.ROWS):
                met = inputs_ref[group, t * gpu_ring.ROWS + r]
                yield features_ref.at[pl.ds(met, 1), pl.ds(i * tile.rows, tile.rows)], a.at[pl.ds(r, 1)]

        def factors(t, a, b, worker, piece):
            del piece
            mine = a.at[:, pl.ds(worker * gpu_ring.ROWS, gpu_ring.ROWS)]
            return gpu_ring.interleaved(mine, ready.at[worker, lax.rem(t, jnp.int32(2))]).transpose((1, 0)), b

        def target(first):
            return pl.ds(i * tile.rows + first, gpu_ring.ROWS), pl.ds(j * columns, columns)

        return values.shape[0] // gpu_ring.ROWS, copies, factors, target

    y = gpu_ring.launch(
        "nm_matmul_forward",
        body,
        tile,
        (
            plgpu.SMEM((tile.stages, gpu_ring.ROWS, tile.rows), x.dtype),
            gpu_ring.shared((tile.stages, gpu_ring.ROWS, columns), x.dtype),
        ),
        jax.ShapeDtypeStruct((features.shape[1], sizes.outputs), x.dtype),
        {"row": features.shape[1] // tile.rows, "column": sizes.outputs // columns},
        (features, values, inputs),
        interpret,
        copies=gpu_ring.ROWS + 1,
        scratch=[gpu_ring.shared((tile.workers, 2, gpu_ring.ROWS, gpu_ring.ROWS), x.dtype)],
    )
    return y[:rows]


def backward(x: Array, values: Array, positions: Array, sizes: Sizes, dy: Array) -> tuple[Array, Array]:
    """dx [M, K] and dvalues, by the XLA path."""
    return xla.backward(x, values, positions, sizes, dy)


def supports(x: Array, values: Array, positions: Array, sizes: Sizes) -> str | None:
    """None, or why this path refuses the call."""
    del positions
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) or values.dtype != x.dtype:
        return f"dtypes {x.dtype} and {values.dtype}; the GPU kernel takes bfloat16, float16 or float32, both alike"
    if sizes.share % gpu_ring.ROWS == 0:
        return None if x.dtype != jnp.float32 else "float32; the tensor cores take bfloat16 or float16"
    if sizes.share != 1:
        return f"a pattern shared by {sizes.share} columns; the GPU kernel takes multiples of {gpu_ring.ROWS}, or 1"
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
