"""Convolution over rows on Hopper GPUs: products of gathered rows with one tap after the other (implicit GEMM).

A program owns 64 or 128 output rows and some features, and walks over the taps that have a neighbour of any of its
rows; the others are skipped. Neighbours lie anywhere, so TMA brings them row by row (Hopper has no gather of its own),
and rows that are missing are read from one of zeros. `wgmma` wants the rows of a factor interleaved: they pass through
registers into that form. The gradient of the weights owns some features of one tap and walks over its pairs, with rows
of x and of dy gathered; where there are too few of these to fill the GPU, several programs share the pairs, and their
sums are added up afterwards, in order.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_ring
from pallas_kernels.gpu_ring import PROGRAMS, ROWS, columns_of, interleaved, tile_of
from pallas_kernels.sparse_conv.lists import KernelMap, pair_lists

Array = Any

SPLIT_PAIRS = 2048
"""Fewest pairs that one of several programs sums over."""


def _padded(x, rows: int):
    """A matrix with `rows` rows of zeros behind, and a multiple of 64 features."""
    return jnp.pad(x, ((0, rows), (0, -x.shape[1] % ROWS)))


def forward(x: Array, weights: Array, kernel_map: KernelMap, groups: int, *, interpret: Any = None) -> Array:
    """The sum over taps, float32 (capacity_out, out).

    Args:
        x, weights, kernel_map, groups: as `supports` accepts them.
        interpret: None, or `plgpu.InterpretGPUParams(...)` to run on any machine (JAX 0.12).
    """
    del groups
    rows_out, outputs = kernel_map.capacity_out, weights.shape[-1]
    x = _padded(x, 1)
    weights = jnp.pad(weights, ((0, 0), (0, x.shape[1] - weights.shape[1]), (0, -outputs % ROWS)))
    taps, inputs, wide = weights.shape
    columns, chunks = columns_of(wide), inputs // ROWS
    workers = 2 if rows_out > ROWS * PROGRAMS else 1
    tile = tile_of(workers, 1, columns, 4, scratch=workers * 4 * ROWS * ROWS)
    table = jnp.pad(kernel_map.fwd, ((0, 0), (0, -rows_out % tile.rows)), constant_values=kernel_map.capacity_in)
    there = (table < kernel_map.capacity_in).reshape(taps, -1, tile.rows).any(-1).T
    order = jnp.argsort(~there, axis=1, stable=True).astype(jnp.int32)

    def body(refs, i, j):
        x_ref, kernel, table_ref, order_ref, count_ref, ready = refs

        def copies(t, a, b):
            tap, at = order_ref[i, lax.div(t, jnp.int32(chunks))], lax.rem(t, jnp.int32(chunks)) * ROWS
            yield kernel.at[tap, pl.ds(at, ROWS), pl.ds(j * columns, columns)], b
            for r in range(tile.rows):
                yield x_ref.at[pl.ds(table_ref[tap, i * tile.rows + r], 1), pl.ds(at, ROWS)], a.at[pl.ds(r, 1)]

        def factors(t, a, b, worker, piece):
            del piece
            place = ready.at[worker, lax.rem(t, jnp.int32(2))]
            return interleaved(a.at[pl.ds(worker * ROWS, ROWS)], place), b

        def target(first):
            return pl.ds(i * tile.rows + first, ROWS), pl.ds(j * columns, columns)

        return count_ref[i] * chunks, copies, factors, target

    grid = {"row": table.shape[1] // tile.rows, "column": wide // columns}
    ring = (
        plgpu.SMEM((tile.stages, tile.rows, ROWS), x.dtype),
        gpu_ring.shared((tile.stages, ROWS, columns), x.dtype),
    )
    y = gpu_ring.launch(
        "sparse_conv_forward",
        body,
        tile,
        ring,
        jax.ShapeDtypeStruct((table.shape[1], wide), jnp.float32),
        grid,
        (x, weights, table, order, there.sum(1, dtype=jnp.int32)),
        interpret,
        copies=tile.rows + 1,
        scratch=[gpu_ring.shared((tile.workers, 2, ROWS, ROWS), x.dtype)],
    )
    return y[:rows_out, :outputs]


def weight_gradient(
    x: Array, dy: Array, kernel_map: KernelMap, shape: tuple[int, int, int], groups: int, *, interpret: Any = None
) -> Array:
    """For every tap the sum over its pairs of rows of x times rows of dy, float32 (taps, in, out)."""
    del groups
    taps, inputs, outputs = shape
    lists = pair_lists(kernel_map)
    x, dy = _padded(x, 1), _padded(dy, 1)
    columns = columns_of(dy.shape[1])
    parts, tiles = dy.shape[1] // columns, x.shape[1] // ROWS
    longest = lists.sources.shape[1]
    splits = max(1, min(PROGRAMS // (taps * parts * tiles), longest // SPLIT_PAIRS))
    beyond = (0, 0), (0, -longest % ROWS)
    sources = jnp.pad(lists.sources, beyond, constant_values=kernel_map.capacity_in)
    targets = jnp.pad(lists.targets, beyond, constant_values=kernel_map.capacity_out)
    tile = tile_of(1, 1, columns, 4, scratch=4 * ROWS * (ROWS + columns))

    def body(refs, split, part, tap):
        x_ref, dy_ref, source, target_ref, count, ready_a, ready_b = refs
        down, across = lax.div(part, jnp.int32(parts)), lax.rem(part, jnp.int32(parts))
        steps = lax.div(count[tap] + (ROWS - 1), jnp.int32(ROWS))
        each = lax.div(steps + (splits - 1), jnp.int32(splits))
        first = split * each

        def copies(t, a, b):
            for r in range(ROWS):
                at = (first + t) * ROWS + r
                yield x_ref.at[pl.ds(source[tap, at], 1), pl.ds(down * ROWS, ROWS)], a.at[pl.ds(r, 1)]
                yield dy_ref.at[pl.ds(target_ref[tap, at], 1), pl.ds(across * columns, columns)], b.at[pl.ds(r, 1)]

        def factors(t, a, b, worker, piece):
            del worker, piece
            place = lax.rem(t, jnp.int32(2))
            return interleaved(a, ready_a.at[place]).transpose((1, 0)), interleaved(b, ready_b.at[place])

        def target(first):
            return split, tap, pl.ds(down * ROWS + first, ROWS), pl.ds(across * columns, columns)

        return jnp.clip(steps - first, 0, each), copies, factors, target

    grid = {"split": splits, "part": parts * tiles, "tap": taps}
    found = gpu_ring.launch(
        "sparse_conv_dweights",
        body,
        tile,
        [plgpu.SMEM((tile.stages, ROWS, width), x.dtype) for width in (ROWS, columns)],
        jax.ShapeDtypeStruct((splits, taps, x.shape[1], dy.shape[1]), jnp.float32),
        grid,
        (x, dy, sources, targets, lists.counts),
        interpret,
        copies=2 * ROWS,
        scratch=[gpu_ring.shared((2, ROWS, width), x.dtype) for width in (ROWS, columns)],
    )
    return found.sum(0)[:, :inputs, :outputs]


def supports(x: Array, weights: Array, kernel_map: KernelMap, groups: int) -> str | None:
    """None, or why this path refuses the call."""
    if x.dtype not in (jnp.bfloat16, jnp.float16) or weights.dtype != x.dtype:
        return f"dtypes {x.dtype} and {weights.dtype}; the tensor cores take bfloat16 or float16, both alike"
    if groups > 1:
        return f"{groups} feature groups, whose products are too small for the tensor cores"
    if not kernel_map.capacity_out or not kernel_map.capacity_in or not weights.size:
        return "there are no rows, taps or features"
    return None
