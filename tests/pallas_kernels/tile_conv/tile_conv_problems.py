"""Drawn convolutions over tiles for the kernels of accelerators, and what the reference gives for them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.tile_conv import Geometry, directions, reference


@dataclasses.dataclass(frozen=True)
class Problem:
    """Tiles drawn from a grid; `capacity` rows, of which `active` are in use."""

    grid: tuple[int, ...] = (3, 4)
    tile: tuple[int, ...] = (4, 8)
    window: int = 3
    stride: int = 1
    dilation: int = 1
    inputs: int = 5
    outputs: int = 7
    capacity: int = 9
    active: int = 8
    dtype: str = "float32"

    @property
    def geometry(self):
        low = max(0, (self.window - 1) * self.dilation + 1 - self.stride) // 2
        alike = ((side,) * len(self.tile) for side in (self.window, self.stride, self.dilation, low))
        return Geometry(self.tile, *alike)

    def draw(self):
        """x, weights, neighbours, which rows are in use, and the gradient of the result."""
        rng = np.random.default_rng(5)
        places = sorted(rng.permutation(int(np.prod(self.grid)))[: self.active])
        row = {tuple(int(i) for i in np.unravel_index(place, self.grid)): r for r, place in enumerate(places)}
        neighbours = np.full((self.capacity, 3 ** len(self.grid)), self.capacity, np.int32)
        for cell, r in row.items():
            for number, direction in enumerate(directions(len(self.grid))):
                other = tuple(c + d for c, d in zip(cell, direction, strict=True))
                neighbours[r, number] = row.get(other, self.capacity)
        used = np.arange(self.capacity) < self.active

        def normal(*shape):
            return jnp.asarray(rng.standard_normal(shape), self.dtype)

        # What is in an empty row must not matter.
        x = normal(self.capacity, *self.tile, self.inputs).at[self.active :].set(jnp.nan)
        weights = normal(*self.geometry.window, self.inputs, self.outputs)
        dy = normal(self.capacity, *self.geometry.tile_out, self.outputs).at[self.active :].set(0)
        return x, weights, jnp.asarray(neighbours), jnp.asarray(used), dy


@functools.cache
def expected(problem):
    """y, dx and dweights by the reference in float32, zeros in empty rows."""
    x, weights, neighbours, _, dy = problem.draw()
    x, weights, dy = (a.astype(jnp.float32) for a in (x, weights, dy))
    x = x.at[problem.active :].set(0)
    y, pull = jax.vjp(lambda x, w: reference.convolve(x, w, neighbours, problem.geometry), x, weights)
    dx, dw = pull(dy)
    return y.at[problem.active :].set(0), dx.at[problem.active :].set(0), dw


def computed(problem, convolve):
    """The same from a path."""
    x, weights, neighbours, _, dy = problem.draw()

    @jax.jit
    def run(x, weights, neighbours, dy):
        y, pull = jax.vjp(lambda x, w: convolve(x, w, neighbours, problem.geometry), x, weights)
        return y, *pull(dy.astype(y.dtype))

    y, dx, dw = run(x, weights, neighbours, dy)
    return y.at[problem.active :].set(0), dx.at[problem.active :].set(0), dw


def assert_close(got, want, tolerance):
    """Largest error of each array relative to its largest element."""
    for name, a, b in zip(("y", "dx", "dweights"), got, want, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), name
