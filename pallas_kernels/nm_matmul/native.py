"""N:M products by the C++ kernels of cpu.cc, on XLA's thread pool, in float32 or float64."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import compat, native
from pallas_kernels.nm_matmul.positions import inputs_of
from pallas_kernels.nm_matmul.shapes import Sizes

Array = Any

SOURCE = Path(__file__).with_name("cpu.cc")
TARGETS = tuple(f"nm_{name}_{kind}" for name in ("forward", "dx", "dvalues") for kind in ("f32", "f64"))
# Columns of the narrowest pattern are whole vectors on every CPU.
_COLUMNS = 16


def supports(x: Array, values: Array, positions: Array, sizes: Sizes) -> str | None:
    """None, or why this path refuses the call."""
    del x, values, positions
    if jax.default_backend() != "cpu":
        return f"it runs on the CPU, and the default backend is {jax.default_backend()}"
    if sizes.share % _COLUMNS:
        return (
            f"it takes patterns shared by multiples of {_COLUMNS} columns, and share={sizes.share}; with fewer, the "
            "dense product of implementation='xla' is as fast"
        )
    return native.unavailable(SOURCE, TARGETS)


def _call(name: str, shape: tuple[int, ...], left: Array, right: Array, positions: Array, sizes: Sizes) -> Array:
    """One handler; 16-bit numbers are computed with as float32."""
    dtype = left.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    index = jnp.clip(inputs_of(positions, sizes), 0, sizes.inputs - 1)
    operands = (left.astype(wide), right.astype(wide), index)
    target = f"nm_{name}_{'f64' if wide == jnp.float64 else 'f32'}"
    result = compat.like_varying(shape, wide, *operands)
    return jax.ffi.ffi_call(target, result, vmap_method="sequential")(*operands).astype(dtype)


def forward(x: Array, values: Array, positions: Array, sizes: Sizes) -> Array:
    """y [M, N] of x [M, K]."""
    return _call("forward", (x.shape[0], sizes.outputs), x, values, positions, sizes)


def backward(x: Array, values: Array, positions: Array, sizes: Sizes, dy: Array) -> tuple[Array, Array]:
    """dx [M, K] and dvalues [K n / m, N]; two calls, so that the compiler drops the one that nobody reads."""
    dx = _call("dx", x.shape, dy, values, positions, sizes)
    return dx, _call("dvalues", values.shape, x, dy, positions, sizes)
