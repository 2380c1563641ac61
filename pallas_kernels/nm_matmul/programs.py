"""N:M products on abstract arrays, for compilation without data or device."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from pallas_kernels.nm_matmul.api import nm_matmul
from pallas_kernels.product_programs import product_programs


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a call.

    Attributes:
        rows: M, rows of x.
        inputs: K.
        outputs: N.
        n: values stored of every m.
        m: length of a group along the inputs.
        share: columns with one pattern in common.
        dtype: "bfloat16" or "float32".
        gradient: 1 to compile forward and backward, 0 for the forward pass only.
    """

    rows: int = 4096
    inputs: int = 4096
    outputs: int = 4096
    n: int = 2
    m: int = 4
    share: int = 1
    dtype: str = "bfloat16"
    gradient: int = 1


SHAPES = {
    "2:4": Shape(),
    "2:4, 128 columns a pattern": Shape(share=128),
    "1:8, 256 columns a pattern": Shape(n=1, m=8, share=256),
    "4:16, ragged": Shape(rows=1000, inputs=1600, outputs=1200, n=4, m=16),
    "2:4, float32": Shape(rows=1024, inputs=2048, outputs=2048, dtype="float32"),
    "2:4, one row": Shape(rows=1, gradient=0),
    "2:4, four rows": Shape(rows=4, inputs=8192, outputs=8192, gradient=0),
}
"""What is lowered and compiled in tests for every target that takes it."""


def abstract_arguments(shape: Shape, array: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """x, values and positions as `array(shape, dtype)` gives them."""
    stored, dtype = shape.inputs // shape.m * shape.n, jnp.dtype(shape.dtype)
    return (
        array((shape.rows, shape.inputs), dtype),
        array((stored, shape.outputs), dtype),
        array((stored, shape.outputs // shape.share), jnp.uint8),
    )


def programs(shape: Shape, implementation: str, array: Callable[..., Any]) -> dict[str, Any]:
    """Functions and abstract arguments to compile.

    Args:
        shape: the sizes.
        implementation: as for `nm_matmul`.
        array: `(shape, dtype) -> ShapeDtypeStruct`.

    Returns:
        "forward", or "forward and backward" where gradients are asked for.
    """
    x, values, positions = abstract_arguments(shape, array)
    pattern = {"n": shape.n, "m": shape.m, "share": shape.share}

    def multiply(x, values, positions):
        return nm_matmul(x, values, positions, **pattern, implementation=implementation)

    dy = array((shape.rows, shape.outputs), x.dtype) if shape.gradient else None
    return product_programs(multiply, (x, values, positions), dy)
