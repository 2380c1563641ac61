"""Static figures of the sparse convolution kernels, compiled without the hardware.

    python -m benchmarks.aot_convolution [--targets v5e v5p v6e h200] [--write benchmarks/results]

Bundles are instruction words of the compiled code: estimates, not measurements. Targets whose compiler is not installed
are skipped; what is written joins what other environments wrote on the same day.
"""

import math

import jax.numpy as jnp

from benchmarks.aot_matmul import command, report, shapes_of
from pallas_kernels.tile_conv import tpu
from pallas_kernels.tile_conv.unstrided import mirrored, offsets_of

KERNELS = ("tile_conv", "sparse_conv")
CYCLE = 4 * 128 * 128
"""Multiplications of one cycle of the matrix units of v5e, and of a core of v5p, in bfloat16."""
PASSES = {"bfloat16": 1, "float32": 6}
"""Products in bfloat16 that one product takes."""
NOTE = (
    "Static estimates of compiled code, not measurements: no TPU or GPU was present. A TPU core issues one bundle a "
    "cycle where it does not wait for memory. 'MXU use' is the cycles that the convolution's products of one grid step "
    "need at the peak of the matrix units (those of features that only fill up 128 lanes do not count), over the "
    "larger of those cycles and the bundles: of the body with the products alone, and with all other bundles of the "
    "loop, among them rare ones, such as clearing what missing neighbours leave."
)


def products(shape, part):
    """Multiplications of a grid step, without what fills up a stride's window."""
    geometry, bytes_each = shape.geometry, jnp.dtype(shape.dtype).itemsize
    offsets, taps = offsets_of(geometry)
    sides = shape.inputs * taps.shape[1], shape.outputs or shape.inputs
    if part == "dx":
        offsets, sides = mirrored(offsets), sides[::-1]
    tiles = shape.capacity, *geometry.tile_out, sides[0]
    plan = tpu._plan(tiles, offsets, sides[1], bytes_each, part == "dweights")
    whole = plan.together * math.prod(geometry.tile_out) * shape.window**shape.dims * shape.inputs * sides[part != "dx"]
    return whole * PASSES[shape.dtype] * plan.columns // sides[1]


def render(record):
    """The record as markdown."""

    def tpu_row(where, k):
        target, kernel, name, part = where
        body, rest = sum(k["bodies"]), k["step_rest"]
        # The matrix units of v6e are of another size.
        fed = None if target == "v6e" else products(shapes_of(kernel)[name], part) / CYCLE
        return body, rest, *(f"{fed / (max(fed, body) + more):.0%}" if fed else "" for more in (0, rest))

    measures = "bundles, body", "other bundles", "MXU use, body", "with all others"
    return report(record, "Convolution kernels", "aot_convolution", measures, tpu_row)


if __name__ == "__main__":
    command(__doc__.splitlines()[0], "aot-convolution", NOTE, KERNELS, render)
