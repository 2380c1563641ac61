"""How kernels that compilers cannot split run under `jax.vmap` and on explicitly sharded arrays."""

import math
from collections.abc import Callable
from typing import Any

import jax


def one_after_the_other(function: Callable[..., Any], batched: tuple, arguments: tuple) -> tuple[Any, Any]:
    """A rule for `jax.custom_batching.custom_vmap`: a call for each mapped element.

    Args:
        function: what is mapped.
        batched: for every leaf of `arguments`, whether it has a leading axis to map over.
        arguments: of `function`.

    Returns:
        The results, stacked, and True for each of them.
    """
    leaves, tree = jax.tree.flatten(arguments)
    moving = jax.tree.leaves(batched)

    def single(parts):
        parts = iter(parts)
        return function(*tree.unflatten([next(parts) if m else x for m, x in zip(moving, leaves, strict=True)]))

    out = jax.lax.map(single, [x for m, x in zip(moving, leaves, strict=True) if m])
    return out, jax.tree.map(lambda _: True, out)


def explicit_spec(x: Any) -> tuple:
    """Mesh axes that split each axis of an array as its type says; None where there are none, or JAX chooses them."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def whole(tree: Any) -> Any:
    """Explicitly sharded arrays of a tree whole on every device; all else as it is."""

    def gather(x):
        if not isinstance(x, jax.Array) or not any(explicit_spec(x)):
            return x
        return jax.reshard(x, jax.NamedSharding(jax.typeof(x).sharding.mesh, jax.P()))

    return jax.tree.map(gather, tree)


def axis_names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def axis_size(entry: Any, x: Any) -> int:
    """In how many parts an entry of the PartitionSpec of `x` splits an axis."""
    return math.prod(jax.typeof(x).sharding.mesh.shape[name] for name in axis_names(entry))


def split_columns(lead: tuple, columns: Any) -> Any:
    """`columns`, the entry that splits output columns, or None where rows are split by one of its mesh axes."""
    used = {name for entry in lead for name in axis_names(entry)}
    return None if used & set(axis_names(columns)) else columns


def over_mesh(function: Callable[..., Any], arguments: tuple, specs: tuple, out: Any) -> Any:
    """Calls `function` on the parts of explicitly sharded arrays, resharded first where they lie otherwise.

    Args:
        function: of the local parts.
        arguments: pytrees of arrays.
        specs: a PartitionSpec for each argument, or a tree of them for its leaves.
        out: of the result, likewise.
    """
    mesh = jax.sharding.get_abstract_mesh()
    mesh = jax.typeof(jax.tree.leaves(arguments)[0]).sharding.mesh if mesh.empty else mesh

    def place(spec, argument):
        return jax.tree.map(lambda x: jax.reshard(x, jax.sharding.NamedSharding(mesh, spec)), argument)

    placed = jax.tree.map(place, specs, arguments)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out)(*placed)
