"""Block-sparse products on Hopper GPUs: Mosaic kernels with one warpgroup that fetches and two that multiply.

Rows (forward and dx): a program owns a tile of the result. The fetching warpgroup walks the list of its block column
and brings the listed inputs and stored blocks, in chunks of 64, through TMA into a ring of slots in shared memory; the
others multiply with `wgmma` into accumulators that stay in registers from the first block to the last.

Gradient of values: a program owns a tile of one stored block and walks over the rows of x and dy; where there are too
few blocks to fill the GPU, several programs share a block's rows, and their sums are added up afterwards, in order.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_matmul.lists import BlockLists, flatten
from pallas_kernels.block_sparse_matmul.shapes import Sizes

Array = Any

ROWS = 64
"""Rows of one wgmma tile, and the chunk of a block that one step sums over."""
SHARED_BYTES = 208 * 1024
"""What the ring and the tile on its way out take of shared memory."""
PROGRAMS = 2 * 132
"""Programs that keep every multiprocessor of an H200 busy."""
SPLIT_ROWS = 1024
"""Fewest rows that one of several programs sums over."""


@dataclasses.dataclass(frozen=True)
class _Tile:
    """What a program owns.

    Attributes:
        workers: warpgroups that multiply.
        pieces: tiles of 64 rows of each worker.
        columns: of the tile.
        stages: slots of the ring.
    """

    workers: int
    pieces: int
    columns: int
    stages: int

    @property
    def rows(self) -> int:
        return self.workers * self.pieces * ROWS


def _tile(workers: int, pieces: int, columns: int, out_bytes: int) -> _Tile:
    slot = 2 * ROWS * (workers * pieces * ROWS + columns)
    out = workers * ROWS * columns * out_bytes
    return _Tile(workers, pieces, columns, max(2, min(5, (SHARED_BYTES - out) // slot)))


def _shared(shape, dtype):
    """Shared memory in the layout that TMA writes and wgmma reads."""
    lanes = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(128)))


def _launch(name, body, tile: _Tile, ring, out, grid, operands, interpret):
    """Runs `body` in every program.

    Args:
        name: the kernel's.
        body: called with the operands' references and the grid indices; returns the number of steps, a function that
            gives the two sources of a step, one that gives its factors for a worker's piece, and one that gives the
            index of 64 rows of the tile in the result from the first of them.
        tile: what a program owns.
        ring: shapes of the two slots.
        out: the result.
        grid: sizes by name.
        operands: arrays.
        interpret: None, or `plgpu.InterpretGPUParams(...)`.
    """
    dtype = operands[0].dtype
    slots = [_shared((tile.stages, *shape), dtype) for shape in ring]
    staged = _shared((tile.workers, ROWS, tile.columns), out.dtype)
    full = plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages)
    free = plgpu.Barrier(num_arrivals=tile.workers, num_barriers=tile.stages)

    def program(*refs, scoped):
        (a_s, b_s), out_s, full, free = scoped
        *refs, out_ref = refs
        at = [lax.axis_index(axis) for axis in grid]
        worker = lax.axis_index("worker")
        steps, sources, factors, target = body(refs, *at)

        @pl.when(worker < tile.workers)
        def _():
            if tile.workers > 1:
                plgpu.set_max_registers(232, action="increase")

            def multiply(*accumulators):
                @pl.loop(0, steps)
                def _(t):
                    slot = lax.rem(t, jnp.int32(tile.stages))
                    plgpu.barrier_wait(full.at[slot])
                    for piece, acc in enumerate(accumulators):
                        plgpu.wgmma(acc, *factors(a_s.at[slot], b_s.at[slot], worker, piece))
                    # The products of this step run on; those of the step before are done with their slot.
                    plgpu.wgmma_wait(tile.pieces)

                    @pl.when(t > 0)
                    def _():
                        plgpu.barrier_arrive(free.at[lax.rem(t - 1, jnp.int32(tile.stages))])

                for piece, acc in enumerate(accumulators):
                    if piece:
                        plgpu.wait_smem_to_gmem(0)
                    out_s.at[worker][...] = acc[...].astype(out.dtype)
                    plgpu.commit_smem()
                    first = (worker * tile.pieces + piece) * ROWS
                    plgpu.copy_smem_to_gmem(out_s.at[worker], out_ref.at[target(first)])
                plgpu.wait_smem_to_gmem(0)

            pl.run_scoped(multiply, *[plgpu.ACC((ROWS, tile.columns), jnp.float32)] * tile.pieces)

        @pl.when(worker == tile.workers)
        def _():
            # A program with one worker shares its multiprocessor with others, so it leaves them their registers.
            if tile.workers > 1:
                plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, steps)
            def _(t):
                slot = lax.rem(t, jnp.int32(tile.stages))

                @pl.when(t >= tile.stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                a, b = sources(t)
                plgpu.copy_gmem_to_smem(a, a_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(b, b_s.at[slot], full.at[slot])

    def kernel(*refs):
        pl.run_scoped(
            lambda *scoped: program(*refs, scoped=scoped), slots, staged, full, free, collective_axes="worker"
        )

    kernel.__name__ = name
    kwargs = {} if interpret is None else {"interpret": interpret}
    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=tile.workers + 1,
        thread_name="worker",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **kwargs,
    )(*operands)


def _pad(x, rows: int, columns: int):
    rows, columns = -x.shape[0] % rows, -x.shape[1] % columns
    return jnp.pad(x, ((0, rows), (0, columns))) if rows or columns else x


def _columns(width: int) -> int:
    """Columns of a tile of a block `width` wide."""
    return 128 if width % 128 == 0 else 64


def _rows(x, stored, start, count, other, slot, transposed: bool, name: str, interpret):
    """[M, inputs] times the listed blocks: [M', blocks * out], M' a multiple of a tile's rows."""
    wide, out = stored.shape[1:][::-1] if transposed else stored.shape[1:]
    columns, chunks = _columns(out), wide // ROWS
    tile = _tile(2, 2 if x.shape[0] > 2 * ROWS else 1, columns, 2)
    x = _pad(x, tile.rows, wide)
    parts = out // columns
    last = slot.shape[0] - 1

    def body(refs, i, j):
        x_ref, stored_ref, start_ref, count_ref, other_ref, slot_ref = refs
        block, part = (j, 0) if parts == 1 else (lax.div(j, jnp.int32(parts)), lax.rem(j, jnp.int32(parts)))
        first, steps = start_ref[block], count_ref[block] * chunks

        def sources(t):
            at, chunk = (t, 0) if chunks == 1 else (lax.div(t, jnp.int32(chunks)), lax.rem(t, jnp.int32(chunks)))
            at = jnp.minimum(first + at, last)
            inner, outer = pl.ds(chunk * ROWS, ROWS), pl.ds(part * columns, columns)
            inputs = x_ref.at[pl.ds(i * tile.rows, tile.rows), pl.ds(other_ref[at] * wide + chunk * ROWS, ROWS)]
            return inputs, stored_ref.at[(slot_ref[at], *((outer, inner) if transposed else (inner, outer)))]

        def factors(a, b, worker, piece):
            rows = pl.ds((worker * tile.pieces + piece) * ROWS, ROWS)
            return a.at[rows], b.transpose((1, 0)) if transposed else b

        def target(first):
            return pl.ds(i * tile.rows + first, ROWS), pl.ds(j * columns, columns)

        return steps, sources, factors, target

    # Neighbouring programs read the same rows of x, so the cache brings x in once; all stored blocks fit there.
    grid = {"row": x.shape[0] // tile.rows, "column": start.shape[0] * parts}
    ring = (tile.rows, ROWS), (columns, ROWS) if transposed else (ROWS, columns)
    result = jax.ShapeDtypeStruct((x.shape[0], start.shape[0] * out), x.dtype)
    return _launch(name, body, tile, ring, result, grid, (x, stored, start, count, other, slot), interpret)


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
    columns = _columns(sizes.bn)
    parts, tiles = sizes.bn // columns, sizes.bk // _columns(sizes.bk)
    programs = slots * parts * tiles
    splits = max(1, min(PROGRAMS // programs, x.shape[0] // SPLIT_ROWS))
    partial = jnp.dtype(jnp.float32) if splits > 1 else x.dtype
    tile = _tile(_columns(sizes.bk) // ROWS, 1, columns, partial.itemsize)
    x, dy = _pad(x, splits * ROWS, sizes.bk), _pad(dy, splits * ROWS, sizes.bn)
    steps = x.shape[0] // (splits * ROWS)

    def body(refs, split, part, s):
        x_ref, dy_ref, row_ref, column_ref, slot_ref = refs
        slot = slot_ref[s]
        down, across = lax.div(part, jnp.int32(parts)), lax.rem(part, jnp.int32(parts))
        left = jnp.minimum(row_ref[slot], sizes.rows - 1) * sizes.bk + down * tile.rows
        right = jnp.minimum(column_ref[slot], sizes.columns - 1) * sizes.bn + across * columns

        def sources(t):
            rows = pl.ds((split * steps + t) * ROWS, ROWS)
            return x_ref.at[rows, pl.ds(left, tile.rows)], dy_ref.at[rows, pl.ds(right, columns)]

        def factors(a, b, worker, piece):
            return a.at[:, pl.ds((worker * tile.pieces + piece) * ROWS, ROWS)].transpose((1, 0)), b

        def target(first):
            return split, slot, pl.ds(down * tile.rows + first, ROWS), pl.ds(across * columns, columns)

        return jnp.where(row_ref[slot] < sizes.rows, steps, 0), sources, factors, target

    # Blocks of one column follow each other, so their rows of dy come from the cache.
    grid = {"split": splits, "part": parts * tiles, "slot": slots}
    ring = (ROWS, tile.rows), (ROWS, columns)
    result = jax.ShapeDtypeStruct((splits, slots, sizes.bk, sizes.bn), partial)
    operands = x, dy, flat.rows, flat.cols, flat.out_slot
    found = _launch("block_sparse_matmul_dvalues", body, tile, ring, result, grid, operands, interpret)
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
