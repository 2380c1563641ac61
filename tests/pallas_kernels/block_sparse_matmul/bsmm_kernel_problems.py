"""Drawn block-sparse products for the kernels of accelerators, and what dense computation gives for them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_matmul import reference
from pallas_kernels.block_sparse_matmul.lists import block_lists, sizes_of


@dataclasses.dataclass(frozen=True)
class Problem:
    """A product to draw. `full` slots are all in use; otherwise some are empty, and so is the first block column."""

    rows: int = 200
    inputs: int = 384
    outputs: int = 512
    bk: int = 128
    bn: int = 128
    groups: int = 1
    capacity: int = 5
    full: bool = False
    empty: bool = False
    dtype: str = "float32"

    def draw(self):
        """x, values, lists, sizes and dy. Empty slots hold numbers too, which must not be used."""
        rng = np.random.default_rng(7)
        kb, nb = -(-self.inputs // self.bk), -(-self.outputs // self.bn) // self.groups
        rows, cols = (np.full((self.groups, self.capacity), n) for n in (kb, nb))
        for g in range(self.groups):
            places = rng.permutation(kb * nb)
            if not self.full:
                places = [p for p in places if p % nb][: self.capacity - 1]
            if self.empty:
                places = []
            for slot, place in zip(rng.permutation(self.capacity), places, strict=False):
                rows[g, slot], cols[g, slot] = divmod(int(place), nb)
        lists = jax.tree.map(jnp.asarray, block_lists(rows, cols, grid=(kb, nb * self.groups)))

        def normal(*shape):
            return jnp.asarray(rng.standard_normal(shape), self.dtype)

        values = normal(self.groups, self.capacity, self.bk, self.bn)
        # Elements past the edge of the matrix are 0.
        row = jnp.minimum(lists.rows, kb - 1)[..., None] * self.bk + jnp.arange(self.bk)
        column = lists.cols + jnp.arange(self.groups)[:, None] * nb
        column = jnp.minimum(column, nb * self.groups - 1)[..., None] * self.bn + jnp.arange(self.bn)
        values = jnp.where((row < self.inputs)[..., None] & (column < self.outputs)[..., None, :], values, 0)
        x, dy = normal(self.rows, self.inputs), normal(self.rows, self.outputs)
        return x, values, lists, sizes_of(values, lists, (self.inputs, self.outputs)), dy


@functools.cache
def expected(problem):
    """y, dx and dvalues by dense computation."""
    x, values, lists, sizes, dy = problem.draw()
    x, values, dy = (a.astype(jnp.float32) for a in (x, values, dy))
    y, pull = jax.vjp(lambda x, values: reference.forward(x, values, lists, sizes), x, values)
    return y, *pull(dy)


def assert_close(got, want, tolerance):
    """Largest error of each array relative to its largest element."""
    for name, a, b in zip(("y", "dx", "dvalues"), got, want, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(1, np.abs(b).max()), name
