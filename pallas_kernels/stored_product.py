"""Products with a matrix that is stored sparse: gradients and mapping, whatever the form of storage.

A path of such a kernel is a module with `supports(x, values, places, sizes)`, which returns None or the reason for
refusing, `forward(x, values, places, sizes)`, which returns y, and `backward(x, values, places, sizes, dy)`, which
returns (dx, dvalues). There x is [M, K], dy is [M, N], both of the dtype of values, M is at least 1, something is
stored, and places say where.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.choice import path
from pallas_kernels.mapping import one_after_the_other

Array = Any


def floating_dtype(x: Array, values: Array) -> Any:
    """The dtype that a product is computed in.

    Raises:
        ValueError: if it is not real and floating.
    """
    dtype = jnp.promote_types(x.dtype, values.dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype} and values is {values.dtype}; one of them must be floating, none complex")
    return dtype


def multiply(kernel: str, name: str, sizes: Any, x: Array, values: Array, places: Any) -> Array:
    """y = x W by a path of a kernel, with gradients for x and values.

    Args:
        kernel: the kernel's package.
        name: the path.
        sizes: static sizes of W; hashable, with `inputs` and `outputs`.
        x: [M, inputs], of the dtype of values.
        values: what is stored.
        places: pytree of the integers that say where.

    Returns:
        [M, outputs].
    """
    if not x.shape[0] or not values.size:
        return x @ jnp.zeros((sizes.inputs, sizes.outputs), x.dtype)
    if name == "reference":
        return path(kernel, name).forward(x, values, places, sizes)
    return _multiply(kernel, name, sizes, x, values, places)


@functools.cache
def _forward_of(kernel: str, name: str, sizes: Any):
    """The forward pass of a path; mapping over x alone makes its rows more, since the matrix is the same for all."""

    @jax.custom_batching.custom_vmap
    def forward(x, values, places):
        return path(kernel, name).forward(x, values, places, sizes)

    @forward.def_vmap
    def rule(axis_size, batched, x, values, places):
        if any(jax.tree.leaves(batched[1:])):
            return one_after_the_other(forward, tuple(batched), (x, values, places))
        y = forward(x.reshape(-1, sizes.inputs), values, places)
        return y.reshape(*x.shape[:2], sizes.outputs), True

    return forward


@functools.cache
def _backward_of(kernel: str, name: str, sizes: Any):
    @jax.custom_batching.custom_vmap
    def backward(x, values, places, dy):
        return path(kernel, name).backward(x, values, places, sizes, dy)

    @backward.def_vmap
    def rule(axis_size, batched, *arguments):
        return one_after_the_other(backward, tuple(batched), arguments)

    return backward


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _multiply(kernel, name, sizes, x, values, places):
    return _forward_of(kernel, name, sizes)(x, values, places)


def _multiply_fwd(kernel, name, sizes, x, values, places):
    return _multiply(kernel, name, sizes, x, values, places), (x, values, places)


def _multiply_bwd(kernel, name, sizes, saved, dy):
    return *_gradients(kernel, name, sizes, *saved, dy), None


_multiply.defvjp(_multiply_fwd, _multiply_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gradients(kernel, name, sizes, x, values, places, dy):
    return _backward_of(kernel, name, sizes)(x, values, places, dy)


def _gradients_fwd(kernel, name, sizes, *arguments):
    return _gradients(kernel, name, sizes, *arguments), arguments


def _gradients_bwd(kernel, name, sizes, arguments, cotangents):
    """Second derivatives are rare enough to be those of the plain computation."""
    x, values, places, dy = arguments

    def gradients(x, values, dy):
        product = lambda x, values: path(kernel, "reference").forward(x, values, places, sizes)  # noqa: E731
        return jax.vjp(product, x, values)[1](dy)

    dx, dvalues, ddy = jax.vjp(gradients, x, values, dy)[1](cotangents)
    return dx, dvalues, None, ddy


_gradients.defvjp(_gradients_fwd, _gradients_bwd)
