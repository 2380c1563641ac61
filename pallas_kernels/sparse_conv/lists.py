"""What a convolution over rows follows: tables of neighbours, and lists of the pairs that are in them."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("fwd", "bwd", "rows_in", "rows_out"), meta_fields=("window",)
)
@dataclasses.dataclass(frozen=True)
class KernelMap:
    """Neighbours of rows under a kernel: `fwd[k, o] == i` exactly if `bwd[k, i] == o`.

    A map is a value: make it once for each resolution, pass it to every layer there. In both tables the rows of a tap
    that are there ascend.

    Args:
        fwd: int32 (taps, capacity_out), the input row of each tap and output row; the input's capacity for none.
        bwd: int32 (taps, capacity_in), the output row of each tap and input row; the output's capacity for none.
        rows_in: int32, input rows in use; those behind them are empty.
        rows_out: int32, output rows in use.
        window: sides of the kernel whose places the taps are, row-major, static; None if it has none.
    """

    fwd: jax.Array
    bwd: jax.Array
    rows_in: jax.Array
    rows_out: jax.Array
    window: tuple[int, ...] | None = None

    @property
    def capacity_in(self) -> int:
        """Rows of the input."""
        return self.bwd.shape[1]

    @property
    def capacity_out(self) -> int:
        """Rows of the output."""
        return self.fwd.shape[1]

    @property
    def T(self) -> "KernelMap":
        """The map of the transposed convolution, from the output's rows back to the input's."""
        return KernelMap(self.bwd, self.fwd, self.rows_out, self.rows_in, self.window)


class PairLists(NamedTuple):
    """Pairs of rows for every tap; within a tap a row appears at most once on either side.

    Attributes:
        sources: int32 (taps, longest), input rows, ascending; behind the pairs of a tap the input's capacity.
        targets: int32 (taps, longest), their output rows, ascending; behind them the output's capacity.
        counts: int32 (taps,), pairs of each tap.
    """

    sources: jax.Array
    targets: jax.Array
    counts: jax.Array


def pair_lists(kernel_map: KernelMap) -> PairLists:
    """Lists what is in the table of a map.

    Example:
        >>> lists = pair_lists(KernelMap(jnp.array([[2, 2], [0, 1]]), jnp.array([[2, 2], [0, 1]]), 2, 2))
        >>> lists.counts.tolist(), lists.targets.tolist(), lists.sources.tolist()
        ([0, 2], [[2, 2], [0, 1]], [[2, 2], [0, 1]])
    """
    rows_in, rows_out = kernel_map.capacity_in, kernel_map.capacity_out
    longest = min(rows_in, rows_out)
    found = kernel_map.fwd < rows_in
    place = jnp.where(found, jnp.cumsum(found, axis=1, dtype=jnp.int32) - 1, longest)
    order = jnp.arange(rows_out, dtype=jnp.int32)

    def compact(place, row):
        targets = jnp.full(longest, rows_out, jnp.int32).at[place].set(order, mode="drop")
        return jnp.full(longest, rows_in, jnp.int32).at[place].set(row, mode="drop"), targets

    return PairLists(*jax.vmap(compact)(place, kernel_map.fwd), jnp.sum(found, axis=1, dtype=jnp.int32))
