"""Convolutions over tiles on abstract arrays, for compilation without data or device."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from pallas_kernels.product_programs import product_programs
from pallas_kernels.tile_conv.api import tile_conv
from pallas_kernels.tile_conv.geometry import Geometry


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a call.

    Attributes:
        capacity: tiles.
        tile: side of a tile, in every dimension.
        dims: dimensions of space.
        inputs: input features.
        outputs: output features (0: as inputs).
        window: side of the kernel.
        stride: steps.
        dilation: distance of the taps.
        dtype: "bfloat16" or "float32".
        gradient: 1 to compile forward and backward, 0 for the forward pass only.
    """

    capacity: int = 256
    tile: int = 16
    dims: int = 2
    inputs: int = 128
    outputs: int = 0
    window: int = 3
    stride: int = 1
    dilation: int = 1
    dtype: str = "bfloat16"
    gradient: int = 1

    @property
    def geometry(self) -> Geometry:
        """As with padding "SAME"."""
        low = max(0, (self.window - 1) * self.dilation + 1 - self.stride) // 2
        sides = self.tile, self.window, self.stride, self.dilation, low
        return Geometry(*((side,) * self.dims for side in sides))


SHAPES = {
    "16 x 16, 128": Shape(),
    "32 x 32, 128": Shape(tile=32),
    "32 x 32, 64": Shape(tile=32, inputs=64),
    "16 x 16, 256": Shape(inputs=256),
    "16 x 16, 512 to 256": Shape(inputs=512, outputs=256),
    "32 x 32, stride 2": Shape(tile=32, stride=2, outputs=256),
    "32 x 32, window 7": Shape(tile=32, window=7),
    "32 x 32, dilation 2, float32": Shape(tile=32, dilation=2, dtype="float32"),
    "8 x 8 x 8, 64, float32": Shape(tile=8, dims=3, inputs=64, dtype="float32"),
    "16 x 16 x 16, 64": Shape(capacity=64, tile=16, dims=3, inputs=64),
    "256, 128": Shape(tile=256, dims=1),
}
"""What is lowered and compiled in tests for every target that takes it."""


def abstract_arguments(shape: Shape, array: Callable[..., Any]) -> tuple[Any, ...]:
    """x, weights, neighbours and used as `array(shape, dtype)` gives them."""
    dtype = jnp.dtype(shape.dtype)
    return (
        array((shape.capacity, *(shape.tile,) * shape.dims, shape.inputs), dtype),
        array((*(shape.window,) * shape.dims, shape.inputs, shape.outputs or shape.inputs), dtype),
        array((shape.capacity, 3**shape.dims), jnp.int32),
        array((shape.capacity,), jnp.bool_),
    )


def programs(shape: Shape, implementation: str, array: Callable[..., Any]) -> dict[str, Any]:
    """Functions and abstract arguments to compile.

    Args:
        shape: the sizes.
        implementation: as for `tile_conv`.
        array: `(shape, dtype) -> ShapeDtypeStruct`.

    Returns:
        "forward", or "forward and backward" where gradients are asked for.
    """
    x, weights, neighbours, used = abstract_arguments(shape, array)
    geometry = shape.geometry

    def convolve(x, weights, neighbours, used):
        return tile_conv(x, weights, neighbours, used, geometry, implementation=implementation)

    results = shape.capacity, *geometry.tile_out, shape.outputs or shape.inputs
    dy = array(results, x.dtype) if shape.gradient else None
    return product_programs(convolve, (x, weights, neighbours, used), dy)
