"""Convolution over tiles on TPU: each tile is put together with its halo in vector memory, by copies that follow lists.

A grid step owns one or more tiles. Copies bring them and the border strips of their neighbours to one buffer, while the
tiles of the step before are multiplied: one product for every tap, of all places of the tiles at once. What lies behind
a missing neighbour is set to zero. Along the last dimension of space strips are as wide as a register tile, since
nothing narrower can be copied; taps then begin inside them.

The derivative by the input is the same kernel with taps on the other side and weights transposed, since neighbours are
mutual. That by the weights sums, for every tap, what its places and the gradients multiply to, tile after tile in
order: nothing is scattered, and all runs give the same bits. A stride is taken away first: the places between two steps
become features.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tile_conv.geometry import Geometry
from pallas_kernels.tile_conv.unstrided import Offsets, mirrored, offsets_of, unstrided

Array = Any

LANES = 128
VECTOR_BYTES = 56 * 2**20
"""Limit of vector memory asked for: less than what every generation since v5e has."""
USED_BYTES = 44 * 2**20
"""What the buffers laid out here take of it at most."""
SCALAR_BYTES = 900 * 1024
"""What lists may take of the 1 MiB of scalar memory."""
ROWS = 256
"""Places that one product covers: worth bringing weights to the matrix unit, and sums fit into registers."""
TOGETHER = 8
"""Most tiles of a step."""
SHARES = 2
"""Cores that a chip has at most (v4 and v5p), which divide the steps among each other."""


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How tiles are brought and cut up.

    Attributes:
        tile: sides.
        low: width of the strip before the tile in the buffer, in every dimension.
        high: of that behind.
        offsets: where each tap reads, from its place.
        together: tiles of a step.
        columns: output features of a step.
        steps: of all tiles.
        shares: parts of them that cores may divide among each other.
    """

    tile: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    offsets: Offsets
    together: int = 1
    columns: int = 0
    steps: int = 0
    shares: int = 1

    @property
    def turns(self) -> int:
        """Steps of a share; where they do not come out even, the last share repeats its last step."""
        return pl.cdiv(self.steps, self.shares)

    def number(self, share, turn):
        """The step of a turn."""
        return jnp.minimum(share * self.turns + turn, self.steps - 1)

    @property
    def whole(self) -> tuple[int, ...]:
        """Sides of a tile with its strips."""
        return tuple(low + size + high for low, size, high in zip(self.low, self.tile, self.high, strict=True))

    @property
    def parts(self) -> list[tuple[int, tuple[slice, ...], tuple[slice, ...]]]:
        """For every neighbour that is read, and the tile: its number, where to read it, where it goes."""
        found = []
        for number, direction in enumerate(itertools.product((-1, 0, 1), repeat=len(self.tile))):
            source, target = [], []
            for step, low, size, high in zip(direction, self.low, self.tile, self.high, strict=True):
                start, width = {-1: (0, low), 0: (low, size), 1: (low + size, high)}[step]
                target.append(slice(start, start + width))
                source.append(slice(size - low, size) if step < 0 else slice(0, width))
            if all(s.stop > s.start for s in target):
                found.append((number, tuple(source), tuple(target)))
        return found

    @property
    def pieces(self) -> list[tuple[slice, slice]]:
        """Tiles of the step, and places along the first dimension, that one product covers."""
        each = math.prod(self.tile)
        if each >= ROWS or self.together == 1:
            count = max(1, min(self.tile[0], ROWS * self.tile[0] // each)) if len(self.tile) > 1 else self.tile[0]
            return [
                (slice(g, g + 1), slice(at, min(at + count, self.tile[0])))
                for g in range(self.together)
                for at in range(0, self.tile[0], count)
            ]
        count = max(1, ROWS // each)
        return [
            (slice(g, min(g + count, self.together)), slice(0, self.tile[0])) for g in range(0, self.together, count)
        ]


def _aligned(width: int, itemsize: int) -> int:
    """Width of a strip along the last dimension."""
    return pl.cdiv(width, 32 // itemsize) * (32 // itemsize)


def _plan(shape, offsets: Offsets, outputs: int, itemsize: int, gradient: bool) -> _Plan | None:
    """None where a tile does not fit vector memory."""
    capacity, *tile, inputs = shape
    low = [max(0, -min(o)) for o in zip(*offsets, strict=True)]
    high = [max(0, max(o)) for o in zip(*offsets, strict=True)]
    low[-1], high[-1] = _aligned(low[-1], itemsize), _aligned(high[-1], itemsize)
    plan = _Plan(tuple(tile), tuple(low), tuple(high), offsets)
    lanes = pl.cdiv(inputs, LANES) * LANES
    weights = 4 if gradient else itemsize
    together = max(1, min(TOGETHER, 2 * ROWS // math.prod(tile)))
    for columns in [outputs] + [c for c in (1024, 512, 256, LANES) if outputs % c == 0 and c < outputs]:
        wide = pl.cdiv(columns, LANES) * LANES
        held = 2 * math.prod(plan.whole) * lanes * itemsize + 2 * math.prod(tile) * wide * (itemsize + 4)
        if together * held + 2 * len(offsets) * lanes * wide * weights <= USED_BYTES:
            steps = pl.cdiv(capacity, together)
            shares = 1 if gradient else min(SHARES, steps)
            return dataclasses.replace(plan, together=together, columns=columns, steps=steps, shares=shares)
    return None


def _dot(a, b):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _copies(plan: _Plan, row, x, buffer, sems, share, turn):
    """The copies that bring a turn's tiles to their half of the buffer."""
    slot, first = lax.rem(turn, 2), plan.number(share, turn) * plan.together
    parts = list(itertools.product(range(plan.together), plan.parts))
    # All are read before the first copy, past which no read of scalar memory is moved.
    rows = [row[(first + g) * 3 ** len(plan.tile) + number] for g, (number, *_) in parts]
    return [
        pltpu.make_async_copy(x.at[(at, *source)], buffer.at[(slot, g, *target)], sems.at[slot])
        for at, (g, (_, source, target)) in zip(rows, parts, strict=True)
    ]


def _take(plan: _Plan, row, lost, live, x, buffer, sems, multiply):
    """Brings tiles and calls `multiply(slot)` for the half of the buffer that holds a turn's tiles.

    A turn with tiles starts the copies of the next one, whether it is empty or not, between its products: a branch
    would cost more. An empty one does so only where the next is not.
    """
    share, turn = pl.program_id(1), pl.program_id(2)
    copies = functools.partial(_copies, plan, row, x, buffer, sems, share)

    def fetch(turn):
        for copy in copies(turn):
            copy.start()

    def wait(turn):
        # How long they are is all that counts.
        for copy in copies(lax.rem(turn, 2)):
            copy.wait()

    def full(turn):
        return live[plan.number(share, turn)] > 0

    pl.when(turn == 0)(lambda: fetch(turn))

    @pl.when(full(turn) | (turn == 0) | full(jnp.maximum(turn - 1, 0)))
    def _():
        wait(turn)

    _clear(plan, lost, live, buffer)

    @pl.when(full(turn))
    def _():
        fetch(turn + 1)
        multiply(lax.rem(turn, 2))

    last = turn == plan.turns - 1

    @pl.when(jnp.logical_not(full(turn) | last) & full(turn + 1))
    def _():
        fetch(turn + 1)

    @pl.when(full(turn) & last)
    def _():
        wait(turn + 1)


def _clear(plan: _Plan, lost, live, buffer):
    """Sets to zero what this turn's tiles lack."""
    step, slot = plan.number(pl.program_id(1), pl.program_id(2)), lax.rem(pl.program_id(2), 2)

    @pl.when(live[step] > 1)
    def _():
        @pl.loop(0, plan.together)
        def _(g):
            for number, _, target in plan.parts:

                @pl.when((lost[step * plan.together + g] >> number) & 1 == 1)
                def _(target=target):
                    first, *rest = target
                    # In a loop, since it is rare and its code would be long.
                    width = 1 if rest else first.stop - first.start

                    @pl.loop(first.start, first.stop, step=width)
                    def _(i):
                        here = pl.ds(i, 1) if rest else first
                        at = slot, pl.ds(g, 1), here, *rest
                        sides = (s.stop - s.start for s in rest)
                        buffer[at] = jnp.zeros((1, width, *sides, buffer.shape[-1]), buffer.dtype)


def _read(plan: _Plan, buffer, slot, piece, offset):
    """What a tap reads for a piece, [places, inputs]."""
    tiles, first = piece
    spans = [first, *(slice(0, size) for size in plan.tile[1:])]
    at = [
        slice(low + span.start + o, low + span.stop + o) for low, span, o in zip(plan.low, spans, offset, strict=True)
    ]
    found = buffer[(slot, tiles, *at)]
    return found.reshape(-1, found.shape[-1])


def _forward_kernel(plan: _Plan, row, lost, live, x, weights, y, buffer, sems):
    def multiply(slot):
        for piece in plan.pieces:
            tiles, first = piece
            # One deep product, so that a matrix unit wider than the features is filled too.
            left = jnp.concatenate([_read(plan, buffer, slot, piece, o) for o in plan.offsets], 1)
            found = _dot(left, weights[...])
            shape = tiles.stop - tiles.start, first.stop - first.start, *plan.tile[1:], plan.columns
            y[tiles, first] = found.reshape(shape).astype(y.dtype)

    _take(plan, row, lost, live, x, buffer, sems, multiply)

    @pl.when(live[plan.number(pl.program_id(1), pl.program_id(2))] == 0)
    def _():
        y[...] = jnp.zeros_like(y)


def _weights_kernel(plan: _Plan, row, lost, live, x, dy, dw, buffer, sems):
    @pl.when(pl.program_id(2) == 0)
    def _():
        dw[...] = jnp.zeros_like(dw)

    def multiply(slot):
        for piece in plan.pieces:
            gradient = dy[piece].reshape(-1, plan.columns).T
            for tap, offset in enumerate(plan.offsets):
                dw[tap] += _dot(gradient, _read(plan, buffer, slot, piece, offset))

    _take(plan, row, lost, live, x, buffer, sems, multiply)


def _lists(plan: _Plan, neighbours):
    """Rows to read; what each tile lacks, a bit a direction; is a step empty (0), whole (1), does it lack parts (2)."""
    capacity, directions = neighbours.shape
    beyond = plan.steps * plan.together - capacity
    padded = jnp.pad(neighbours, ((0, beyond), (0, 0)), constant_values=capacity)
    absent = (padded < 0) | (padded >= capacity)
    used = np.array([number for number, *_ in plan.parts])
    lost = jnp.sum(jnp.where(absent, 1 << np.arange(directions), 0)[:, used], axis=1, dtype=jnp.int32)
    # What is missing is brought from the tile itself, where a copy does no harm.
    own = jnp.minimum(jnp.arange(len(padded)), capacity - 1)[:, None]
    there = ~absent[:, directions // 2].reshape(plan.steps, -1)
    live = jnp.where(there.any(1), 1 + (lost.reshape(plan.steps, -1) != 0).any(1), 0)
    return jnp.where(absent, own, padded).reshape(-1).astype(jnp.int32), lost, live.astype(jnp.int32)


def _call(kernel, plan, name, x, other, neighbours, other_spec, out, out_spec, interpret):
    capacity, inputs, outputs = x.shape[0], x.shape[-1], out.shape[-2 if "weights" in name else -1]
    flops = 2 * capacity * math.prod(plan.tile) * len(plan.offsets) * inputs * outputs
    arrays = x, other, out
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(outputs // plan.columns, plan.shares, plan.turns),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY), other_spec],
            out_specs=out_spec,
            scratch_shapes=[
                pltpu.VMEM((2, plan.together, *plan.whole, inputs), x.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=out,
        name=name,
        interpret=interpret,
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=0, bytes_accessed=sum(a.size * a.dtype.itemsize for a in arrays)
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VECTOR_BYTES,
            # Lists are in bounds; checks would keep copies from being started between products.
            disable_bounds_checks=True,
        ),
    )(*_lists(plan, neighbours), x, other)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _convolve(x, weights, neighbours, offsets, interpret):
    """(capacity, *tile, in) and (taps, in, out) to (capacity, *tile, out): the tap reads at its offset."""
    return _product(x, weights, neighbours, offsets, interpret, "tile_conv_forward")


def _product(x, weights, neighbours, offsets, interpret, name):
    capacity, *tile, inputs = x.shape
    plan = _plan(x.shape, offsets, weights.shape[-1], x.dtype.itemsize, False)
    zeros = (0,) * len(tile)
    return _call(
        _forward_kernel,
        plan,
        name,
        x,
        weights.reshape(-1, weights.shape[-1]),
        neighbours,
        pl.BlockSpec((len(offsets) * inputs, plan.columns), lambda j, h, i, *_: (0, j)),
        jax.ShapeDtypeStruct((capacity, *tile, weights.shape[-1]), x.dtype),
        pl.BlockSpec((plan.together, *tile, plan.columns), lambda j, h, i, *_: (plan.number(h, i), *zeros, j)),
        interpret,
    )


def _convolve_forward(x, weights, neighbours, offsets, interpret):
    return _convolve(x, weights, neighbours, offsets, interpret), (x, weights, neighbours)


def _convolve_backward(offsets, interpret, saved, dy):
    x, weights, neighbours = saved
    dy = dy.astype(x.dtype)
    dx = _product(dy, weights.swapaxes(1, 2), neighbours, mirrored(offsets), interpret, "tile_conv_dx")
    capacity, *tile, inputs = x.shape
    plan = _plan(x.shape, offsets, dy.shape[-1], x.dtype.itemsize, True)
    # Tiles past the end meet zeros, and zeros meet no NaN.
    dy = jnp.pad(dy, ((0, -capacity % plan.together), *[(0, 0)] * (dy.ndim - 1)))
    zeros = (0,) * len(tile)
    dw = _call(
        _weights_kernel,
        plan,
        "tile_conv_dweights",
        x,
        dy,
        neighbours,
        pl.BlockSpec((plan.together, *tile, plan.columns), lambda j, h, i, *_: (plan.number(h, i), *zeros, j)),
        jax.ShapeDtypeStruct((len(offsets), dy.shape[-1], inputs), jnp.float32),
        pl.BlockSpec((len(offsets), plan.columns, inputs), lambda j, *_: (0, j, 0)),
        interpret,
    )
    return dx, dw.swapaxes(1, 2).astype(weights.dtype), None


_convolve.defvjp(_convolve_forward, _convolve_backward)


def convolve(x: Array, weights: Array, neighbours: Array, geometry: Geometry, *, interpret: Any = False) -> Array:
    """(capacity, *tile_out, out) in the dtype of x; arguments as `supports` accepts them.

    Args:
        x, weights, neighbours, geometry: as for `tile_conv`; in a row that is not in use all neighbours are missing,
            the tile itself too.
        interpret: what `pallas_call` takes: True or `pltpu.InterpretParams(...)` run on any machine.
    """
    return _convolve(*unstrided(x, weights, geometry), neighbours, offsets_of(geometry)[0], interpret)


def supports(x: Array, weights: Array, neighbours: Array, geometry: Geometry) -> str | None:
    """None, or why this path refuses the call."""
    if not x.size:
        return "there are no tiles"
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"dtype {x.dtype}; the TPU kernel takes float32 or bfloat16"
    if geometry.groups > 1:
        return f"{geometry.groups} feature groups, whose products are too small for the matrix unit"
    step = 32 // x.dtype.itemsize
    if geometry.tile_out[-1] % step:
        return (
            f"tiles of {geometry.tile} at stride {geometry.stride}; on TPU the last side over its stride is a "
            f"multiple of {step} for {x.dtype}"
        )
    if 4 * (neighbours.size + 2 * len(x)) > SCALAR_BYTES:
        return f"lists of {len(x)} tiles do not fit scalar memory; use larger tiles, or shard them"
    offsets, taps = offsets_of(geometry)
    inputs, outputs = weights.shape[-2] * taps.shape[1], weights.shape[-1]
    plans = [
        _plan((len(x), *geometry.tile_out, sides[0]), o, sides[1], x.dtype.itemsize, gradient)
        for o, sides, gradient in (
            (offsets, (inputs, outputs), False),
            (mirrored(offsets), (outputs, inputs), False),
            (offsets, (inputs, outputs), True),
        )
    ]
    if None in plans:
        return f"tiles of {geometry.tile} with {inputs} inputs and {outputs} outputs do not fit vector memory"
    return None
