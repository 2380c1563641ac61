"""Block-sparse products on TPU: panels of rows stay in vector memory, stored blocks stream past them.

Rows (forward and dx): a grid step owns one output block of one panel and loops over the listed blocks only, whose
number the scalar core reads from prefetched lists. Blocks of 128 are too small for a grid step each: bringing a step's
windows in costs as much as its product. So the blocks come through a ring of copies that are started several blocks
ahead, and little but the product is paid for each. Where a panel of all inputs does not fit, its blocks stream too
("direct").

Gradient of values: panels of x^T and dy stay, accumulators of as many blocks as fit stay with them, and one loop visits
those blocks for every panel.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compat
from pallas_kernels.block_sparse_matmul.lists import BlockLists, flatten
from pallas_kernels.block_sparse_matmul.shapes import Sizes

Array = Any

LANES = 128
VECTOR_BYTES = 56 * 2**20
"""Limit of vector memory asked for: less than what every generation since v5e has."""
USED_BYTES = 46 * 2**20
"""What the windows and buffers laid out here take of it at most."""
SCALAR_BYTES = 900 * 1024
"""What lists may take of the 1 MiB of scalar memory."""
ROW_TILE = 16
"""Rows of a register tile of a 16-bit type, which panels are multiples of."""
RING_BYTES = 4 * 2**20
PANELS = (2048, 1024, 512)
GRADIENT_PANELS = (1024, 512, 256, 128)
STAGES = 4
"""Finished gradient blocks on their way to device memory."""


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How the rows of a product are cut up.

    Attributes:
        rows: of a panel.
        resident: whether a panel's inputs stay in vector memory.
        ring: blocks in flight or in use.
        unroll: blocks that one step multiplies.
        wide: width of a block on the side that is summed over.
        out: width of a block on the side of the result.
        transposed: whether the stored blocks are used transposed.
    """

    rows: int
    resident: bool
    ring: int
    unroll: int
    wide: int
    out: int
    transposed: bool

    @property
    def ahead(self) -> int:
        """Blocks that are started before the one in use."""
        return self.ring - self.unroll


def _even(rows: int, most: int, multiple: int) -> int:
    """Rows of equal panels of at most `most`, rounded up to a multiple."""
    each = pl.cdiv(rows, pl.cdiv(rows, most))
    return pl.cdiv(each, multiple) * multiple


def _plan(m: int, sizes: Sizes, itemsize: int, transposed: bool) -> _Plan:
    wide, out = (sizes.bn, sizes.bk) if transposed else (sizes.bk, sizes.bn)
    inputs = (sizes.columns if transposed else sizes.rows) * wide
    block = wide * out * itemsize
    resident, rows, ring = False, 0, 0
    for most in PANELS:
        rows = _even(m, most, ROW_TILE)
        unroll = 4 if rows <= 256 and wide == LANES else 2 if rows <= 1024 and wide == LANES else 1
        ring = max(unroll + 3, min(unroll + 12, RING_BYTES // block))
        fixed = rows * out * (2 * itemsize + 4) + ring * block
        resident = 2 * rows * inputs * itemsize + fixed <= USED_BYTES
        if resident:
            return _Plan(rows, True, ring, unroll, wide, out, transposed)
    rows = _even(m, 1024, ROW_TILE)
    while rows > ROW_TILE:
        ring = max(3, min(8, (USED_BYTES - rows * out * (2 * itemsize + 4)) // (block + rows * wide * itemsize)))
        if rows * out * (2 * itemsize + 4) + ring * (block + rows * wide * itemsize) <= USED_BYTES:
            break
        rows = _even(m, rows // 2, ROW_TILE)
    return _Plan(rows, False, ring, 1, wide, out, transposed)


def _dot(a, b, contract):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _rows_kernel(plan: _Plan, ptr, other, slot, x, values, y, ring, acc, sems, *direct):
    panel, j = pl.program_id(0), pl.program_id(1)
    columns = pl.num_programs(1)
    first, last, total = ptr[j], ptr[j + 1], ptr[columns]

    def copies(block, place, inputs):
        """The copies that fill one place of the ring."""
        found = [pltpu.make_async_copy(values.at[block], ring.at[place], sems.at[0, place])]
        if not plan.resident:
            rows = pl.ds(pl.multiple_of(panel * plan.rows, ROW_TILE), plan.rows)
            columns = pl.ds(pl.multiple_of(inputs * plan.wide, LANES), plan.wide)
            found.append(pltpu.make_async_copy(x.at[rows, columns], direct[0].at[place], sems.at[1, place]))
        return found

    def fetch(t):
        # Past the end the last block comes again, which costs less than a branch; the last step waits for those.
        at = jnp.minimum(t, total - 1)
        for copy in copies(slot[at], lax.rem(t, plan.ring), other[at]):
            copy.start()

    def wait(t):
        for copy in copies(0, lax.rem(t, plan.ring), 0):
            copy.wait()

    def inputs(t):
        if not plan.resident:
            return direct[0][lax.rem(t, plan.ring)]
        return x[:, pl.ds(pl.multiple_of(other[t] * plan.wide, LANES), plan.wide)]

    def product(t, size):
        for u in range(size):
            fetch(t + plan.ahead + u)
        for u in range(size):
            wait(t + u)
        # One deep product, so that a matrix unit wider than a block is filled too.
        left = [inputs(t + u) for u in range(size)]
        right = [ring[lax.rem(t + u, plan.ring)] for u in range(size)]
        if size > 1:
            left, right = [jnp.concatenate(left, 1)], [jnp.concatenate(right, 1 if plan.transposed else 0)]
        return _dot(left[0], right[0], ((1,), (1,)) if plan.transposed else ((1,), (0,)))

    @pl.when((j == 0) & (total > 0))
    def _():
        pl.loop(0, plan.ahead)(fetch)

    @pl.when(first == last)
    def _():
        # In a loop, since it is rare and its code would be long.
        @pl.loop(0, plan.rows // ROW_TILE)
        def _(i):
            acc[pl.ds(pl.multiple_of(i * ROW_TILE, ROW_TILE), ROW_TILE), :] = jnp.zeros((ROW_TILE, plan.out), acc.dtype)

    @pl.when(first < last)
    def _():
        acc[...] = product(first, 1)

    begin = jnp.minimum(first + 1, last)
    turns = lax.div(last - begin, plan.unroll)

    def add(t, size):
        # Read after the waits inside: sums that are held across them do not fit into registers.
        found = product(t, size)
        acc[...] += found

    @pl.loop(0, turns)
    def _(turn):
        add(begin + turn * plan.unroll, plan.unroll)

    if plan.unroll > 1:

        @pl.loop(begin + turns * plan.unroll, last)
        def _(t):
            add(t, 1)

    y[...] = acc[...].astype(y.dtype)

    @pl.when((j == columns - 1) & (total > 0))
    def _():
        pl.loop(total, total + plan.ahead)(wait)


def _pad(x, rows: int, columns: int):
    rows, columns = rows - x.shape[0], columns - x.shape[1]
    return jnp.pad(x, ((0, rows), (0, columns))) if rows or columns else x


def _rows(x, stored, ptr, other, slot, plan: _Plan, name: str, interpret):
    """[M, inputs] times the listed blocks: [M, blocks * out]."""
    m, columns = x.shape[0], ptr.shape[0] - 1
    panels = pl.cdiv(m, plan.rows)
    inputs = pl.cdiv(x.shape[1], plan.wide) * plan.wide
    # Blocks past the rows' end may hold anything, since rows do not meet; a copy by hand must stay inside.
    x = _pad(x, m if plan.resident else panels * plan.rows, inputs)
    x_spec = pl.BlockSpec((plan.rows, inputs), lambda p, j, *_: (p, 0))
    scratch = [
        pltpu.VMEM((plan.ring, *stored.shape[1:]), stored.dtype),
        pltpu.VMEM((plan.rows, plan.out), jnp.float32),
        pltpu.SemaphoreType.DMA((1 if plan.resident else 2, plan.ring)),
    ]
    if not plan.resident:
        x_spec = pl.BlockSpec(memory_space=pl.ANY)
        scratch.append(pltpu.VMEM((plan.ring, plan.rows, plan.wide), x.dtype))
    flops = 2 * m * slot.shape[0] * plan.wide * plan.out
    moved = x.size * x.dtype.itemsize + panels * stored.size * stored.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_rows_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(panels, columns),
            in_specs=[x_spec, pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec((plan.rows, plan.out), lambda p, j, *_: (p, j)),
            scratch_shapes=scratch,
        ),
        out_shape=compat.like_varying((m, columns * plan.out), x.dtype, x, stored),
        name=name,
        interpret=interpret,
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VECTOR_BYTES
        ),
    )(ptr, other, slot, x, stored)


def _by_column(lists: BlockLists, sizes: Sizes):
    """Stored blocks by output block, all groups in one: where each begins, and row, column and slot of each block."""
    flat = flatten(lists, sizes)
    ptr = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(flat.out_count, dtype=jnp.int32)])
    slot = flat.out_slot
    if sizes.groups > 1:
        used = lists.out_ptr[:, -1]
        end = jnp.cumsum(used, dtype=jnp.int32)
        at = jnp.arange(slot.shape[0], dtype=jnp.int32)
        group = jnp.minimum(jnp.searchsorted(end, at, side="right"), sizes.groups - 1).astype(jnp.int32)
        slot = slot[jnp.minimum(at - (end - used)[group] + group * sizes.capacity, slot.shape[0] - 1)]
    return ptr, jnp.minimum(flat.rows[slot], sizes.rows - 1), jnp.minimum(flat.cols[slot], sizes.columns - 1), slot


def forward(x: Array, values: Array, lists: BlockLists, sizes: Sizes, *, interpret: Any = False) -> Array:
    """y [M, N] of x [M, K].

    Args:
        x, values, lists, sizes: as `supports` accepts them.
        interpret: what `pallas_call` takes: True or `pltpu.InterpretParams(...)` run on any machine.
    """
    ptr, row, _, slot = _by_column(lists, sizes)
    plan = _plan(x.shape[0], sizes, x.dtype.itemsize, transposed=False)
    stored = values.reshape(-1, sizes.bk, sizes.bn)
    y = _rows(x, stored, ptr, row, slot, plan, "block_sparse_matmul_forward", interpret)
    return y[:, : sizes.outputs]


def dx(dy: Array, values: Array, lists: BlockLists, sizes: Sizes, *, interpret: Any = False) -> Array:
    """dx [M, K] of dy [M, N]: the same kernel on the transposed blocks, listed by input block."""
    flat = flatten(lists, sizes)
    ptr = jnp.concatenate([flat.in_start, flat.in_start[-1:] + flat.in_count[-1:]]).astype(jnp.int32)
    column = jnp.minimum(flat.cols[flat.in_slot], sizes.columns - 1)
    plan = _plan(dy.shape[0], sizes, dy.dtype.itemsize, transposed=True)
    stored = values.reshape(-1, sizes.bk, sizes.bn)
    got = _rows(dy, stored, ptr, column, flat.in_slot, plan, "block_sparse_matmul_dx", interpret)
    return got[:, : sizes.inputs]


@dataclasses.dataclass(frozen=True)
class _GradientPlan:
    """How gradients of stored blocks are cut up.

    Attributes:
        rows: of a panel of x and dy.
        held: blocks that are accumulated at a time.
        unroll: blocks that one step multiplies.
        bk, bn: sizes of a block.
    """

    rows: int
    held: int
    unroll: int
    bk: int
    bn: int


def _gradient_plan(m: int, sizes: Sizes, itemsize: int) -> _GradientPlan | None:
    """None where not even the smallest panels fit."""
    width = sizes.rows * sizes.bk + sizes.columns * sizes.bn
    block = sizes.bk * sizes.bn
    for most in GRADIENT_PANELS:
        rows = _even(m, most, LANES)
        rest = USED_BYTES - 2 * rows * width * itemsize - STAGES * block * itemsize
        if rest >= min(USED_BYTES // 4, sizes.groups * sizes.capacity * block * 4):
            held = min(sizes.groups * sizes.capacity, rest // (4 * block))
            unroll = 2 if block == LANES * LANES and held > 1 else 1
            return _GradientPlan(rows, held, unroll, sizes.bk, sizes.bn)
    return None


def _gradient_kernel(plan: _GradientPlan, row, column, slot, total, xt, dy, zeros, dvalues, acc, stage, sems):
    del zeros
    begin, panel = pl.program_id(0) * plan.held, pl.program_id(1)
    here = jnp.clip(total[0] - begin, 0, plan.held)

    def product(t, rows, columns):
        down = pl.ds(pl.multiple_of(row[begin + t] * plan.bk + rows.start, LANES), rows.size)
        across = pl.ds(pl.multiple_of(column[begin + t] * plan.bn + columns.start, LANES), columns.size)
        return _dot(xt[down, :], dy[:, across], ((1,), (0,)))

    # Parts whose sums stay in registers.
    height = next(h for h in (2 * LANES, LANES) if plan.bk % h == 0)
    corners = itertools.product(range(0, plan.bk, height), range(0, plan.bn, LANES))
    parts = [(pl.ds(down, height), pl.ds(across, LANES)) for down, across in corners]

    def step(t, size):
        for part in parts:
            # All products before the first sum: they do not wait for each other.
            for u, found in enumerate([product(t + u, *part) for u in range(size)]):
                acc[(t + u, *part)] += found

    @pl.when(panel == 0)
    def _():
        @pl.loop(0, here)
        def _(t):
            acc[t] = jnp.zeros((plan.bk, plan.bn), jnp.float32)

    turns = lax.div(here, plan.unroll)

    @pl.loop(0, turns)
    def _(turn):
        step(turn * plan.unroll, plan.unroll)

    if plan.unroll > 1:

        @pl.loop(turns * plan.unroll, here)
        def _(t):
            step(t, 1)

    def copy(t):
        place = lax.rem(t, STAGES)
        return pltpu.make_async_copy(stage.at[place], dvalues.at[slot[begin + t]], sems.at[place])

    @pl.when(panel == pl.num_programs(1) - 1)
    def _():
        @pl.loop(0, here)
        def _(t):
            @pl.when(t >= STAGES)
            def _():
                copy(t - STAGES).wait()

            stage[lax.rem(t, STAGES)] = acc[t].astype(stage.dtype)
            copy(t).start()

        @pl.loop(jnp.maximum(here - STAGES, 0), here)
        def _(t):
            copy(t).wait()


def dvalues(x: Array, dy: Array, lists: BlockLists, sizes: Sizes, *, interpret: Any = False) -> Array:
    """Gradient [G, C, bk, bn] of the stored blocks; empty slots get 0."""
    ptr, row, column, slot = _by_column(lists, sizes)
    plan, m, slots = _gradient_plan(x.shape[0], sizes, x.dtype.itemsize), x.shape[0], slot.shape[0]
    panels = pl.cdiv(m, plan.rows)
    # Rows past the end are summed over, so they must be 0.
    xt = _pad(x, panels * plan.rows, sizes.rows * sizes.bk).T
    dy = _pad(dy, panels * plan.rows, sizes.columns * sizes.bn)
    shape = (slots, sizes.bk, sizes.bn)

    def at(c, p, row, column, slot, total):
        # Shares without blocks stay on the last panel, so that nothing is fetched for them.
        return jnp.where(c * plan.held < total[0], p, panels - 1)

    found = pl.pallas_call(
        functools.partial(_gradient_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(slots, plan.held), panels),
            in_specs=[
                pl.BlockSpec((xt.shape[0], plan.rows), lambda *step: (0, at(*step))),
                pl.BlockSpec((plan.rows, dy.shape[1]), lambda *step: (at(*step), 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((plan.held, sizes.bk, sizes.bn), jnp.float32),
                pltpu.VMEM((STAGES, sizes.bk, sizes.bn), x.dtype),
                pltpu.SemaphoreType.DMA((STAGES,)),
            ],
        ),
        input_output_aliases={6: 0},
        out_shape=compat.like_varying(shape, x.dtype, x, dy),
        name="block_sparse_matmul_dvalues",
        interpret=interpret,
        cost_estimate=pl.CostEstimate(
            flops=2 * m * slots * sizes.bk * sizes.bn,
            transcendentals=0,
            bytes_accessed=(pl.cdiv(slots, plan.held) * (xt.size + dy.size) + slots * sizes.bk * sizes.bn)
            * x.dtype.itemsize,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VECTOR_BYTES
        ),
    )(row, column, slot, ptr[-1:], *compat.vary_alike((xt, dy, jnp.zeros(shape, x.dtype))))
    return found.reshape(sizes.groups, sizes.capacity, sizes.bk, sizes.bn)


def backward(
    x: Array, values: Array, lists: BlockLists, sizes: Sizes, dy: Array, *, interpret: Any = False
) -> tuple[Array, Array]:
    """dx [M, K] and dvalues [G, C, bk, bn]; nothing is added atomically, so results do not vary from run to run."""
    options = {"interpret": interpret}
    return dx(dy, values, lists, sizes, **options), dvalues(x, dy, lists, sizes, **options)


def supports(x: Array, values: Array, lists: BlockLists, sizes: Sizes) -> str | None:
    """None, or why this path refuses the call."""
    del lists
    if x.dtype not in (jnp.float32, jnp.bfloat16) or values.dtype != x.dtype:
        return f"dtypes {x.dtype} and {values.dtype}; the TPU kernels take float32 or bfloat16, both alike"
    if sizes.bk % LANES or sizes.bn % LANES:
        return f"blocks of {sizes.bk} x {sizes.bn}; on TPU both sides are multiples of {LANES}"
    # Rows, columns and slots of the gradient's lists; a few words more hold where output blocks begin.
    slots, lines = sizes.groups * sizes.capacity, max(sizes.rows, sizes.columns)
    needed = 4 * max(3 * slots + 1, 2 * slots + lines + 1)
    if needed > SCALAR_BYTES:
        return (
            f"lists of {slots} blocks take {needed // 1024} KiB of scalar memory, which holds {SCALAR_BYTES // 1024}: "
            "use larger blocks, or shard the outputs"
        )
    if 12 * sizes.bk * sizes.bn * x.dtype.itemsize > USED_BYTES // 2:
        return f"blocks of {sizes.bk} x {sizes.bn} do not fit vector memory; on TPU use blocks of 128 to 512"
    if _gradient_plan(x.shape[0], sizes, x.dtype.itemsize) is None:
        return (
            f"panels of 128 rows with {sizes.inputs} inputs and {sizes.outputs} outputs do not fit vector memory, "
            "which the gradient of values needs: shard the matrix"
        )
    return None
