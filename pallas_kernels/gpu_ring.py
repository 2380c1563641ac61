"""Products on Hopper GPUs: a ring of slots in shared memory, one warpgroup that fetches and others that multiply.

A program owns a tile of the result. The fetching warpgroup brings the two factors of each step through TMA into the
next free slot; the others multiply with `wgmma` into accumulators that stay in registers from the first step to the
last. What a step is (a block, a tap, a chunk of rows) is up to the kernel.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import gpu_load, vary_alike

ROWS = 64
"""Rows of one wgmma tile, and what one step sums over at least."""
SHARED_BYTES = 208 * 1024
"""What the ring, the tile on its way out and scratch take of shared memory."""
PROGRAMS = 2 * 132
"""Programs that keep every multiprocessor of an H200 busy."""


@dataclasses.dataclass(frozen=True)
class Tile:
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


def tile_of(workers: int, pieces: int, columns: int, out_bytes: int, scratch: int = 0) -> Tile:
    """The tile, with as many slots of 64 of the inner side as fit beside so many bytes of scratch."""
    slot = 2 * ROWS * (workers * pieces * ROWS + columns)
    out = workers * ROWS * columns * out_bytes
    return Tile(workers, pieces, columns, max(2, min(5, (SHARED_BYTES - out - scratch) // slot)))


def shared(shape, dtype):
    """Shared memory in the layout that TMA writes and wgmma reads."""
    lanes = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(128)))


def launch(name, body, tile: Tile, ring, out, grid, operands, interpret, *, copies: int = 2, scratch=()):
    """Runs `body` in every program.

    Args:
        name: the kernel's.
        body: called with the operands' references and those of scratch, then the grid indices; returns the number of
            steps, a function `(step, a, b)` that gives the copies of a step into its slots as pairs of source and
            destination, one `(step, a, b, worker, piece)` that gives the factors for a worker's piece, and one that
            gives the index of 64 rows of the tile in the result from the first of them.
        tile: what a program owns.
        ring: the two slots, as `shared` gives them with the number of stages in front.
        out: the result.
        grid: sizes by name.
        operands: arrays.
        interpret: None, or `plgpu.InterpretGPUParams(...)`.
        copies: of a step.
        scratch: more shared memory.
    """
    staged = shared((tile.workers, ROWS, tile.columns), out.dtype)
    full = plgpu.Barrier(num_arrivals=copies, num_barriers=tile.stages)
    free = plgpu.Barrier(num_arrivals=tile.workers, num_barriers=tile.stages)

    def program(*refs, scoped):
        (a_s, b_s), out_s, full, free, extra = scoped
        *refs, out_ref = refs
        at = [lax.axis_index(axis) for axis in grid]
        worker = lax.axis_index("worker")
        steps, fetched, factors, target = body((*refs, *extra), *at)

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
                        plgpu.wgmma(acc, *factors(t, a_s.at[slot], b_s.at[slot], worker, piece))
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

                for source, destination in fetched(t, a_s.at[slot], b_s.at[slot]):
                    plgpu.copy_gmem_to_smem(source, destination, full.at[slot])

    def kernel(*refs):
        pl.run_scoped(
            lambda *scoped: program(*refs, scoped=scoped),
            list(ring),
            staged,
            full,
            free,
            list(scratch),
            collective_axes="worker",
        )

    kernel.__name__ = name
    kwargs = {} if interpret is None else {"interpret": interpret}
    found = plgpu.kernel(
        kernel,
        out_type=out,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=tile.workers + 1,
        thread_name="worker",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **kwargs,
    )(*operands)
    return vary_alike((found, operands))[0]  # inside jax.shard_map results differ as operands do


def pad(x, rows: int, columns: int):
    """A matrix with zeros behind, so that its sides are multiples of these."""
    rows, columns = -x.shape[0] % rows, -x.shape[1] % columns
    return jnp.pad(x, ((0, rows), (0, columns))) if rows or columns else x


def columns_of(width: int) -> int:
    """Columns of a tile of something `width` wide, a multiple of 64."""
    return 128 if width % 128 == 0 else 64


def interleaved(rows, place):
    """Rows that were copied one by one, brought through registers to `place`, in the form that wgmma reads.

    Two places in turn suffice: products of two steps ago are done with theirs.
    """
    place[...] = gpu_load(rows, plgpu.Layout.WGMMA)
    plgpu.commit_smem()
    return place
