"""Which slot of a stored weight holds which block, at first and after blocks have moved."""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul import BlockLists, block_lists
from sparsejax.masks.block import Block
from sparsejax.masks.rules import LeafPlan
from sparsejax.parameters.block_sparse import BlockSparse
from sparsejax.parameters.stored_weight import layer_of


def blocks_of(matrix: jax.Array, structure: Block) -> jax.Array:
    """The blocks of a matrix, padded with zeros: [rows of blocks, columns of blocks, block rows, block columns]."""
    (bk, bn), (rows, columns) = structure.shape, structure.grid(matrix.shape)
    padding = ((0, rows * bk - matrix.shape[0]), (0, columns * bn - matrix.shape[1]))
    return jnp.pad(matrix, padding).reshape(rows, bk, columns, bn).transpose(0, 2, 1, 3)


@functools.partial(jax.jit, static_argnums=(2, 3))  # one program instead of one for each of many small operations
def store_layer(matrix: jax.Array, grid: jax.Array, structure: Block, capacity: int) -> tuple[jax.Array, BlockLists]:
    """Stores the blocks of one layer that a mask of the grid keeps.

    Args:
        matrix: [rows, columns].
        grid: bool [rows of blocks, columns of blocks].
        structure: says how blocks lie.
        capacity: slots of a group; those beyond what the mask keeps stay empty.

    Returns:
        Values [groups, slots, block rows, block columns], and the lists.
    """
    rows, columns = _places(structure.to_groups(grid), capacity)
    blocks = blocks_of(matrix, structure)
    group = grid.shape[1] // structure.groups
    blocks = blocks.reshape(grid.shape[0], structure.groups, group, *structure.shape).swapaxes(0, 1)
    take = jax.vmap(lambda b, r, c: b.at[r, c].get(mode="fill", fill_value=0))
    return take(blocks, rows, columns), block_lists(rows, columns, grid=grid.shape)


def _places(grouped: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Row and column of each slot where a group's blocks are filled in column by column: int32 [groups, slots]."""
    _, rows, columns = grouped.shape
    by_column = grouped.swapaxes(1, 2).reshape(len(grouped), -1)
    at = jax.vmap(lambda kept: jnp.nonzero(kept, size=capacity, fill_value=rows * columns)[0])(by_column)
    return _split(at.astype(jnp.int32), rows, columns)


def _split(at, rows, columns):
    return jnp.where(at < rows * columns, at % rows, rows), at // rows


def move_layer(lists: BlockLists, grid: jax.Array, structure: Block) -> tuple[BlockLists, jax.Array]:
    """Puts the blocks that a new mask keeps into the slots of one layer.

    Blocks that stay keep their slots, so that values and moments stay where they are; blocks that grow take the slots
    that have become free, in order.

    Args:
        lists: the lists until now.
        grid: bool [rows of blocks, columns of blocks]: what is kept from now on.
        structure: says how blocks lie.

    Returns:
        The new lists; and which slots hold the block that they held before, bool [groups, slots].
    """
    grouped = structure.to_groups(grid)
    _, rows, columns = grouped.shape

    def place(wanted, row, column):
        stays = wanted.at[row, column].get(mode="fill", fill_value=False)
        held = jnp.zeros_like(wanted).at[row, column].set(stays, mode="drop")
        grown = (wanted & ~held).swapaxes(0, 1).ravel()
        at = jnp.nonzero(grown, size=row.size, fill_value=rows * columns)[0].astype(jnp.int32)
        new_row, new_column = _split(at[jnp.cumsum(~stays) - 1], rows, columns)
        return jnp.where(stays, row, new_row), jnp.where(stays, column, new_column), stays

    new_rows, new_columns, stays = jax.vmap(place)(grouped, lists.rows, lists.cols)
    return block_lists(new_rows, new_columns, grid=grid.shape), stays


def store_blocks(array: jax.Array, grid: jax.Array, leaf: LeafPlan, *, slots: int | None = None) -> BlockSparse:
    """Stores the blocks of a weight that a mask of the grid keeps.

    Args:
        array: the weight.
        grid: bool [..., rows of blocks, columns of blocks], the leading axes being those that stack layers.
        leaf: its roles and its structure, a `Block`.
        slots: slots of a group; None takes as many as the fullest group of the fullest layer needs, at least one. Must
            be given where the mask is traced; where they are then too few, the values are NaN.

    Returns:
        The stored weight.

    Raises:
        ValueError: layers are not stacked along the leading axes; a group keeps more blocks than there are slots.
    """
    structure, roles = leaf.structure, leaf.roles
    layer_shape, layer_roles = layer_of(array, leaf)
    stacked = array.ndim - len(layer_shape)
    groups = jnp.sum(structure.to_groups(grid), axis=(-2, -1), dtype=jnp.int32)
    if slots is None and isinstance(groups, jax.core.Tracer):
        raise ValueError(f"{leaf.path}: under jit the number of slots cannot depend on the mask; give a capacity")
    needed = 0 if isinstance(groups, jax.core.Tracer) else max(1, int(jnp.max(groups)))
    if slots is not None and needed > slots:
        raise ValueError(
            f"{leaf.path}: a group keeps {needed} blocks, but there are {slots} slots for it; give a larger capacity, "
            "or masks that are balanced over the groups, as those of a Block with the same groups are"
        )
    slots = needed if slots is None else slots
    store = lambda matrix, kept: store_layer(matrix, kept, structure, slots)  # noqa: E731
    for _ in range(stacked):
        store = jax.vmap(store)
    values, lists = store(roles.to_matrix(array), grid)
    if isinstance(groups, jax.core.Tracer):
        values = jnp.where(jnp.max(groups) > slots, jnp.nan, values)
    return BlockSparse(
        values=values,
        lists=lists,
        probe=jnp.zeros(grid.shape, jnp.promote_types(array.dtype, jnp.float32)),
        probe_when=jnp.zeros(array.shape[:stacked], jnp.int32),
        structure=structure,
        layer_shape=layer_shape,
        layer_roles=layer_roles,
    )


def slots_for(structure: Block, grid: tuple[int, int], capacity) -> int:
    """Slots of a group for a share of all blocks, such as 0.1, rounded up."""
    return max(1, math.ceil(capacity * math.prod(grid) / structure.groups - 1e-9))
