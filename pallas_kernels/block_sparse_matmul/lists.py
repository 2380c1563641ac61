"""Which blocks of a matrix are stored, and the orders in which products visit them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_matmul.shapes import Sizes

Array = Any


class BlockLists(NamedTuple):
    """Places of the stored blocks of W (K inputs, N outputs) and two orders of them; all leaves are int32 arrays.

    The grid has Kb x Nb blocks; its columns are split into G equal groups, and each group stores at most C blocks. The
    leaves may be traced: other blocks of the same counts never recompile. Made by `block_lists`.

    Attributes:
        rows: [G, C], the input block of each slot; Kb in an empty slot.
        cols: [G, C], the output block of each slot, counted within its group; Nb / G in an empty slot.
        out_ptr: [G, Nb / G + 1]; output block j of group g owns slots `out_slot[g, out_ptr[g, j]:out_ptr[g, j + 1]]`.
        out_slot: [G, C], slots ordered by (col, row), empty ones last.
        in_ptr: [G, Kb + 1]; input block i owns slots `in_slot[g, in_ptr[g, i]:in_ptr[g, i + 1]]` of group g.
        in_slot: [G, C], slots ordered by (row, col), empty ones last.
    """

    rows: Array
    cols: Array
    out_ptr: Array
    out_slot: Array
    in_ptr: Array
    in_slot: Array


def block_lists(rows: Array, cols: Array, *, grid: tuple[int, int]) -> BlockLists:
    """Orders the stored blocks for products with W and with its transpose: two stable sorts, no more.

    Args:
        rows: integers [G, C], the input block of each slot, 0 to Kb - 1; anything from Kb on marks an empty slot.
        cols: integers [G, C], the output block within the group, 0 to Nb / G - 1; anything from there on marks an empty
            slot. A pair may appear once in a group; if it appears twice, the blocks add up.
        grid: (Kb, Nb), static.

    Returns:
        The lists: numpy arrays where both arguments are numpy arrays or lists, else jax arrays.

    Raises:
        ValueError: if shapes differ, are not [G, C], or G does not divide Nb.

    Example:
        >>> lists = block_lists(np.array([[1, 0, 3]]), np.array([[1, 0, 2]]), grid=(3, 2))
        >>> lists.out_ptr.tolist(), lists.out_slot.tolist(), lists.in_ptr.tolist(), lists.rows.tolist()
        ([[0, 1, 2]], [[1, 0, 2]], [[0, 1, 2, 2]], [[1, 0, 3]])
    """
    xp = jnp if isinstance(rows, jax.Array) or isinstance(cols, jax.Array) else np
    rows, cols = xp.asarray(rows), xp.asarray(cols)
    if rows.ndim != 2 or rows.shape != cols.shape:
        raise ValueError(f"rows {rows.shape} and cols {cols.shape} must have the same shape [groups, capacity]")
    groups, (kb, nb) = rows.shape[0], grid
    if groups < 1 or nb % groups:
        raise ValueError(f"rows has {groups} groups; their number must divide the {nb} block columns of grid={grid}")
    nbg = nb // groups
    empty = (rows < 0) | (rows >= kb) | (cols < 0) | (cols >= nbg)
    rows = xp.where(empty, kb, rows).astype(np.int32)
    cols = xp.where(empty, nbg, cols).astype(np.int32)
    out_ptr, out_slot = _order(xp, cols, rows, nbg)
    in_ptr, in_slot = _order(xp, rows, cols, kb)
    return BlockLists(rows, cols, out_ptr, out_slot, in_ptr, in_slot)


def _order(xp, major: Array, minor: Array, count: int) -> tuple[Array, Array]:
    """Where each value of `major` up to `count` begins in the slots sorted by (major, minor), and those slots."""
    if xp is np:
        slot = np.stack([np.lexsort(pair) for pair in zip(minor, major, strict=True)])
        ordered = np.take_along_axis(major, slot, axis=1)
        start = np.stack([np.searchsorted(line, np.arange(count + 1)) for line in ordered])
        return start.astype(np.int32), slot.astype(np.int32)
    slot = jnp.broadcast_to(jnp.arange(major.shape[1], dtype=jnp.int32), major.shape)
    ordered, _, slot = jax.lax.sort((major, minor, slot), dimension=1, is_stable=True, num_keys=2)
    start = jax.vmap(lambda line: jnp.searchsorted(line, jnp.arange(count + 1)))(ordered)
    return start.astype(jnp.int32), slot


class FlatLists(NamedTuple):
    """The lists of all groups as one: slot s of group g is slot g * C + s, its output block counts from 0 to Nb - 1.

    Attributes:
        rows: [G * C].
        cols: [G * C].
        out_start: [Nb], where the slots of each output block begin in `out_slot`.
        out_count: [Nb], how many there are.
        out_slot: [G * C]; empty slots stand at the end of their group.
        in_start: [Kb], where the slots of each input block begin in `in_slot`.
        in_count: [Kb], how many there are.
        in_slot: [G * C]; behind the last slot in use, 0.
    """

    rows: Array
    cols: Array
    out_start: Array
    out_count: Array
    out_slot: Array
    in_start: Array
    in_count: Array
    in_slot: Array


def flatten(lists: BlockLists, sizes: Sizes) -> FlatLists:
    """The lists of all groups as one, without sorting again."""
    group = jnp.arange(sizes.groups, dtype=jnp.int32)[:, None]
    out_count = jnp.diff(lists.out_ptr, axis=1)
    held = jnp.diff(lists.in_ptr, axis=1)
    in_count = held.sum(0)
    in_start = jnp.cumsum(in_count) - in_count
    begin = in_start + jnp.cumsum(held, axis=0) - held
    at = jnp.arange(sizes.capacity, dtype=jnp.int32)
    row = jnp.take_along_axis(lists.rows, lists.in_slot, axis=1)
    safe = jnp.minimum(row, sizes.rows - 1)
    place = jnp.take_along_axis(begin, safe, axis=1) + at - jnp.take_along_axis(lists.in_ptr, safe, axis=1)
    place = jnp.where(row < sizes.rows, place, sizes.groups * sizes.capacity)
    in_slot = jnp.zeros((sizes.groups * sizes.capacity,), jnp.int32)
    in_slot = in_slot.at[place].set(lists.in_slot + group * sizes.capacity, mode="drop")
    return FlatLists(
        lists.rows.reshape(-1),
        (lists.cols + group * sizes.group_columns).reshape(-1),
        (lists.out_ptr[:, :-1] + group * sizes.capacity).reshape(-1),
        out_count.reshape(-1),
        (lists.out_slot + group * sizes.capacity).reshape(-1),
        in_start,
        in_count,
        in_slot,
    )


def sizes_of(values: Array, lists: BlockLists, shape: tuple[int, int]) -> Sizes:
    """Static sizes of the matrix, checked against the shapes of its leaves.

    Raises:
        ValueError: naming the leaf, its shape and what is allowed.
    """
    if jnp.ndim(values) != 4 or min(jnp.shape(values)[2:]) < 1:
        raise ValueError(f"values has shape {jnp.shape(values)}; it must be [groups, capacity, bk, bn]")
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"shape={shape}; it must be (inputs, outputs), each at least 1")
    groups, capacity, bk, bn = jnp.shape(values)
    sizes = Sizes(int(shape[0]), int(shape[1]), bk, bn, groups, capacity)
    if groups < 1 or sizes.columns % groups:
        raise ValueError(
            f"values has {groups} groups; their number must divide the {sizes.columns} block columns of "
            f"shape={shape} in blocks of {bk} x {bn}"
        )
    slots = (groups, capacity)
    wanted = BlockLists(slots, slots, (groups, sizes.group_columns + 1), slots, (groups, sizes.rows + 1), slots)
    for name, leaf, want in zip(BlockLists._fields, lists, wanted, strict=True):
        if jnp.shape(leaf) != want:
            raise ValueError(
                f"lists.{name} has shape {jnp.shape(leaf)}; values {jnp.shape(values)} and shape={shape} need {want}"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.integer):
            raise ValueError(f"lists.{name} has dtype {leaf.dtype}; it must be an integer array")
    return sizes


def to_dense(values: Array, lists: BlockLists, shape: tuple[int, int]) -> Array:
    """The matrix [K, N] with zeros where no block is stored.

    Args:
        values: [G, C, bk, bn].
        lists: where the blocks lie.
        shape: (K, N).

    Example:
        >>> lists = block_lists(np.array([[1]]), np.array([[0]]), grid=(2, 1))
        >>> to_dense(jnp.ones((1, 1, 2, 3)), lists, (3, 2)).tolist()
        [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    """
    s = sizes_of(values, lists, shape)
    grid = jnp.zeros((s.groups, s.rows, s.group_columns, s.bk, s.bn), values.dtype)
    group = jnp.arange(s.groups)[:, None]
    grid = grid.at[group, jnp.asarray(lists.rows), jnp.asarray(lists.cols)].add(values, mode="drop")
    whole = grid.transpose(1, 3, 0, 2, 4).reshape(s.rows * s.bk, s.columns * s.bn)
    return whole[: s.inputs, : s.outputs]


def from_dense(w: Array, lists: BlockLists, block: tuple[int, int]) -> Array:
    """The stored blocks [G, C, bk, bn] of a matrix [K, N]; zeros in empty slots and past the edge.

    Args:
        w: [K, N].
        lists: where the blocks lie.
        block: (bk, bn).

    Example:
        >>> lists = block_lists(np.array([[1, 2]]), np.array([[0, 0]]), grid=(2, 1))
        >>> from_dense(jnp.arange(6.0).reshape(3, 2), lists, (2, 2)).tolist()
        [[[[4.0, 5.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]]
    """
    (inputs, outputs), (bk, bn), groups = w.shape, block, lists.rows.shape[0]
    w = jnp.pad(w, ((0, -inputs % bk), (0, -outputs % bn)))
    grid = w.reshape(w.shape[0] // bk, bk, groups, -1, bn).transpose(2, 0, 3, 1, 4)
    group = jnp.arange(groups)[:, None]
    return grid.at[group, jnp.asarray(lists.rows), jnp.asarray(lists.cols)].get(mode="fill", fill_value=0)
