"""Matrix product with a block-sparse matrix: one function for every platform, and the reasons for the path it takes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels import choice as choices
from pallas_kernels import compat
from pallas_kernels.block_sparse_matmul.lists import BlockLists, sizes_of
from pallas_kernels.block_sparse_matmul.probe import POOLINGS, attach_probe
from pallas_kernels.block_sparse_matmul.shapes import Sizes
from pallas_kernels.choice import Choice
from pallas_kernels.mapping import axis_size, explicit_spec, over_mesh, split_columns
from pallas_kernels.stored_product import floating_dtype, multiply

Array = Any
KERNEL = "block_sparse_matmul"


def _prepare(x: Array, values: Array, lists: BlockLists, shape: tuple[int, int]) -> tuple[Sizes, Any]:
    """Checks the arguments; the sizes and the dtype of the result."""
    sizes = sizes_of(values, lists, shape)
    if not jnp.ndim(x) or jnp.shape(x)[-1] != sizes.inputs:
        raise ValueError(
            f"x has shape {jnp.shape(x)}; its last axis must have the {sizes.inputs} inputs of shape={shape}"
        )
    return sizes, floating_dtype(x, values)


def block_sparse_matmul(
    x: Array,
    values: Array,
    lists: BlockLists,
    *,
    shape: tuple[int, int],
    implementation: str | None = None,
    probe: Array | None = None,
    probe_when: Array | None = None,
    probe_pooling: str = "l2",
) -> Array:
    """y = x W for a matrix of which only some blocks are stored; time and memory follow their number.

    Gradients flow to x and to the values of stored blocks; those of empty slots and of elements past the edge of W are
    0. Sums are accumulated in float32 at least. `lists` are arguments: moving blocks never recompiles.

    Args:
        x: [..., K]. Leading axes are cheap; prefer them to `jax.vmap`, whose gradient of `values` exists once for each
            mapped element.
        values: [G, C, bk, bn], the stored blocks, see `BlockLists`.
        lists: where the blocks lie, from `block_lists`.
        shape: (K, N), static; N / bn block columns, rounded up, are a multiple of G.
        implementation: None takes the fastest that supports the call (`explain` tells which and why); "reference",
            "xla", "native" (CPU), "tpu" or "gpu" works or raises.
        probe: zeros [Kb, Nb], or None. Its cotangent is the size of each block of the dense gradient x^T dy, stored or
            not, computed one block row at a time and never as a whole: what growing criteria such as RigL's need. Rows
            on several devices are summed before they are measured; what `jax.vmap` maps over is not.
        probe_when: traced bool; sizes are computed only where it is true, else the cotangent is zero. None: always.
        probe_pooling: "l2" (Frobenius norm), "mean" or "max" of absolute values.

    Returns:
        [..., N], in the wider dtype of x and values.

    Raises:
        ValueError: if shapes do not fit, or the named implementation does not support the call.

    References:
        Evci et al. 2020, Rigging the Lottery (arXiv:1911.11134): growing by the gradients of absent weights.

    Example:
        >>> import numpy as np
        >>> from pallas_kernels.block_sparse_matmul import block_lists
        >>> lists = block_lists(np.array([[0, 1]]), np.array([[0, 1]]), grid=(2, 2))
        >>> y = block_sparse_matmul(jnp.ones((3, 16)), jnp.ones((1, 2, 8, 8)), lists, shape=(16, 16))
        >>> y.shape, y.min().item(), y.max().item()
        ((3, 16), 8.0, 8.0)
    """
    x, values = (a if isinstance(a, jax.Array) else jnp.asarray(a) for a in (x, values))
    if not isinstance(lists, BlockLists):
        raise TypeError(f"lists is a {type(lists).__name__}; make it with block_lists(rows, cols, grid=...)")
    lists = BlockLists(*(jnp.asarray(leaf) for leaf in lists))
    sizes, dtype = _prepare(x, values, lists, shape)
    if probe_pooling not in POOLINGS:
        raise ValueError(f"probe_pooling={probe_pooling!r}; allowed: {', '.join(POOLINGS)}")
    if probe is not None and jnp.shape(probe) != (sizes.rows, sizes.columns):
        raise ValueError(
            f"probe has shape {jnp.shape(probe)}; it must be {(sizes.rows, sizes.columns)}, a number a block"
        )
    if probe is None and probe_when is not None:
        raise ValueError("probe_when is given without probe; give both, or none")
    probe_when = None if probe_when is None else jnp.asarray(probe_when)
    settings = {"implementation": implementation, "probe_pooling": probe_pooling}
    if any(entry for a in (x, values) for entry in explicit_spec(a)):
        return _over_mesh(sizes, settings, x, values, lists, probe, probe_when)
    lead, platform = x.shape[:-1], choices.platform_of(x, values)
    flat = x.astype(dtype).reshape(math.prod(lead), sizes.inputs)
    values = values.astype(dtype)
    name = choices.settled(choices.choose(KERNEL, implementation, platform, flat, values, lists, sizes))
    summed = compat.varying(flat) - compat.varying(lists.rows)
    if probe is not None:
        probe = compat.vary_alike((probe, lists))[0]
    flat, values, lists = compat.vary_alike((flat, values, lists))
    y = multiply(KERNEL, name, sizes, flat, values, lists)
    if probe is not None:
        when = jnp.asarray(True) if probe_when is None else probe_when
        still = jax.lax.stop_gradient(flat)
        y = attach_probe(sizes, probe_pooling, tuple(sorted(summed)), y, still, probe, when)
    return y.reshape(*lead, sizes.outputs)


def _over_mesh(sizes, settings, x, values, lists, probe, probe_when):
    """The product on explicitly sharded arrays: rows stay where they are, groups too where all parts are alike."""
    lead = explicit_spec(x)[:-1]
    groups = split_columns(lead, explicit_spec(values)[0])
    if sizes.columns * sizes.bn != sizes.outputs:
        groups = None
    shape = (sizes.inputs, sizes.outputs // axis_size(groups, values))
    whole, row = PartitionSpec(), PartitionSpec(groups)

    def local(x, values, lists, probe, probe_when):
        return block_sparse_matmul(x, values, lists, shape=shape, probe=probe, probe_when=probe_when, **settings)

    specs = (PartitionSpec(*lead), row, row, PartitionSpec(None, groups), whole)
    return over_mesh(local, (x, values, lists, probe, probe_when), specs, PartitionSpec(*lead, groups))


def explain(
    x: Array, values: Array, lists: BlockLists, *, shape: tuple[int, int], implementation: str | None = None
) -> Choice:
    """Which path `block_sparse_matmul` takes for these arguments, and why others refuse. Computes nothing.

    Args:
        x: as in `block_sparse_matmul`; ShapeDtypeStructs will do, here and for the other arrays.
        values: likewise.
        lists: likewise.
        shape: likewise.
        implementation: likewise.

    Returns:
        A Choice, readable when printed.

    Example:
        >>> import numpy as np
        >>> from pallas_kernels.block_sparse_matmul import block_lists
        >>> lists = block_lists(np.array([[0]]), np.array([[0]]), grid=(1, 1))
        >>> x, values = jax.ShapeDtypeStruct((2, 8), jnp.float32), jax.ShapeDtypeStruct((1, 1, 8, 8), jnp.float32)
        >>> explain(x, values, lists, shape=(8, 8), implementation="xla").name
        'xla'
    """
    sizes, dtype = _prepare(x, values, lists, shape)
    flat = jax.ShapeDtypeStruct((math.prod(jnp.shape(x)[:-1]), sizes.inputs), dtype)
    stored = jax.ShapeDtypeStruct(jnp.shape(values), dtype)
    return choices.choose(KERNEL, implementation, choices.platform_of(x, values), flat, stored, lists, sizes)
