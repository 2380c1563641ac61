"""Fewer slots once fewer blocks are kept: memory that follows a density that falls during training."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.block_sparse_matmul import block_lists
from sparsejax.masks.layout import match_sharding, unshard
from sparsejax.masks.paths import is_stored, map_with_names, named_leaves
from sparsejax.parameters.block_sparse import BlockSparse
from sparsejax.parameters.slots import slots_for


def repack(params, state=None, *, capacity: float | Mapping[str, float] | None = None):
    """Gives every `BlockSparse` the room that its blocks need now, and the optimizer's state with it.

    The number of slots is static, so that moving blocks compiles nothing anew; and so gradual pruning from a dense
    start would keep the memory, and the time of the optimizer, of the dense weight. Call this between steps, for
    example whenever the density has halved: blocks, values and moments stay as they are bit for bit, empty
    slots go, and the next step is compiled for the new sizes. For a model of `sparsejax.nn` call `Optimizer.repack`.

    Take what the algorithm will still need: RigL, SET and static patterns keep the number of blocks, gradual pruning
    lowers it; a schedule that lets blocks come back needs a `capacity`, which may be larger than the present one too.

    A checkpoint of repacked parameters is restored into a template of the same sizes:
    `jax.eval_shape(functools.partial(repack, capacity=share), params, state)`.

    Args:
        params: the parameter tree.
        state: what goes with it: an optimizer's state, or any tree of those, with arrays under the parameters' names.
        capacity: the share of all blocks for which there is room, above 0 and up to 1; or a mapping from names of
            leaves to shares, others stay as they are. None takes room for the blocks that each leaf has now.

    Returns:
        The parameters and the state.

    Raises:
        ValueError: nothing is stored in blocks; a share is out of range or names no such leaf; a leaf has more blocks
            than that (under jit its values are then NaN); an array of the state cannot be divided into slots; or
            `capacity` is None under jit, where the number of blocks is not known.

    Example:
        >>> import optax, sparsejax
        >>> structure = sparsejax.Block((4, 4))
        >>> params = sparsejax.to_sparse({"kernel": jnp.ones((16, 16))}, None, structure)
        >>> optimizer = sparsejax.sparsify(optax.adam(0.1), sparsejax.gradual(0.75, begin=1, end=1))
        >>> state = optimizer.init(params)
        >>> for _ in range(2):
        ...     updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        ...     params = sparsejax.apply_updates(params, updates)
        >>> params["kernel"].capacity, params["kernel"].nnz
        (16, 64)
        >>> params, state = repack(params, state)
        >>> params["kernel"].capacity, state.inner_state[0].mu["kernel"].shape
        (4, (1, 4, 4, 4))
    """
    leaves = {path: leaf for path, leaf in named_leaves(params, is_stored) if isinstance(leaf, BlockSparse)}
    if not leaves:
        raise ValueError(
            f"no leaf is stored in blocks; the leaves are {[path for path, _ in named_leaves(params)][:8]}"
        )
    if isinstance(capacity, Mapping) and (unknown := sorted(capacity.keys() - leaves.keys())):
        raise ValueError(f"capacity names {unknown[:5]}; leaves that are stored in blocks are {sorted(leaves)[:8]}")
    shares = capacity if isinstance(capacity, Mapping) else dict.fromkeys(leaves, capacity)
    sources = {path: _sources(path, leaves[path], share) for path, share in shares.items()}

    def of_params(path, leaf):
        return _packed(leaf, *sources[path]) if path in sources else leaf

    def of_state(path, leaf):
        names = [name for name in sources if path == name or path.endswith(f"/{name}")]
        if not names:
            return leaf
        name = max(names, key=len)
        source, _ = sources[name]
        if isinstance(leaf, BlockSparse):  # gradients that are summed up, or averages of the parameters
            return _packed(leaf, source, False)
        return _of_array(path, leaf, leaves[name], source)

    return (
        map_with_names(of_params, params, is_leaf=is_stored),
        map_with_names(of_state, state, is_leaf=is_stored),
    )


def _sources(path: str, leaf: BlockSparse, capacity):
    """From which slot each new slot is filled, [..., groups, new slots]; and whether there are too few, traced."""
    active = leaf.active
    held = jnp.max(jnp.sum(active, axis=-1, dtype=jnp.int32))
    traced = isinstance(held, jax.core.Tracer)
    if capacity is None and traced:
        raise ValueError(f"{path}: under jit the number of slots cannot depend on the blocks; give a capacity")
    if capacity is not None and not 0 < capacity <= 1:
        raise ValueError(f"{path}: capacity is {capacity}; it is a share of all blocks, above 0 and up to 1")
    slots = max(1, int(held)) if capacity is None else slots_for(leaf.structure, leaf.grid, capacity)
    if not traced and held > slots:
        raise ValueError(f"{path}: a group holds {held} blocks, and capacity {capacity} has {slots} slots for it")
    order = jnp.argsort(~unshard(active, -2), axis=-1, stable=True)[..., :slots].astype(jnp.int32)
    missing = [(0, 0)] * (order.ndim - 1) + [(0, slots - order.shape[-1])]
    return jnp.pad(order, missing, constant_values=active.shape[-1]), held > slots


def _packed(leaf: BlockSparse, source, overfull) -> BlockSparse:
    rows, columns = leaf.grid
    kept = [_take(leaf.lists.rows, source, rows), _take(leaf.lists.cols, source, columns // leaf.structure.groups)]
    lists = leaf.over_layers(functools.partial(block_lists, grid=leaf.grid))(*kept)
    lists = jax.tree.map(lambda new, old: match_sharding(new.astype(old.dtype), old), lists, leaf.lists)
    values = _take(leaf.values, source, 0)
    if isinstance(overfull, jax.core.Tracer):
        values = jnp.where(overfull, jnp.nan, values)
    return dataclasses.replace(leaf, values=values, lists=lists)


def _of_array(path: str, array, weight: BlockSparse, source):
    """An array of the state, one entry for each slot, such as a moment or a factor of one; others stay as they are."""
    slotted, shape = weight.values.shape[:-2], jnp.shape(array)
    if len(shape) > len(slotted) and shape[: len(slotted)] == slotted:
        return _take(array, source, 0)
    if len(shape) == weight.values.ndim and shape[len(slotted) - 1] == slotted[-1] > 1:
        raise ValueError(
            f"{path}: has shape {shape} in the state, and the values {weight.values.shape}: slots of all groups share "
            "its entries, so that they cannot be taken apart; initialise the optimizer anew, or use one group"
        )
    return array


def _take(array, source, fill):
    """Fills each new slot from an old one; with `fill` where there is none."""
    return match_sharding(_gather(array, source, fill), array)


@functools.partial(jax.jit, static_argnums=2)
def _gather(array, source, fill):
    stacked = source.ndim - 1
    sharding = jax.typeof(array).sharding
    if any(sharding.spec[:stacked]):  # explicitly sharded axes that are mapped over must lie alike
        spec = PartitionSpec(*sharding.spec[:stacked], None)
        source = jax.sharding.reshard(source, NamedSharding(sharding.mesh, spec))
    take = lambda array, source: array.at[source].get(mode="fill", fill_value=fill)  # noqa: E731
    for _ in range(stacked):
        take = jax.vmap(take)
    return take(array, source)
