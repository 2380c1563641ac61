"""Matrix product with an N:M matrix: one function, a path for each platform, and the reasons for the choice.

A path is a module with `supports(x, values, positions, sizes)`, which returns None or the reason for refusing,
`forward(x, values, positions, sizes)`, which returns y, and `backward(x, values, positions, sizes, dy)`, which returns
(dx, dvalues). There x is [M, K], dy is [M, N], both of the dtype of values, and M is at least 1.
"""

import functools
import importlib
import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels import choice as choices
from pallas_kernels import compat
from pallas_kernels.choice import Choice
from pallas_kernels.mapping import axis_size, explicit_spec, one_after_the_other, over_mesh, split_columns
from pallas_kernels.nm_matmul.positions import sizes_of
from pallas_kernels.nm_matmul.shapes import Sizes

Array = Any

IMPLEMENTATIONS = ("reference", "xla", "native", "tpu", "gpu")
_PREFERENCE = {"cpu": ("native", "xla"), "tpu": ("tpu", "xla"), "gpu": ("gpu", "xla")}


@functools.cache
def _module(name: str) -> ModuleType:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r}; allowed: None or one of {', '.join(IMPLEMENTATIONS)}")
    return importlib.import_module(f"pallas_kernels.nm_matmul.{name}")


def _prepare(x: Array, values: Array, positions: Array, n: int, m: int, share: int) -> tuple[Sizes, Any]:
    """Checks the arguments; the sizes and the dtype of the result."""
    sizes = sizes_of(values, positions, n, m, share)
    if not jnp.ndim(x) or jnp.shape(x)[-1] != sizes.inputs:
        raise ValueError(
            f"x has shape {jnp.shape(x)}; values {jnp.shape(values)} with n={n}, m={m} need {sizes.inputs} inputs"
        )
    dtype = jnp.promote_types(x.dtype, values.dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype} and values is {values.dtype}; one of them must be floating, none complex")
    return sizes, dtype


def _choose(implementation: str | None, platform: str, *call: Any) -> Choice:
    names = (implementation,) if implementation else _PREFERENCE.get(platform, ("xla",))
    return choices.choose("nm_matmul", names, platform, lambda name: _module(name).supports(*call))


@functools.cache
def _forward_of(name: str, sizes: Sizes):
    """The forward pass of a path; mapping over x alone makes its rows more, since the matrix is the same for all."""

    @jax.custom_batching.custom_vmap
    def forward(x, values, positions):
        return _module(name).forward(x, values, positions, sizes)

    @forward.def_vmap
    def rule(axis_size, batched, x, values, positions):
        if any(batched[1:]):
            return one_after_the_other(forward, tuple(batched), (x, values, positions))
        y = forward(x.reshape(-1, sizes.inputs), values, positions)
        return y.reshape(*x.shape[:2], sizes.outputs), True

    return forward


@functools.cache
def _backward_of(name: str, sizes: Sizes):
    @jax.custom_batching.custom_vmap
    def backward(x, values, positions, dy):
        return _module(name).backward(x, values, positions, sizes, dy)

    @backward.def_vmap
    def rule(axis_size, batched, *arguments):
        return one_after_the_other(backward, tuple(batched), arguments)

    return backward


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _multiply(name, sizes, x, values, positions):
    return _forward_of(name, sizes)(x, values, positions)


def _multiply_fwd(name, sizes, x, values, positions):
    return _forward_of(name, sizes)(x, values, positions), (x, values, positions)


def _multiply_bwd(name, sizes, saved, dy):
    x, values, positions = saved
    return *_backward_of(name, sizes)(x, values, positions, dy), None


_multiply.defvjp(_multiply_fwd, _multiply_bwd)


def nm_matmul(
    x: Array, values: Array, positions: Array, *, n: int, m: int, share: int = 1, implementation: str | None = None
) -> Array:
    """y = x W for a matrix that stores n of every m consecutive inputs of a column.

    With a pattern for each column (`share=1`) the stored form saves memory and what is read of it, not products: on
    most hardware the time is that of the dense product. Where 32 or more columns share a pattern, time follows n / m.
    Gradients flow to x and values. Sums are accumulated in float32 at least.

    Args:
        x: [..., K]; K is a multiple of m.
        values: [K / m * n, N], group after group.
        positions: integers [K / m * n, N / share], the place of each value in its group, 0 to m - 1, ascending within a
            group; uint8 is what is stored best.
        n: values of a group.
        m: inputs of a group, at most 256.
        share: how many consecutive columns have one pattern in common; divides N.
        implementation: None takes the fastest that supports the call (`explain` tells which and why); "reference",
            "xla", "native" (CPU), "tpu" or "gpu" works or raises.

    Returns:
        [..., N], in the wider dtype of x and values.

    Raises:
        ValueError: if shapes do not fit, or the named implementation does not support the call.

    References:
        Mishra et al. 2021, Accelerating Sparse Deep Neural Networks (arXiv:2104.08378).

    Example:
        >>> x, values = jnp.arange(4.0), jnp.array([[1.0], [10.0]])
        >>> nm_matmul(x, values, jnp.array([[1], [3]], jnp.uint8), n=2, m=4).tolist()
        [31.0]
    """
    x, values, positions = (a if isinstance(a, jax.Array) else jnp.asarray(a) for a in (x, values, positions))
    sizes, dtype = _prepare(x, values, positions, n, m, share)
    if any(entry for a in (x, values) for entry in explicit_spec(a)):
        return _over_mesh(sizes, implementation, x, values, positions)
    lead, platform = x.shape[:-1], choices.platform_of(x, values)
    flat = x.astype(dtype).reshape(math.prod(lead), sizes.inputs)
    values = values.astype(dtype)
    name = choices.settled(_choose(implementation, platform, flat, values, positions, sizes))
    flat, values, positions = compat.vary_alike((flat, values, positions))
    if not flat.shape[0]:
        y = flat @ jnp.zeros((sizes.inputs, sizes.outputs), dtype)
    elif name == "reference":
        y = _module(name).forward(flat, values, positions, sizes)
    else:
        y = _multiply(name, sizes, flat, values, positions)
    return y.reshape(*lead, sizes.outputs)


def _over_mesh(sizes, implementation, x, values, positions):
    """The product on explicitly sharded arrays: rows stay where they are, columns too where patterns stay whole."""
    lead = explicit_spec(x)[:-1]
    columns = split_columns(lead, explicit_spec(values)[1])
    if sizes.outputs // sizes.share % axis_size(columns, values):
        columns = None

    def local(x, values, positions):
        pattern = {"n": sizes.n, "m": sizes.m, "share": sizes.share}
        return nm_matmul(x, values, positions, **pattern, implementation=implementation)

    stored = PartitionSpec(None, columns)
    specs = (PartitionSpec(*lead), stored, stored)
    return over_mesh(local, (x, values, positions), specs, PartitionSpec(*lead, columns))


def explain(
    x: Array, values: Array, positions: Array, *, n: int, m: int, share: int = 1, implementation: str | None = None
) -> Choice:
    """Which path `nm_matmul` takes for these arguments, and why others refuse. Computes nothing.

    Args:
        x: as in `nm_matmul`; ShapeDtypeStructs will do, here and for the other arrays.
        values: likewise.
        positions: likewise.
        n: likewise.
        m: likewise.
        share: likewise.
        implementation: likewise.

    Returns:
        A Choice, readable when printed.

    Example:
        >>> x, values = jax.ShapeDtypeStruct((2, 8), jnp.float32), jax.ShapeDtypeStruct((4, 6), jnp.float32)
        >>> explain(x, values, jax.ShapeDtypeStruct((4, 6), jnp.uint8), n=2, m=4, implementation="xla").name
        'xla'
    """
    sizes, dtype = _prepare(x, values, positions, n, m, share)
    flat = jax.ShapeDtypeStruct((math.prod(jnp.shape(x)[:-1]), sizes.inputs), dtype)
    stored = jax.ShapeDtypeStruct(jnp.shape(values), dtype)
    return _choose(implementation, choices.platform_of(x, values), flat, stored, positions, sizes)
