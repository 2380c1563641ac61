"""Block-sparse products on abstract arrays, for compilation without data or device."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul.api import block_sparse_matmul
from pallas_kernels.block_sparse_matmul.lists import BlockLists
from pallas_kernels.product_programs import product_programs


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a call.

    Attributes:
        rows: M, rows of x.
        inputs: K.
        outputs: N.
        bk: rows of a block.
        bn: columns of a block (0: bk).
        groups: groups of block columns.
        percent: stored share of the blocks, in percent.
        dtype: "bfloat16" or "float32".
        gradient: 1 to compile forward and backward, 0 for the forward pass only.
    """

    rows: int = 8192
    inputs: int = 4096
    outputs: int = 4096
    bk: int = 128
    bn: int = 0
    groups: int = 1
    percent: int = 10
    dtype: str = "bfloat16"
    gradient: int = 1

    @property
    def capacity(self) -> int:
        """Slots of a group."""
        bn = self.bn or self.bk
        blocks = math.ceil(self.inputs / self.bk) * math.ceil(self.outputs / bn)
        return max(1, blocks * self.percent // (100 * self.groups))


SHAPES = {
    "128 x 128": Shape(),
    "256 x 256": Shape(bk=256),
    "512 x 512": Shape(bk=512, percent=25),
    "128 x 256, groups, ragged": Shape(rows=1000, inputs=1100, outputs=2000, bn=256, groups=4, percent=30),
    "128 x 128, few rows": Shape(rows=64),
    "256 x 256, wide": Shape(inputs=28672, outputs=8192, bk=256, groups=8),
    "128 x 128, float32": Shape(rows=2048, inputs=2048, outputs=2048, dtype="float32"),
    "64 x 64": Shape(rows=4096, inputs=2048, outputs=2048, bk=64),
}
"""What is lowered and compiled in tests for every target that takes it."""


def abstract_arguments(shape: Shape, array: Callable[..., Any]) -> tuple[Any, Any, BlockLists]:
    """x, values and lists of `array(shape, dtype)` leaves."""
    bn, ints = shape.bn or shape.bk, jnp.int32
    kb, nb = math.ceil(shape.inputs / shape.bk), math.ceil(shape.outputs / bn)
    slots = (shape.groups, shape.capacity)
    lists = BlockLists(
        array(slots, ints),
        array(slots, ints),
        array((shape.groups, nb // shape.groups + 1), ints),
        array(slots, ints),
        array((shape.groups, kb + 1), ints),
        array(slots, ints),
    )
    dtype = jnp.dtype(shape.dtype)
    return array((shape.rows, shape.inputs), dtype), array((*slots, shape.bk, bn), dtype), lists


def programs(shape: Shape, implementation: str, array: Callable[..., Any]) -> dict[str, Any]:
    """Functions and abstract arguments to compile.

    Args:
        shape: the sizes.
        implementation: as for `block_sparse_matmul`.
        array: `(shape, dtype) -> ShapeDtypeStruct`.

    Returns:
        "forward", or "forward and backward" where gradients are asked for.
    """
    x, values, lists = abstract_arguments(shape, array)

    def multiply(x, values, lists):
        return block_sparse_matmul(x, values, lists, shape=(shape.inputs, shape.outputs), implementation=implementation)

    dy = array((shape.rows, shape.outputs), x.dtype) if shape.gradient else None
    return product_programs(multiply, (x, values, lists), dy)
