"""Convolution over tiles: the call, what it checks, and which paths there are."""

import jax
import jax.numpy as jnp

from pallas_kernels import choice as choices
from pallas_kernels.tile_conv.geometry import Geometry

KERNEL = "tile_conv"


def tile_conv(
    x: jax.Array,
    weights: jax.Array,
    neighbours: jax.Array,
    used: jax.Array,
    geometry: Geometry,
    *,
    bias: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Convolves the tiles that there are; places outside them count as zeros.

    Args:
        x: float (capacity, *tile, in), the tiles.
        weights: float (*window, in / groups, out).
        neighbours: int32 (capacity, 3^dims), for each tile the row of the next one in every direction, directions in
            the order of `directions`, itself among them; `capacity` for none. If b is next to a, a is next to b on the
            other side.
        used: bool (capacity,), False for empty rows, which stay zero.
        geometry: sizes.
        bias: float (out,), or None.
        implementation: None for the best; "reference", "xla", "tpu" or "gpu" works or raises.

    Returns:
        (capacity, *tile_out, out) in the dtype of `x`, summed at least in float32.

    Raises:
        ValueError: shapes do not fit, a window reaches too far, or the named implementation does not take the call.

    Example:
        >>> geometry = Geometry((2,), (3,), (1,), (1,), (1,))
        >>> x, neighbours = jnp.array([[[1.0], [2.0]], [[3.0], [4.0]]]), jnp.array([[2, 0, 1], [0, 1, 2]])
        >>> tile_conv(x, jnp.ones((3, 1, 1)), neighbours, jnp.ones(2, bool), geometry)[..., 0].tolist()
        [[3.0, 6.0], [9.0, 7.0]]
    """
    geometry.check()
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}; it must be floating")
    capacity, dims = len(x), geometry.dims
    inputs = x.shape[-1]
    if x.shape != (capacity, *geometry.tile, inputs) or neighbours.shape != (capacity, 3**dims):
        raise ValueError(
            f"x has shape {x.shape} and neighbours {neighbours.shape}; needed are (capacity, "
            f"{', '.join(map(str, geometry.tile))}, in) and (capacity, {3**dims})"
        )
    if weights.ndim != dims + 2 or weights.shape[:-1] != (*geometry.window, inputs // geometry.groups):
        raise ValueError(
            f"weights have shape {weights.shape}; with {inputs} inputs in {geometry.groups} groups and the window "
            f"{geometry.window} they must be {(*geometry.window, inputs // geometry.groups, 'out')}"
        )
    # An empty row has no neighbours and is not there itself.
    neighbours = jnp.where(used[:, None], neighbours, capacity)
    platform = choices.platform_of(x, weights)
    wanted = implementation or ("xla" if platform == "cpu" else None)
    name = choices.settled(choices.choose(KERNEL, wanted, platform, x, weights, neighbours, geometry))
    out = choices.path(KERNEL, name).convolve(x, weights, neighbours, geometry)
    if bias is not None:
        out = out + bias.astype(out.dtype)
    return jnp.where(used.reshape(-1, *[1] * (dims + 1)), out, 0).astype(x.dtype)
