"""N:M products on TPU: stored values are put in their places in vector memory, and the matrix unit multiplies.

x is regrouped once, so that the features at place p of their groups form a matrix of their own, x_p [M, K / m]. Then
y = sum_p x_p W_p, where W_p holds, for every group and column, the value stored for place p, or 0.

A pattern of its own for every column ("places"): W_p is made tile by tile from values and positions. This saves memory
and what moves from it, and not products. One pattern for `share` columns, a multiple of 128 ("picked"): the tile of x
that a column group reads is picked from the x_p, lane by lane, so only K n / m features are multiplied.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.nm_matmul.shapes import Sizes

Array = Any

LANES = 128
VECTOR_BYTES = 56 * 2**20
"""Limit of vector memory asked for: less than what every generation since v5e has."""
MAX_M = 32
"""Longest group: the features of each place of a group have a tile of their own in vector memory."""
ROWS = 512
DEPTH = 1024
"""Features that one step sums over, at least 128 groups."""
CHUNK = 64


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Sizes of one step.

    Attributes:
        rows: of x.
        groups: of m features.
        columns: of the matrix.
        n, m: the pattern.
        picked: whether features are picked for a column group, rather than values put in their places.
    """

    rows: int
    groups: int
    columns: int
    n: int
    m: int
    picked: bool


def _tile(rows: int, sizes: Sizes) -> _Tile:
    groups = max(1, DEPTH // (LANES * sizes.m)) * LANES
    groups = min(groups, pl.cdiv(sizes.inputs // sizes.m, LANES) * LANES)
    picked = sizes.share % LANES == 0
    if picked:
        columns = next(c for c in (512, 256, LANES) if sizes.share % c == 0)
    else:
        columns = min(256 if sizes.m <= 16 else LANES, pl.cdiv(sizes.outputs, LANES) * LANES)
    each = pl.cdiv(rows, pl.cdiv(rows, ROWS if sizes.m <= 16 else ROWS // 2))
    return _Tile(pl.cdiv(each, 16) * 16, groups, columns, sizes.n, sizes.m, picked)


def _dot(a, b, contract):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _corners(rows: int, columns: int):
    """Where pieces of `[CHUNK, 128]` begin: few enough registers for all that is done to a piece."""
    return itertools.product(range(0, rows, CHUNK), range(0, columns, LANES))


_WIDE = {"v": jnp.float32, "p": jnp.int32}
"""32-bit types of values and positions: rows at a stride are read in no other."""


def _bring_apart(tile: _Tile, values, r, name: str):
    """Copies rows to where they can be read at a stride, 128 columns each; those of one group follow each other."""
    for c in range(tile.columns // LANES if tile.n > 1 else 0):
        r[f"{name}{c}"][...] = values[:, c * LANES : (c + 1) * LANES].astype(_WIDE[name])


def _stored(tile: _Tile, values, r, name: str, row: int, column: int):
    """The n values (or positions) of CHUNK groups in 128 columns, each `[CHUNK, 128]`."""
    if tile.n == 1:
        return [values[row : row + CHUNK, column : column + LANES].astype(_WIDE[name])]
    apart = r[f"{name}{column // LANES}"]
    return [apart[pl.ds(row * tile.n + s, CHUNK, stride=tile.n), :] for s in range(tile.n)]


def _put_in_place(tile: _Tile, values, positions, r):
    """Fills `w`: W_p `[m, groups, columns]`, what is stored for place p of each group, or 0."""
    _bring_apart(tile, values, r, "v")
    _bring_apart(tile, positions, r, "p")
    for row, column in _corners(tile.groups, tile.columns):
        stored = _stored(tile, values, r, "v", row, column)
        places = _stored(tile, positions, r, "p", row, column)
        for p in range(tile.m):
            found = jnp.zeros_like(stored[0])
            for value, place in zip(stored, places, strict=True):
                found = jnp.where(place == p, value, found)
            r["w"][p, row : row + CHUNK, column : column + LANES] = found.astype(r["w"].dtype)


def _pick(tile: _Tile, x, positions, r):
    """Fills `x`: the features that the values of the column group meet, the s-th ones of all groups side by side."""
    packed = x.dtype.itemsize < 4
    for row in range(0, tile.rows, CHUNK):
        rows = slice(row, min(row + CHUNK, tile.rows))
        for column in range(0, tile.groups, LANES):
            lanes = slice(column, column + LANES)
            # Two rows of a 16-bit type share a row of a register: a mask of lanes holds for both.
            features = [x[p, rows, lanes] for p in range(tile.m)]
            features = [pltpu.bitcast(f, jnp.int32) for f in features] if packed else features
            for s in range(tile.n):
                place, found = positions[0, s : s + 1, lanes], features[0]
                for p in range(1, tile.m):
                    found = jnp.where(place == p, features[p], found)
                to = slice(s * tile.groups + column, s * tile.groups + column + LANES)
                r["x"][rows, to] = pltpu.bitcast(found, x.dtype) if packed else found


def _forward_kernel(tile: _Tile, names, x, values, positions, y, *scratch):
    r = dict(zip(names, scratch, strict=True))
    step = pl.program_id(2)
    if tile.picked:
        _pick(tile, x, positions, r)
        found = _dot(r["x"][...], values[...].reshape(-1, tile.columns), ((1,), (0,)))
    else:
        _put_in_place(tile, values, positions, r)
        found = functools.reduce(jnp.add, [_dot(x[p], r["w"][p], ((1,), (0,))) for p in range(tile.m)])

    @pl.when(step == 0)
    def _():
        r["acc"][...] = found

    @pl.when(step > 0)
    def _():
        r["acc"][...] += found

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        y[...] = r["acc"][...].astype(y.dtype)


def _dx_kernel(tile: _Tile, names, dy, values, positions, dx, *scratch):
    r = dict(zip(names, scratch, strict=True))
    acc, step = r["acc"], pl.program_id(2)

    @pl.when(step == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    if tile.picked:
        for s in range(tile.n):
            part = _dot(dy[...], values[s], ((1,), (1,)))
            for p in range(tile.m):
                acc[p] += jnp.where(positions[0, s : s + 1, :] == p, part, 0)
    else:
        _put_in_place(tile, values, positions, r)
        for p in range(tile.m):
            acc[p] += _dot(dy[...], r["w"][p], ((1,), (1,)))

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        dx[...] = acc[...].astype(dx.dtype)


def _dvalues_kernel(tile: _Tile, names, x, dy, positions, dvalues, *scratch):
    r = dict(zip(names, scratch, strict=True))
    acc, step = r["acc"], pl.program_id(2)

    @pl.when(step == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    if tile.picked:
        _pick(tile, x, positions, r)
        for s in range(tile.n):
            acc[s] += _dot(r["x"][:, s * tile.groups : (s + 1) * tile.groups], dy[...], ((0,), (0,)))
    else:
        for p in range(tile.m):
            acc[p] += _dot(x[p], dy[...], ((1,), (0,)))

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        if tile.picked:
            dvalues[...] = acc[...].astype(dvalues.dtype)
        else:
            _stored_gradient(tile, acc, positions, dvalues, r)


def _stored_gradient(tile: _Tile, acc, positions, dvalues, r):
    """Writes what of the gradients `[m, groups, columns]` belongs to stored values."""
    _bring_apart(tile, positions, r, "p")
    for row, column in _corners(tile.groups, tile.columns):
        here = slice(row, row + CHUNK), slice(column, column + LANES)
        found = []
        for place in _stored(tile, positions, r, "p", row, column):
            value = acc[(0, *here)]
            for p in range(1, tile.m):
                value = jnp.where(place == p, acc[(p, *here)], value)
            found.append(value)
        if tile.n == 1:
            dvalues[here] = found[0].astype(dvalues.dtype)
        for s, value in enumerate(found if tile.n > 1 else []):
            r[f"v{column // LANES}"][pl.ds(row * tile.n + s, CHUNK, stride=tile.n), :] = value
    for c in range(tile.columns // LANES if tile.n > 1 else 0):
        dvalues[:, c * LANES : (c + 1) * LANES] = r[f"v{c}"][...].astype(dvalues.dtype)


def _pad(x, *sizes):
    widths = [(0, -x.shape[axis] % size) for axis, size in enumerate(sizes)]
    return jnp.pad(x, widths) if any(w for _, w in widths) else x


class _Call:
    """A call's arrays as the kernels take them, and the grid's sizes."""

    def __init__(self, rows: int, values, positions, sizes: Sizes):
        self.sizes, self.tile = sizes, _tile(rows, sizes)
        tile = self.tile
        self.rows = pl.cdiv(rows, tile.rows)
        self.groups, self.columns = pl.cdiv(sizes.groups, tile.groups), pl.cdiv(sizes.outputs, tile.columns)
        if tile.picked:
            # The s-th values of all groups together, which are met by the s-th features.
            self.values = _pad(values.reshape(-1, tile.n, sizes.outputs).swapaxes(0, 1), 1, tile.groups, tile.columns)
            self.values_shape = tile.n, tile.groups, tile.columns
            each = positions.astype(jnp.int32).reshape(-1, tile.n, positions.shape[1]).transpose(2, 1, 0)
            self.positions = _pad(each, 1, tile.n, tile.groups)
            self.positions_shape = 1, tile.n, tile.groups
            self.scratch = {"x": pltpu.VMEM((tile.rows, tile.n * tile.groups), values.dtype)}
            return
        self.values_shape = self.positions_shape = tile.groups * tile.n, tile.columns
        self.values = _pad(values, *self.values_shape)
        if sizes.share > 1:
            positions = jnp.repeat(positions, sizes.share, axis=1)
        self.positions = _pad(positions.astype(jnp.int8), *self.positions_shape)
        self.scratch = {"w": pltpu.VMEM((tile.m, tile.groups, tile.columns), values.dtype)}
        # One value a group needs no bringing apart.
        for name in _WIDE if tile.n > 1 else ():
            for c in range(tile.columns // LANES):
                self.scratch[f"{name}{c}"] = pltpu.VMEM((tile.groups * tile.n, LANES), _WIDE[name])

    def values_spec(self, at):
        """`at(*grid)` gives (group tile, column tile)."""
        return pl.BlockSpec(self.values_shape, (lambda *step: (0, *at(*step))) if self.tile.picked else at)

    def positions_spec(self, at):
        tile, share = self.tile, self.sizes.share

        def index(*step):
            groups, columns = at(*step)
            return (columns * tile.columns // share, 0, groups) if tile.picked else (groups, columns)

        return pl.BlockSpec(self.positions_shape, index)

    def by_place(self, x):
        """[M, K] to [m, M, K / m], padded to the groups of whole tiles."""
        x = jnp.moveaxis(x.reshape(x.shape[0], -1, self.tile.m), 2, 0)
        return _pad(x, 1, 1, self.tile.groups)

    def run(self, kernel, name, grid, arrays, specs, out, out_spec, acc, interpret):
        tile, scratch = self.tile, {"acc": pltpu.VMEM(acc, jnp.float32), **self.scratch}
        flops = 2 * self.rows * tile.rows * self.values.size * (1 if tile.picked else tile.m // tile.n)
        return pl.pallas_call(
            functools.partial(kernel, tile, tuple(scratch)),
            grid=grid,
            in_specs=specs,
            out_specs=out_spec,
            out_shape=out,
            scratch_shapes=list(scratch.values()),
            name=name,
            interpret=interpret,
            cost_estimate=pl.CostEstimate(
                flops=flops, transcendentals=0, bytes_accessed=sum(a.size * a.dtype.itemsize for a in arrays)
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VECTOR_BYTES
            ),
        )(*arrays)


def forward(x: Array, values: Array, positions: Array, sizes: Sizes, *, interpret: Any = False) -> Array:
    """y [M, N] of x [M, K].

    Args:
        x, values, positions, sizes: as `supports` accepts them.
        interpret: what `pallas_call` takes: True or `pltpu.InterpretParams(...)` run on any machine.
    """
    call = _Call(x.shape[0], values, positions, sizes)
    tile = call.tile

    def stored(i, j, k):
        return k, j

    y = call.run(
        _forward_kernel,
        "nm_matmul_forward",
        (call.rows, call.columns, call.groups),
        (call.by_place(x), call.values, call.positions),
        [
            pl.BlockSpec((tile.m, tile.rows, tile.groups), lambda i, j, k: (0, i, k)),
            call.values_spec(stored),
            call.positions_spec(stored),
        ],
        jax.ShapeDtypeStruct((x.shape[0], call.values.shape[-1]), x.dtype),
        pl.BlockSpec((tile.rows, tile.columns), lambda i, j, k: (i, j)),
        (tile.rows, tile.columns),
        interpret,
    )
    return y[:, : sizes.outputs]


def dx(dy: Array, values: Array, positions: Array, sizes: Sizes, *, interpret: Any = False) -> Array:
    """dx [M, K] of dy [M, N]."""
    call = _Call(dy.shape[0], values, positions, sizes)
    tile, m = call.tile, dy.shape[0]

    def stored(i, k, j):
        return k, j

    found = call.run(
        _dx_kernel,
        "nm_matmul_dx",
        (call.rows, call.groups, call.columns),
        (_pad(dy, 1, tile.columns), call.values, call.positions),
        [
            pl.BlockSpec((tile.rows, tile.columns), lambda i, k, j: (i, j)),
            call.values_spec(stored),
            call.positions_spec(stored),
        ],
        jax.ShapeDtypeStruct((tile.m, m, call.groups * tile.groups), dy.dtype),
        pl.BlockSpec((tile.m, tile.rows, tile.groups), lambda i, k, j: (0, i, k)),
        (tile.m, tile.rows, tile.groups),
        interpret,
    )
    return jnp.moveaxis(found[:, :, : sizes.inputs // tile.m], 0, 2).reshape(m, sizes.inputs)


def dvalues(x: Array, dy: Array, values: Array, positions: Array, sizes: Sizes, *, interpret: Any = False) -> Array:
    """Gradient of the stored values; the dense gradient exists one tile at a time, in vector memory."""
    call = _Call(x.shape[0], values, positions, sizes)
    tile = call.tile
    # Rows past the end are summed over, so they must be 0.
    by_place = call.by_place(_pad(x, tile.rows, 1))
    rows, x_spec = by_place.shape[1], pl.BlockSpec((tile.m, tile.rows, tile.groups), lambda k, j, i: (0, i, k))
    if not tile.picked:
        span = pl.cdiv(tile.rows, LANES) * LANES
        by_place = _pad(by_place, 1, span, 1).swapaxes(1, 2)
        rows, x_spec = by_place.shape[2], pl.BlockSpec((tile.m, tile.groups, span), lambda k, j, i: (0, k, i))
    else:
        span = tile.rows

    def stored(k, j, i):
        return k, j

    found = call.run(
        _dvalues_kernel,
        "nm_matmul_dvalues",
        (call.groups, call.columns, rows // span),
        (by_place, jnp.pad(_pad(dy, 1, tile.columns), ((0, rows - dy.shape[0]), (0, 0))), call.positions),
        [
            x_spec,
            pl.BlockSpec((span, tile.columns), lambda k, j, i: (i, j)),
            call.positions_spec(stored),
        ],
        jax.ShapeDtypeStruct(call.values.shape, values.dtype),
        call.values_spec(stored),
        (tile.n if tile.picked else tile.m, tile.groups, tile.columns),
        interpret,
    )
    if tile.picked:
        found = found[:, : sizes.groups].swapaxes(0, 1).reshape(-1, found.shape[2])
    return found[: values.shape[0], : values.shape[1]]


def backward(
    x: Array, values: Array, positions: Array, sizes: Sizes, dy: Array, *, interpret: Any = False
) -> tuple[Array, Array]:
    """dx [M, K] and dvalues, as `values`."""
    dy = dy.astype(x.dtype)
    return (
        dx(dy, values, positions, sizes, interpret=interpret),
        dvalues(x, dy, values, positions, sizes, interpret=interpret),
    )


def supports(x: Array, values: Array, positions: Array, sizes: Sizes) -> str | None:
    """None, or why this path refuses the call."""
    del positions
    if x.dtype not in (jnp.float32, jnp.bfloat16) or values.dtype != x.dtype:
        return f"dtypes {x.dtype} and {values.dtype}; the TPU kernels take float32 or bfloat16, both alike"
    if sizes.m > MAX_M:
        return f"groups of m={sizes.m}; the TPU kernels take at most {MAX_M}"
    return None
