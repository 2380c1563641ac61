"""The lists that a convolution over rows follows: for every tap, which input row goes to which output row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("sources", "targets", "counts", "rows_in", "rows_out"),
    meta_fields=("capacity_in", "capacity_out"),
)
@dataclasses.dataclass(frozen=True)
class PairLists:
    """Pairs of rows for every tap; within a tap a row appears at most once on either side.

    Args:
        sources: int32 (taps, longest), input rows, ascending; behind the pairs of a tap the input capacity.
        targets: int32 (taps, longest), their output rows, ascending; behind them the output capacity.
        counts: int32 (taps,), pairs of each tap.
        rows_in: int32, input rows in use; those behind them are empty.
        rows_out: int32, output rows in use.
        capacity_in: rows of the input, static.
        capacity_out: rows of the output, static.
    """

    sources: jax.Array
    targets: jax.Array
    counts: jax.Array
    rows_in: jax.Array
    rows_out: jax.Array
    capacity_in: int
    capacity_out: int

    @property
    def T(self) -> "PairLists":
        """The lists of the transposed convolution: sources and targets swapped."""
        return PairLists(
            self.targets, self.sources, self.counts, self.rows_out, self.rows_in, self.capacity_out, self.capacity_in
        )


def from_table(table: jax.Array, capacity_in: int, rows_in: jax.Array, rows_out: jax.Array) -> PairLists:
    """Builds the lists from a table of neighbours.

    Args:
        table: int32 (capacity_out, taps): the input row that a tap reads for an output row, `capacity_in` for none.
            Along a column, the rows that are there ascend.
        capacity_in: rows of the input.
        rows_in: int32, input rows in use.
        rows_out: int32, output rows in use.

    Returns:
        The lists.

    Example:
        >>> lists = from_table(jnp.array([[2, 0], [2, 1]]), 2, jnp.int32(2), jnp.int32(2))
        >>> lists.counts.tolist(), lists.targets.tolist(), lists.sources.tolist()
        ([0, 2], [[2, 2], [0, 1]], [[2, 2], [0, 1]])
    """
    capacity_out, _ = table.shape
    longest = min(capacity_in, capacity_out)
    order = jnp.arange(capacity_out, dtype=jnp.int32)
    found = capacity_in > table.T
    place = jnp.where(found, jnp.cumsum(found, axis=1, dtype=jnp.int32) - 1, longest)

    def compact(place, column):
        targets = jnp.full(longest, capacity_out, jnp.int32).at[place].set(order, mode="drop")
        sources = jnp.full(longest, capacity_in, jnp.int32).at[place].set(column, mode="drop")
        return sources, targets

    sources, targets = jax.vmap(compact)(place, table.T.astype(jnp.int32))
    counts = jnp.sum(found, axis=1, dtype=jnp.int32)
    return PairLists(sources, targets, counts, rows_in, rows_out, capacity_in, capacity_out)
