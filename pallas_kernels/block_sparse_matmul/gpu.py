"""Block-sparse products on Hopper GPUs: Mosaic kernels with one warpgroup that fetches and two that multiply.

Rows (forward and dx): a program owns a tile of the result. The fetching warpgroup walks the list of its block column
and brings the listed inputs and stored blocks, in chunks of 64, through TMA into a ring of slots in shared memory; the
others multiply with `wgmma` into accumulators that stay in registers from the first block to the last.

Gradient of values: a program owns a tile of one stored block and walks over the rows of x and dy; where there are too
few blocks to fill the GPU, several programs share a block's rows, and their sums are added up afterwards, in order.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import gpu_ring
from pallas_kernels.block_sparse_matmul.lists import BlockLists, flatten
from pallas_kernels.block_sparse_matmul.shapes import Sizes
from pallas_kernels.gpu_ring import PROGRAMS, ROWS, columns_of, pad, tile_of

Array = Any

SPLIT_ROWS = 1024
"""Fewest rows that one of several programs sums over."""


def _rows(x, stored, start, count, other, slot, transposed: bool, name: str, interpret):
    """[M, inputs] times the listed blocks: [M', blocks * out], M' a multiple of a tile's rows."""
    wide, out = stored.shape[1:][::-1] if transposed else stored.shape[1:]
    columns, chunks = columns_of(out), wide // ROWS
    tile = tile_of(2, 2 if x.shape[0] > 2 * ROWS else 1, columns, 2)
    x = pad(x, tile.rows, wide)
    parts = out // columns
    last = slot.shape[0] - 1

    def body(refs, i, j):
        x_ref, stored_ref, start_ref, count_ref, other_ref, slot_ref = refs
        block, part = (j, 0) if parts == 1 else (lax.div(j, jnp.int32(parts)), lax.rem(j, jnp.int32(parts)))
        first, steps = start_ref[block], count_ref[block] * chunks

        def copies(t, a, b):
            at, chunk = (t, 0) if chunks == 1 else (lax.div(t, jnp.int32(chunks)), lax.rem(t, jnp.int32(chunks)))
            at = jnp.minimum(first + at, last)
            inner, outer = pl.ds(chunk * ROWS, ROWS), pl.ds(part * columns, columns)
            inputs = x_ref.at[pl.ds(i * tile.rows, tile.rows), pl.ds(other_ref[at] * wide + chunk * ROWS, ROWS)]
            block = stored_ref.at[(slot_ref[at], *((outer, inner) if transposed else (inner, outer)))]
            return (inputs, a), (block, b)

        def factors(t, a, b, worker, piece):
            rows = pl.ds((worker * tile.pieces + piece) * ROWS, ROWS)
            return a.at[rows], b.transpose((1, 0)) if transposed else b

        def target(first):
            return pl.ds(i * tile.rows + first, ROWS), pl.ds(j * columns, columns)

        return steps, copies, factors, target

    # Neighbouring programs read the same rows of x, so the cache brings x in once; all stored blocks fit there.
    grid = {"row": x.shape[0] // tile.rows, "column": start.shape[0] * parts}
    shapes = (tile.rows, ROWS), (columns, ROWS) if transposed else (ROWS, columns)
    ring = [gpu_ring.shared((tile.stages, *shape), x.dtype) for shape in shapes]
    result = jax.ShapeDtypeStruct((x.shape[0], start.shape[0] * out), x.dtype)
    return gpu_ring.launch(name, body, tile, ring, result, grid, (x, stored, start, count, other, slot), interpret)


def forward(x: Array, values: Array, lists: BlockLists, sizes: Sizes, *, interpret: Any = None) -> Array:
    """y [M, N] of x [M, K].

    Args:
        x, values, lists, sizes: as `supports` accepts them.
        interpret: None, or `plgpu.InterpretGPUParams(...)` to run on any machine (JAX 0.12).
    """
    flat = flatten(lists, sizes)
    stored = values.reshape(-1, sizes.bk, sizes.bn)
    row = jnp.minimum(flat.rows[flat.out_slot], sizes.rows - 1)
    name = "block_sparse_matmul_forward"
    y = _rows(x, stored, flat.out_start, flat.out_count, row, flat.out_slot, False, name, interpret)
    return y[: x.shape[0], : sizes.outputs]


def dx(dy: Array, values: Array, lists: BlockLists, sizes: Sizes, *, interpret: Any = None) -> Array:
    """dx [M, K] of dy [M, N]: the same kernel on the transposed blocks, listed by input block."""
    flat = flatten(lists, sizes)
    stored = values.reshape(-1, sizes.bk, sizes.bn)
    column = jnp.minimum(flat.cols[flat.in_slot], sizes.columns - 1)
    name = "block_sparse_matmul_dx"
    got = _rows(dy, stored, flat.in_start, flat.in_count, column, flat.in_slot, True, name, interpret)
    return got[: dy.shape[0], : sizes.inputs]


def dvalues(x: Array, dy: Array, lists: BlockLists, sizes: Sizes, *, interpret: Any = None) -> Array:
    """Gradient [G, C, bk, bn] of the stored blocks; empty slots get 0."""
    flat, slots = flatten(lists, sizes), sizes.groups * sizes.capacity
    columns = columns_of(sizes.bn)
    parts, tiles = sizes.bn // columns, sizes.bk // columns_of(sizes.bk)
    programs = slots * parts * tiles
    splits = max(1, min(PROGRAMS // programs, x.shape[0] // SPLIT_ROWS))
    partial = jnp.dtype(jnp.float32) if splits > 1 else x.dtype
    tile = tile_of(columns_of(sizes.bk) // ROWS, 1, columns, partial.itemsize)
    x, dy = pad(x, splits * ROWS, sizes.bk), pad(dy, splits * ROWS, sizes.bn)
    steps = x.shape[0] // (splits * ROWS)

    def body(refs, split, part, s):
        x_ref, dy_ref, row_ref, column_ref, slot_ref = refs
        slot = slot_ref[s]
        down, across = lax.div(part, jnp.int32(parts)), lax.rem(part, jnp.int32(parts))
        left = jnp.minimum(row_ref[slot], sizes.rows - 1) * sizes.bk + down * tile.rows
        right = jnp.minimum(column_ref[slot], sizes.columns - 1) * sizes.bn + across * columns

        def copies(t, a, b):
            rows = pl.ds((split * steps + t) * ROWS, ROWS)
            return (x_ref.at[rows, pl.ds(left, tile.rows)], a), (dy_ref.at[rows, pl.ds(right, columns)], b)

        def factors(t, a, b, worker, piece):
            return a.at[:, pl.ds((worker * tile.pieces + piece) * ROWS, ROWS)].transpose((1, 0)), b

        def target(first):
            return split, slot, pl.ds(down * tile.rows + first, ROWS), pl.ds(across * columns, columns)

        return jnp.where(row_ref[slot] < sizes.rows, steps, 0), copies, factors, target

    # Blocks of one column follow each other, so their rows of dy come from the cache.
    grid = {"split": splits, "part": parts * tiles, "slot": slots}
    ring = [gpu_ring.shared((tile.stages, ROWS, width), x.dtype) for width in (tile.rows, columns)]
    result = jax.ShapeDtypeStruct((splits, slots, sizes.bk, sizes.bn), partial)
    operands = x, dy, flat.rows, flat.cols, flat.out_slot
    found = gpu_ring.launch("block_sparse_matmul_dvalues", body, tile, ring, result, grid, operands, interpret)
    found = found.sum(0).astype(x.dtype) if splits > 1 else found[0]
    return found.reshape(sizes.groups, sizes.capacity, sizes.bk, sizes.bn)


def backward(
    x: Array, values: Array, lists: BlockLists, sizes: Sizes, dy: Array, *, interpret: Any = None
) -> tuple[Array, Array]:
    """dx [M, K] and dvalues [G, C, bk, bn]; nothing is added atomically, so results do not vary from run to run."""
    options = {"interpret": interpret}
    return dx(dy, values, lists, sizes, **options), dvalues(x, dy, lists, sizes, **options)


def supports(x: Array, values: Array, lists: BlockLists, sizes: Sizes) -> str | None:
    """None, or why this path refuses the call."""
    del lists
    if x.dtype not in (jnp.bfloat16, jnp.float16) or values.dtype != x.dtype:
        return f"dtypes {x.dtype} and {values.dtype}; the tensor cores take bfloat16 or float16, both alike"
    if sizes.bk % ROWS or sizes.bn % ROWS:
        return f"blocks of {sizes.bk} x {sizes.bn}; on GPU both sides are multiples of {ROWS}"
    return None
