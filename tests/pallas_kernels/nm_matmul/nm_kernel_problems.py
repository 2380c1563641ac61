"""Drawn N:M products for the kernels of accelerators, and what dense computation gives for them."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from pallas_kernels.nm_matmul.shapes import Sizes


@dataclasses.dataclass(frozen=True)
class Problem:
    """A product to draw."""

    rows: int = 20
    inputs: int = 512
    outputs: int = 200
    n: int = 2
    m: int = 4
    share: int = 1
    dtype: str = "float32"

    @property
    def sizes(self):
        return Sizes(self.inputs, self.outputs, self.n, self.m, self.share)

    def draw(self):
        """x, values, positions and dy."""
        rng = np.random.default_rng(3)
        groups = self.inputs // self.m
        order = np.argsort(rng.random((groups, self.m, self.outputs // self.share)), axis=1)
        positions = np.sort(order[:, : self.n], axis=1).reshape(groups * self.n, -1).astype(np.uint8)
        shapes = (self.rows, self.inputs), (groups * self.n, self.outputs), (self.rows, self.outputs)
        x, values, dy = (jnp.asarray(rng.standard_normal(shape), self.dtype) for shape in shapes)
        return x, values, jnp.asarray(positions), dy


@functools.cache
def expected(problem):
    """y, dx and dvalues by dense computation in float64."""
    x, values, positions, dy = (np.asarray(a, np.float64) for a in problem.draw())
    place = np.repeat(positions.astype(int), problem.share, axis=1)
    row = np.arange(values.shape[0])[:, None] // problem.n * problem.m + place
    column = np.arange(problem.outputs)[None]
    w = np.zeros((problem.inputs, problem.outputs))
    w[row, column] = values
    return x @ w, dy @ w.T, (x.T @ dy)[row, column]


def assert_close(got, want, tolerance):
    """Largest error of each array relative to its largest element."""
    for name, a, b in zip(("y", "dx", "dvalues"), got, want, strict=False):
        a = np.asarray(a, np.float64)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), name
