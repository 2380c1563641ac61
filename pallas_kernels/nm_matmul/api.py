"""Matrix product with an N:M matrix: one function for every platform, and the reasons for the path it takes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels import choice as choices
from pallas_kernels import compat
from pallas_kernels.choice import Choice
from pallas_kernels.mapping import axis_size, explicit_spec, over_mesh, split_columns
from pallas_kernels.nm_matmul.positions import sizes_of
from pallas_kernels.nm_matmul.shapes import Sizes
from pallas_kernels.stored_product import floating_dtype, multiply

Array = Any
KERNEL = "nm_matmul"


def _prepare(x: Array, values: Array, positions: Array, n: int, m: int, share: int) -> tuple[Sizes, Any]:
    """Checks the arguments; the sizes and the dtype of the result."""
    sizes = sizes_of(values, positions, n, m, share)
    if not jnp.ndim(x) or jnp.shape(x)[-1] != sizes.inputs:
        raise ValueError(
            f"x has shape {jnp.shape(x)}; values {jnp.shape(values)} with n={n}, m={m} need {sizes.inputs} inputs"
        )
    return sizes, floating_dtype(x, values)


def nm_matmul(
    x: Array, values: Array, positions: Array, *, n: int, m: int, share: int = 1, implementation: str | None = None
) -> Array:
    """y = x W for a matrix that stores n of every m consecutive inputs of a column.

    With a pattern for each column (`share=1`) the stored form saves memory and what is read of it, not products: on
    most hardware the time is that of the dense product. Where 32 or more columns share a pattern, the native CPU path's
    time follows n / m; XLA's gains less (`benchmarks/block_sparse.py --parts nm`). The TPU path is not faster than the
    dense product, by static estimates; the GPU path has not been timed. Gradients flow to x and values. Sums are
    accumulated in float32 at least.

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
    name = choices.settled(choices.choose(KERNEL, implementation, platform, flat, values, positions, sizes))
    flat, values, positions = compat.vary_alike((flat, values, positions))
    y = multiply(KERNEL, name, sizes, flat, values, positions)
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
    return choices.choose(KERNEL, implementation, choices.platform_of(x, values), flat, stored, positions, sizes)
