"""Convolutions over rows on abstract arrays, for compilation without data or device."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from pallas_kernels.product_programs import product_programs
from pallas_kernels.sparse_conv.api import sparse_conv
from pallas_kernels.sparse_conv.lists import KernelMap


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a call.

    Attributes:
        rows_in: capacity of the input.
        rows_out: capacity of the output (0: as the input).
        taps: of the kernel.
        inputs: input features.
        outputs: output features (0: as inputs).
        dtype: "bfloat16" or "float32".
        gradient: 1 to compile forward and backward, 0 for the forward pass only.
    """

    rows_in: int = 2**17
    rows_out: int = 0
    taps: int = 27
    inputs: int = 64
    outputs: int = 0
    dtype: str = "bfloat16"
    gradient: int = 1


SHAPES = {
    "27 taps, 64": Shape(),
    "27 taps, 128": Shape(inputs=128),
    "9 taps, 16 to 32": Shape(taps=9, inputs=16, outputs=32),
    "8 taps, stride 2, 128 to 256": Shape(taps=8, inputs=128, outputs=256, rows_out=2**15),
    "27 taps, 256, few rows": Shape(rows_in=5000, inputs=256),
}
"""What is lowered and compiled in tests."""


def programs(shape: Shape, implementation: str, array: Callable[..., Any]) -> dict[str, Any]:
    """Functions and abstract arguments to compile.

    Args:
        shape: the sizes.
        implementation: as for `sparse_conv`.
        array: `(shape, dtype) -> ShapeDtypeStruct`.

    Returns:
        "forward", or "forward and backward" where gradients are asked for.
    """
    dtype, ints = jnp.dtype(shape.dtype), jnp.int32
    rows_out, outputs = shape.rows_out or shape.rows_in, shape.outputs or shape.inputs
    x, weights = array((shape.rows_in, shape.inputs), dtype), array((shape.taps, shape.inputs, outputs), dtype)
    tables = array((shape.taps, rows_out), ints), array((shape.taps, shape.rows_in), ints)
    kernel_map = KernelMap(*tables, array((), ints), array((), ints))

    def convolve(x, weights, kernel_map):
        return sparse_conv(x, weights, kernel_map, implementation=implementation)

    dy = array((rows_out, outputs), dtype) if shape.gradient else None
    return product_programs(convolve, (x, weights, kernel_map), dy)
