"""Convolution over rows by the C++ kernels of cpu.cc, on XLA's thread pool, in float32 or float64; also their maps."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import compat, native
from pallas_kernels.sparse_conv.lists import KernelMap

SOURCE = Path(__file__).with_name("cpu.cc")
TARGETS = (
    *(f"sparse_conv_{name}_{kind}" for name in ("forward", "dw") for kind in ("f32", "f64")),
    "sparse_conv_neighbours",
    "sparse_conv_inverse",
)


def unavailable() -> str | None:
    """None, or why nothing runs here."""
    if jax.default_backend() != "cpu":
        return f"it runs on the CPU, and the default backend is {jax.default_backend()}"
    return native.unavailable(SOURCE, TARGETS)


def supports(x: jax.Array, weights: jax.Array, kernel_map: KernelMap, groups: int) -> str | None:
    """None, or why this path refuses the call."""
    del x, weights, kernel_map, groups
    return unavailable()


def forward(x: jax.Array, weights: jax.Array, kernel_map: KernelMap, groups: int) -> jax.Array:
    """(capacity_out, out) of x (capacity_in, in), at least float32."""
    shape = (kernel_map.capacity_out, weights.shape[-1])
    return _call("forward", shape, x, weights, kernel_map, groups)


def weight_gradient(
    x: jax.Array, gradient: jax.Array, kernel_map: KernelMap, shape: tuple[int, int, int], groups: int
) -> jax.Array:
    """(taps, in / groups, out), at least float32."""
    return _call("dw", shape, x, gradient, kernel_map, groups)


def _call(name: str, shape: tuple[int, ...], left, right, kernel_map: KernelMap, groups: int) -> jax.Array:
    """One handler; 16-bit numbers are computed with as float32."""
    wide = jnp.promote_types(left.dtype, jnp.float32)
    operands = left.astype(wide), right.astype(wide), kernel_map.fwd
    target = f"sparse_conv_{name}_{'f64' if wide == jnp.float64 else 'f32'}"
    call = jax.ffi.ffi_call(target, compat.like_varying(shape, wide, *operands), vmap_method="sequential")
    return call(*operands, groups=np.int64(groups))


def neighbours(listed, rows, window, *, scale, shift, spread) -> jax.Array:
    """Where in a sorted list of sites each tap's neighbour of each row is.

    The neighbour of a site is at `coordinate * scale + shift + tap * spread`, if that is inside.

    Args:
        listed: `(batch, keys, shape, samples)` of the sites to search, see `sparsejax.convolution.Sites`.
        rows: `(batch, keys, shape, samples)` of those whose neighbours are wanted, sorted too.
        window: sides of the kernel; the other sizes are one number for each dimension, too.

    Returns:
        int32 (taps, rows), the row in the list; its length for none.
    """
    batch, keys, list_shape, samples = listed
    operands = batch, keys, *rows[:2]
    result = compat.like_varying((int(np.prod(window)), len(rows[1])), jnp.int32, *operands)
    sizes = {"list_shape": list_shape, "shape": rows[2], "window": window}
    sizes |= {"scale": scale, "shift": shift, "spread": spread}
    call = jax.ffi.ffi_call("sparse_conv_neighbours", result, vmap_method="sequential")
    return call(*operands, samples=np.int64(samples), **{name: np.array(n, np.int64) for name, n in sizes.items()})


def inverse(table, rows: int) -> jax.Array:
    """The table of the transposed map, int32 (taps, rows), of one of a map (taps, outputs); see `KernelMap`."""
    result = compat.like_varying((len(table), rows), jnp.int32, table)
    return jax.ffi.ffi_call("sparse_conv_inverse", result, vmap_method="sequential")(table)
