"""Random block-sparse products and what they must equal: masked dense matrices in float64."""

import dataclasses
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from pallas_kernels.block_sparse_matmul import block_lists, block_sparse_matmul

COMPILER = any(map(shutil.which, ("g++", "clang++", "c++")))


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a product and how full the matrix is."""

    lead: tuple[int, ...]
    inputs: int
    outputs: int
    bk: int
    bn: int
    groups: int
    fill: float
    spare: int
    seed: int

    def build(self):
        """x, values, lists and dy; slots in random order, some empty, some columns and rows without any block."""
        r = np.random.default_rng(self.seed)
        kb, nb = math.ceil(self.inputs / self.bk), math.ceil(self.outputs / self.bn)
        nbg = nb // self.groups
        count = round(self.fill * kb * nbg)
        capacity = max(1, count + self.spare)
        rows, cols = np.full((2, self.groups, capacity), 10**6)
        values = np.zeros((self.groups, capacity, self.bk, self.bn))
        height = np.minimum(self.bk, self.inputs - self.bk * np.arange(kb))
        width = np.minimum(self.bn, self.outputs - self.bn * np.arange(nb))
        for g in range(self.groups):
            slots = r.permutation(capacity)[:count]
            places = r.choice(kb * nbg, count, replace=False)
            rows[g, slots], cols[g, slots] = places // nbg, places % nbg
            for slot, place in zip(slots, places, strict=True):
                shape = height[place // nbg], width[g * nbg + place % nbg]
                values[g, slot, : shape[0], : shape[1]] = r.standard_normal(shape)
        lists = block_lists(rows, cols, grid=(kb, nb))
        x = r.standard_normal((*self.lead, self.inputs))
        dy = r.standard_normal((*self.lead, self.outputs))
        return x, values, lists, dy

    @property
    def shape(self):
        return self.inputs, self.outputs


def plain(case, x, values, lists, dy):
    """y, dx, dvalues and the dense gradient by loops over slots, in float64."""
    x, values, dy = (np.asarray(a, np.float64) for a in (x, values, dy))
    kb, nb = math.ceil(case.inputs / case.bk), math.ceil(case.outputs / case.bn)
    nbg = nb // case.groups
    dense = np.zeros((kb * case.bk, nb * case.bn))
    x2 = np.pad(x.reshape(-1, case.inputs), ((0, 0), (0, kb * case.bk - case.inputs)))
    dy2 = np.pad(dy.reshape(-1, case.outputs), ((0, 0), (0, nb * case.bn - case.outputs)))
    whole = x2.T @ dy2
    dvalues = np.zeros_like(values)
    for g, s in np.ndindex(values.shape[:2]):
        if lists.rows[g, s] < kb:
            i, j = lists.rows[g, s] * case.bk, (g * nbg + lists.cols[g, s]) * case.bn
            dense[i : i + case.bk, j : j + case.bn] += values[g, s]
            dvalues[g, s] = whole[i : i + case.bk, j : j + case.bn]
    w = dense[: case.inputs, : case.outputs]
    return x @ w, dy @ w.T, dvalues, whole[: case.inputs, : case.outputs]


def computed(case, x, values, lists, dy, name, dtype):
    """y, dx and dvalues of a path, under jit."""
    x, values, dy = (jnp.asarray(a, dtype) for a in (x, values, dy))

    @jax.jit
    def run(x, values, lists, dy):
        y, pull = jax.vjp(
            lambda x, values: block_sparse_matmul(x, values, lists, shape=case.shape, implementation=name), x, values
        )
        return y, *pull(dy)

    return run(x, values, lists, dy)


def assert_equal_to_dense(case, name, dtype, tolerance):
    """Relative to the largest element, which for sums of many terms is what rounding is proportional to."""
    x, values, lists, dy = case.build()
    x, values, dy = (np.asarray(jnp.asarray(a, dtype).astype(jnp.float64)) for a in (x, values, dy))
    got = computed(case, x, values, lists, dy, name, dtype)
    for what, a, b in zip(("y", "dx", "dvalues"), got, plain(case, x, values, lists, dy), strict=False):
        assert a.dtype == dtype
        assert a.shape == b.shape, what
        error = np.abs(np.asarray(a, np.float64) - b).max(initial=0)
        assert error <= tolerance * max(1, np.abs(b).max(initial=0)), (what, error)


@st.composite
def cases(draw, blocks=(1, 3, 8, 16, 20)):
    """Small products of all kinds."""
    bk, bn = draw(st.sampled_from(blocks)), draw(st.sampled_from(blocks))
    groups = draw(st.integers(1, 3))
    columns = groups * draw(st.integers(1, 4))
    return Case(
        lead=draw(st.sampled_from([(), (1,), (13,), (2, 3), (37,)])),
        inputs=draw(st.integers(1, 4 * bk)),
        outputs=columns * bn - draw(st.integers(0, bn - 1)),
        bk=bk,
        bn=bn,
        groups=groups,
        fill=draw(st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0])),
        spare=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 100)),
    )
