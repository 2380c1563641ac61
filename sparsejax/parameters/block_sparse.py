"""A weight of which only kept blocks are stored, as one parameter."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul import BlockLists, block_sparse_matmul, explain
from sparsejax.masks.block import Block
from sparsejax.masks.keys import as_float
from sparsejax.masks.roles import Roles
from sparsejax.parameters.stored_weight import StoredWeight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockSparse(StoredWeight):
    """A weight whose absent blocks take no memory: neither they nor their gradients and moments exist.

    It looks like an array of `shape`, and `x @ weight` works, at a cost that follows the density. Make one with
    `to_sparse`, make an array of it with `to_dense`. It is a pytree: `values` are trained, the other leaves are
    bookkeeping; `sparsejax.value_and_grad` and `sparsejax.apply_updates` take care of both. Leading axes of `values`
    beyond the four stack layers, for `jax.lax.scan` and `jax.vmap`.

    The number of slots does not change with the blocks, so that nothing is compiled anew when they move; between steps
    `repack` takes away the room that is no longer needed. A slot is empty where the weight keeps fewer blocks than
    there is room for; slots are balanced over `groups` of output columns, so that a mesh axis that divides the groups
    can shard the leading axis of everything that is large.

    Args:
        values: floating [..., groups, slots, block rows, block columns]; zero in empty slots and past the edge.
        lists: where each slot's block lies, in both orders; see `pallas_kernels.block_sparse_matmul`.
        probe: zeros [..., rows of blocks, columns of blocks]. Its gradient is the pooled magnitude of the gradient of
            every block, absent ones included: what RigL grows by.
        probe_when: int32 [...]; 0 leaves the probe's gradient zero, which costs nothing.
        structure: the `Block` that says how blocks lie and are scored.
        layer_shape: the shape of one layer.
        layer_roles: the roles of its axes.

    Example:
        >>> from sparsejax.parameters import to_sparse
        >>> mask = jnp.kron(jnp.eye(2), jnp.ones((4, 4))).astype(bool)
        >>> params = to_sparse({"kernel": jnp.ones((8, 8))}, {"kernel": mask}, Block((4, 4)))
        >>> weight = params["kernel"]
        >>> weight
        BlockSparse(float32[8,8], 2 of 4 blocks of 4x4, mean)
        >>> (jnp.ones((1, 8)) @ weight).tolist()
        [[4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]]
    """

    trailing = 4
    moves = True
    execution = "accelerated"

    values: Any
    lists: BlockLists
    probe: Any
    probe_when: Any
    structure: Block = dataclasses.field(metadata={"static": True})
    layer_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    layer_roles: Roles = dataclasses.field(metadata={"static": True})

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of blocks of one layer."""
        return self.structure.grid(self.matrix_shape)

    @property
    def capacity(self) -> int:
        """Number of blocks for which one layer has room."""
        return math.prod(self.values.shape[-4:-2])

    @property
    def nnz(self) -> int:
        """Number of elements in stored blocks, over all layers."""
        return int(self.count(self.mask()))

    @property
    def kernel(self) -> str:
        """What multiplies this weight here, as `platform: implementation`."""
        x, layer = self.one_layer()
        choice = explain(x, layer.values, layer.lists, shape=self.matrix_shape)
        return f"{choice.platform}: {choice.name}"

    @property
    def active(self) -> jax.Array:
        """Which slots hold a block: bool [..., groups, slots]."""
        return self.lists.rows < self.grid[0]

    @property
    def intact(self) -> jax.Array:
        """Whether the lists agree on the number of blocks; not after they were taken for weights. Bool scalar."""
        blocks = jnp.sum(self.active, axis=-1)
        return jnp.all((self.lists.out_ptr[..., -1] == blocks) & (self.lists.in_ptr[..., -1] == blocks))

    def mask(self) -> jax.Array:
        """Which blocks are kept: bool [..., rows of blocks, columns of blocks]."""
        return _mask(self)

    def to_grid(self, slots: jax.Array, absent) -> jax.Array:
        """Puts one entry for each slot, [..., groups, slots], where its block lies in the grid; `absent` elsewhere."""
        rows, columns = self.grid
        empty = jnp.full((rows, columns // self.structure.groups), absent, slots.dtype)
        place = jax.vmap(lambda slot, row, column: empty.at[row, column].set(slot, mode="drop"))
        return self.over_layers(lambda *each: self.structure.from_groups(place(*each)))(
            slots, self.lists.rows, self.lists.cols
        )

    def pool(self, scores: jax.Array) -> jax.Array:
        """Scores of slots, at least in float32, from scores shaped like `values`, as the structure pools them."""
        scores = as_float(scores)
        if self.structure.pooling == "l2":
            return jnp.sqrt(jnp.sum(jnp.square(scores), axis=(-2, -1)))
        if self.structure.pooling == "max":
            inside = self.inside()
            scores = scores if inside is None else jnp.where(inside, scores, -jnp.inf)
            return jnp.max(scores, axis=(-2, -1))
        rows, columns = self._extent()
        return jnp.sum(scores, axis=(-2, -1)) / jnp.maximum(rows * columns, 1)

    def count(self, grid: jax.Array) -> jax.Array:
        """Elements in the blocks that a mask of the grid keeps: int32 scalar."""
        rows, columns = (
            jnp.minimum(block, size - block * jnp.arange(number, dtype=jnp.int32))
            for size, block, number in zip(self.matrix_shape, self.structure.shape, self.grid, strict=True)
        )
        return jnp.sum(jnp.where(grid, rows[:, None] * columns, 0), dtype=jnp.int32)

    def inside(self) -> jax.Array | None:
        """Which elements of `values` lie within the matrix: bool, broadcastable; None where no block is cut."""
        if all(size % block == 0 for size, block in zip(self.matrix_shape, self.structure.shape, strict=True)):
            return None
        rows, columns = self._extent()
        bk, bn = self.structure.shape
        return (jnp.arange(bk)[:, None] < rows[..., None, None]) & (jnp.arange(bn) < columns[..., None, None])

    def live(self, slots: jax.Array) -> jax.Array:
        """Elements that may differ from zero when `slots` hold blocks: bool, the shape of `values`."""
        live = jnp.broadcast_to(slots[..., None, None], self.values.shape)
        inside = self.inside()
        return live if inside is None else live & inside

    def matmul(self, x: jax.Array, *, implementation: str | None = None) -> jax.Array:
        """`x @ W` with W laid out as a matrix, rows inputs and columns outputs.

        Args:
            x: [..., rows].
            implementation: see `pallas_kernels.block_sparse_matmul`.

        Returns:
            [..., columns].
        """
        self.require_one_layer()
        return block_sparse_matmul(
            x,
            self.values,
            self.lists,
            shape=self.matrix_shape,
            implementation=implementation,
            probe=self.probe,
            probe_when=self.probe_when != 0,
            probe_pooling=self.structure.pooling,
        )

    def astype(self, dtype) -> "BlockSparse":
        """The weight with values of another dtype, which must be floating."""
        self.require_floating(dtype)
        probe = self.probe.astype(jnp.promote_types(dtype, jnp.float32))
        return dataclasses.replace(self, values=self.values.astype(dtype), probe=probe)

    def to_dense(self) -> jax.Array:
        """The array of `shape`, zero where no block is stored."""
        return _to_dense(self)

    def _layer_to_dense(self, values, rows, columns):
        (bk, bn), (grid_rows, grid_columns) = self.structure.shape, self.grid
        group = grid_columns // self.structure.groups
        blocks = jnp.zeros((grid_rows, group, bk, bn), self.dtype)
        placed = jax.vmap(lambda v, r, c: blocks.at[r, c].set(v, mode="drop"))(values, rows, columns)
        matrix = placed.transpose(1, 3, 0, 2, 4).reshape(grid_rows * bk, grid_columns * bn)
        matrix = matrix[: self.matrix_shape[0], : self.matrix_shape[1]]
        return self.layer_roles.from_matrix(matrix, self.layer_shape)

    def _extent(self):
        """Rows and columns that each slot's block has within the matrix: int32 [..., groups, slots]."""
        (bk, bn), (rows, columns) = self.structure.shape, self.matrix_shape
        groups = self.structure.groups
        first = jnp.arange(groups, dtype=jnp.int32)[:, None] * (self.grid[1] // groups)
        return (
            jnp.clip(rows - self.lists.rows * bk, 0, bk),
            jnp.clip(columns - (self.lists.cols + first) * bn, 0, bn),
        )

    def __repr__(self):
        try:
            name = self.array_name
            rows, columns = self.structure.shape
            blocks = math.prod(self.batch) * math.prod(self.grid)
            kept = self._kept()
        except (AttributeError, TypeError):  # flattened with something else in the place of arrays
            return f"BlockSparse({self.values!r}, {self.structure})"
        groups = f", {self.structure.groups} groups" if self.structure.groups > 1 else ""
        return f"BlockSparse({name}, {kept} of {blocks} blocks of {rows}x{columns}, {self.structure.pooling}{groups})"

    def _kept(self) -> str:
        if isinstance(self.lists.rows, jax.core.Tracer) or not isinstance(self.lists.rows, jax.Array):
            return f"room for {math.prod(self.batch) * self.capacity}"
        return str(int(jnp.sum(self.active)))


@jax.jit
def _mask(weight: BlockSparse) -> jax.Array:
    return weight.to_grid(weight.active, False)


@jax.jit
def _to_dense(weight: BlockSparse) -> jax.Array:
    return weight.over_layers(weight._layer_to_dense)(weight.values, weight.lists.rows, weight.lists.cols)
