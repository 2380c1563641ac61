"""The oracle: write the values into a dense matrix, multiply, and let JAX differentiate."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.nm_matmul.positions import to_dense
from pallas_kernels.nm_matmul.shapes import Sizes

Array = Any


def supports(x: Array, values: Array, positions: Array, sizes: Sizes) -> str | None:
    """None: the reference takes every call."""
    del x, values, positions, sizes


def forward(x: Array, values: Array, positions: Array, sizes: Sizes) -> Array:
    """y [M, N] of x [M, K], in the dtype of x; accumulates in float32 at least. Differentiable."""
    w = to_dense(values, positions, n=sizes.n, m=sizes.m, share=sizes.share)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x, w, precision="highest", preferred_element_type=wide).astype(x.dtype)
