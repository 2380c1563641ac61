"""Flat step lists: padded block lists re-packed so that a kernel visits active blocks and nothing else.

A padded list `[rows, W]` costs W steps a row. A TPU kernel walks ONE axis of steps instead: each step names its output
row and up to `unroll` blocks of the other side, rows follow each other, and the number of steps is a scalar that the
grid takes as its (dynamic) bound. Every row has at least one step, so that every output block is written. Entries past
the end repeat the last step's blocks: nothing new is fetched for them.

One step is `unroll + 1` consecutive int32:

    word 0       row << ROW_SHIFT | member << MEMBER_SHIFT | PLAIN | ACTIVE | LAST | FIRST
    word 1 + u   block << BLOCK_SHIFT | RULED | VALID

`member` is the query head within its group where several heads feed one output row (gradients of keys and values).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FIRST, LAST, ACTIVE, PLAIN = 1, 2, 4, 8
MEMBER_SHIFT, MEMBER_BITS, ROW_SHIFT = 4, 8, 12
VALID, RULED, BLOCK_SHIFT = 1, 2, 2
MAX_ROWS = 1 << (31 - ROW_SHIFT)
MAX_MEMBERS = 1 << MEMBER_BITS


class FlatLists(NamedTuple):
    """Packed steps of `batches x heads` lists.

    Attributes:
        steps: int32 `[batches * heads * capacity * (unroll + 1)]`, see the module's text for the words.
        count: int32 scalar (or int where the lists are concrete): steps of the longest list, the grid's bound.
        first_step: int32 `[batches, heads, rows * group]`, the step at which each row starts.
        source: int32 `[batches, heads, capacity, unroll]`, index into `idx` of each listed block.
        valid: bool, same shape, whether that slot holds a block.
        capacity: steps stored for each list.
        batches, heads, unroll: the sizes above.
    """

    steps: jax.Array
    count: jax.Array | int
    first_step: jax.Array
    source: jax.Array
    valid: jax.Array
    capacity: int
    batches: int
    heads: int
    unroll: int


def join_group(idx, ptr, n_part, n_tot, group: int, heads: int):
    """Lists whose rows are those of all query heads of a key head: row r of member g becomes r * group + g.

    Args:
        idx: `[Bm, heads * group, N]`, lists of every query head.
        ptr: `[Bm, Hm, R]`, where each row's list starts in `idx`.
        n_part, n_tot: `[Bm, Hm, R]`.
        group: query heads per key head.
        heads: key heads.

    Returns:
        idx `[Bm, heads, group * N]` and ptr, n_part, n_tot `[Bm, heads, R * group]`.
    """
    batch, _, rows = ptr.shape
    each = idx.shape[-1]

    def side_by_side(a):
        return jnp.moveaxis(a.reshape(batch, heads, group, rows), 2, 3).reshape(batch, heads, rows * group)

    member = jnp.arange(rows * group, dtype=jnp.int32) % group
    return (
        idx.reshape(batch, heads, group * each),
        side_by_side(ptr) + member * each,
        *map(side_by_side, (n_part, n_tot)),
    )


def is_concrete(*arrays) -> bool:
    """Whether all arrays have values now, so that lists can be sized exactly."""
    return not any(isinstance(a, jax.core.Tracer) for a in arrays)


def flatten(idx, ptr, n_part, n_tot, *, most: int, unroll=1, group=1) -> FlatLists:
    """Packs lists into steps.

    Args:
        idx: int32 `[Bm, Hm, N]`, the blocks of each row, those to be ruled first.
        ptr: int32 `[Bm, Hm, R]`, where each row's blocks start in `idx`. With `group > 1`, as `join_group` gives it.
        n_part: int32 `[Bm, Hm, R]`, the first so many blocks of a row are evaluated with the element rule.
        n_tot: int32 `[Bm, Hm, R]`, blocks of a row.
        most: bound of the steps' capacity, used where the counts are traced.
        unroll: blocks a step.
        group: neighbouring rows that add into one output row.

    Returns:
        The packed lists; their capacity is exact where the counts are concrete.
    """
    batches, heads, rows = ptr.shape
    if rows // group > MAX_ROWS or group > MAX_MEMBERS:
        raise ValueError(
            f"{rows // group} rows in groups of {group} do not fit the packed lists, which hold {MAX_ROWS} rows and "
            f"groups of {MAX_MEMBERS}: use larger blocks"
        )
    capacity = most
    if is_concrete(n_tot):
        needed = np.maximum(1, -(-np.asarray(n_tot) // unroll)).sum(-1)
        capacity = int(needed.max())
        if is_concrete(idx, ptr, n_part):
            with jax.ensure_compile_time_eval():
                packed = _pack(idx, ptr, n_part, n_tot, capacity, unroll, group)
            return FlatLists(packed[0], capacity, *packed[2:], capacity, batches, heads, unroll)
    packed = _pack(idx, ptr, n_part, n_tot, capacity, unroll, group)
    return FlatLists(*packed, capacity, batches, heads, unroll)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _pack(idx, ptr, n_part, n_tot, capacity, unroll, group):
    rows = ptr.shape[-1]
    needed = jnp.maximum(1, -(-n_tot // unroll))
    end = jnp.cumsum(needed, axis=-1)
    start = end - needed
    step = jnp.arange(capacity, dtype=jnp.int32)
    row = jax.vmap(jax.vmap(lambda e: jnp.searchsorted(e, step, side="right")))(end)
    live = row < rows
    row = jnp.minimum(row, rows - 1).astype(jnp.int32)

    def of_row(a):
        return jnp.take_along_axis(a, row, axis=-1)

    first, total, ruled, begin = of_row(start), of_row(n_tot), of_row(n_part), of_row(ptr)
    # Steps past the end stay on the last block of the last row.
    local = jnp.where(live, step - first, of_row(needed) - 1)
    slot = local[..., None] * unroll + jnp.arange(unroll, dtype=jnp.int32)
    valid = (slot < total[..., None]) & live[..., None]
    rule = valid & (slot < ruled[..., None])
    held = jnp.clip(slot, 0, jnp.maximum(total, 1)[..., None] - 1)
    source = jnp.minimum(begin[..., None] + held, idx.shape[-1] - 1)
    block = _take(idx, source)
    plain = valid & ~rule
    member = row % group
    flags = (
        jnp.where(live & (local == 0) & (member == 0), FIRST, 0)
        | jnp.where(live & (local == of_row(needed) - 1) & (member == group - 1), LAST, 0)
        | jnp.where(valid.any(-1), ACTIVE, 0)
        | jnp.where(plain.all(-1), PLAIN, 0)
    )
    head = (row // group) << ROW_SHIFT | member << MEMBER_SHIFT | flags
    words = block << BLOCK_SHIFT | jnp.where(rule, RULED, 0) | jnp.where(valid, VALID, 0)
    steps = jnp.concatenate([head[..., None], words], axis=-1).reshape(-1)
    return steps, end[..., -1].max(), start, source, valid


def gather_values(values, flat: FlatLists):
    """Per-block values `[Bm, Hm, N]` (as `idx`) in step order, `[Bm * Hm * capacity * unroll]`, 0 in unused slots."""
    return jnp.where(flat.valid, _take(values, flat.source), 0).reshape(-1)


def _take(values, at):
    """values `[Bm, Hm, N]` at `[Bm, Hm, ...]`."""
    picked = jnp.take_along_axis(values, at.reshape(*at.shape[:2], -1), axis=-1)
    return picked.reshape(at.shape)


def scatter_values(values, flat: FlatLists, n_tot, width: int):
    """Back from step order `[..., capacity, unroll]` to slots `[..., R, W]`, 0 in unused slots.

    Args:
        values: per listed block, leading axes `[B, H]` that the lists' leading axes divide.
        flat: the lists.
        n_tot: int32 `[Bm, Hm, R]`.
        width: W.
    """
    batch, heads = values.shape[:2]
    slot = jnp.arange(width, dtype=jnp.int32)
    at = (flat.first_step[..., None] + slot // flat.unroll) * flat.unroll + slot % flat.unroll
    used = slot < n_tot[..., None]
    at, used = (expand_lists(a, batch, heads) for a in (jnp.where(used, at, 0), used))
    picked = jnp.take_along_axis(values.reshape(batch, heads, -1), at.reshape(batch, heads, -1), axis=-1)
    return jnp.where(used, picked.reshape(used.shape), 0)


def expand_lists(values, batch: int, heads: int):
    """`[Bm, Hm, ...]` to `[batch, heads, ...]`, each list serving `heads // Hm` neighbouring heads."""
    lists = values.shape[1]
    values = jnp.repeat(values, heads // lists, axis=1) if lists < heads else values
    return jnp.broadcast_to(values, (batch, heads, *values.shape[2:]))
