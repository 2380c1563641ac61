"""From dense parameters and masks to stored ones, and back."""

import functools
from numbers import Real

import jax
import jax.numpy as jnp

from sparsejax.masks.block import Block
from sparsejax.masks.nm import NM
from sparsejax.masks.paths import is_stored, map_with_names, named_leaves
from sparsejax.masks.rules import LeafPlan, resolve
from sparsejax.masks.unstructured import Unstructured
from sparsejax.parameters.nm_sparse import store_nm
from sparsejax.parameters.slots import slots_for, store_blocks


def to_sparse(params, masks, structure_or_rules, *, capacity: float | None = None):
    """Replaces dense parameters by stored ones: `BlockSparse` and `NMSparse`.

    The way back is exact: `to_dense` gives the parameters with zeros off the masks.

    Args:
        params: the parameter tree.
        masks: bool masks as `masks_of` gives them, which keep or prune blocks whole, or of the grid of blocks;
            `optax.MaskedNode()` or None, also for a whole subtree, leaves it as it is. None in the place of the tree:
            what is not zero is kept.
        structure_or_rules: a `Block` or an `NM` for all leaves that are sparse by default; or rules, as in `sparsify`;
            leaves to which they give neither structure stay as they are.
        capacity: the share of all blocks for which a `BlockSparse` has room, from 0 to 1; None takes room for those
            that the masks keep.

    Returns:
        A tree like `params`, with a stored weight in the place of each such leaf.

    Raises:
        ValueError: no leaf would be stored; or a mask does not fit its leaf, its structure or the capacity. Under jit,
            where the values of masks cannot be looked at, a weight whose mask does not fit is NaN throughout.

    Example:
        >>> import sparsejax
        >>> params = {"kernel": jnp.ones((8, 8)), "bias": jnp.zeros(8)}
        >>> masks = {"kernel": sparsejax.Block((4, 4)).mask(jnp.ones((8, 8)), 0.5), "bias": None}
        >>> params = to_sparse(params, masks, sparsejax.Block((4, 4)))
        >>> params["kernel"]
        BlockSparse(float32[8,8], 2 of 4 blocks of 4x4, mean)
        >>> to_dense(params)["kernel"][0].tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    if capacity is not None and not (isinstance(capacity, Real) and 0 < capacity <= 1):
        raise ValueError(f"capacity is {capacity}; it is a share of all blocks, above 0 and up to 1")
    one = hasattr(structure_or_rules, "fixed_density")
    rules, structure = (None, structure_or_rules) if one else (structure_or_rules, Unstructured())
    if (one and not isinstance(structure, Block | NM)) or isinstance(structure_or_rules, str):
        raise ValueError(f"{structure_or_rules!r} cannot be stored; only Block(...) and NM(...) can")
    plan = {leaf.path: leaf for leaf in resolve(params, rules, structure)}
    chosen = {path: leaf for path, leaf in plan.items() if isinstance(leaf.structure, Block | NM)}
    given = None if masks is None else dict(named_leaves(masks))
    if given is not None:
        for path in given:
            if path not in plan:
                raise ValueError(f"masks has a leaf {path!r} that the parameters lack; they have {sorted(plan)[:8]}")
        chosen = {path: leaf for path, leaf in chosen.items() if path in given}
    if not chosen:
        having = "" if given is None else f", masks are given for {list(given)[:8]}"
        raise ValueError(
            "no leaf would be stored: give Block(...) or NM(...) for leaves that have masks, by structure_or_rules; "
            f"the leaves are {list(plan)[:8]}{having}"
        )

    def store(path, leaf):
        if path not in chosen or is_stored(leaf):
            return leaf
        mask = jnp.not_equal(leaf, 0) if given is None else jnp.asarray(given[path])
        return _store(leaf, mask, chosen[path], capacity, given is not None)

    return map_with_names(store, params, is_leaf=is_stored)


def _store(array, mask, leaf: LeafPlan, capacity, given: bool):
    structure = leaf.structure
    grid = structure.grid(leaf.roles.matrix_shape(leaf.shape)) if isinstance(structure, Block) else None
    if mask.dtype != jnp.bool_ or mask.shape not in (leaf.shape, grid):
        blocks = f" or, for its blocks, bool{grid}" if grid else ""
        raise ValueError(f"{leaf.path}: the mask is {mask.dtype}{mask.shape}; it must be bool{leaf.shape}{blocks}")
    if grid is None:
        return store_nm(array, mask, leaf)
    slots = None if capacity is None else slots_for(structure, grid[-2:], capacity)
    if mask.shape == leaf.shape:
        grid, cut = _grid(mask, structure, leaf.roles)
        if given and isinstance(cut, jax.core.Tracer):
            array = jnp.where(cut, jnp.nan, array)
        elif given and cut:
            raise ValueError(
                f"{leaf.path}: the mask keeps parts of blocks of {structure.shape[0]}x{structure.shape[1]}, which are "
                f"stored whole; make masks with {structure}, or give a mask of the grid, bool{grid.shape}"
            )
        mask = grid
    return store_blocks(array, mask, leaf, slots=slots)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _grid(mask, structure, roles):
    """The blocks of which a mask keeps anything, and whether it keeps but a part of one."""
    matrix = roles.to_matrix(mask)
    pool, spread = structure.pool, lambda grid: structure.spread(grid, matrix.shape[-2:])
    for _ in matrix.shape[:-2]:
        pool, spread = jax.vmap(pool), jax.vmap(spread)
    grid = pool(matrix.astype(jnp.float32)) > 0
    return grid, jnp.any(matrix != spread(grid))


def to_dense(params):
    """Arrays in the place of stored parameters, with zeros where nothing is stored; other leaves stay.

    Gradients and updates of stored weights lack their indices; `dataclasses.replace(weight, values=gradient.values)`
    stands for a gradient as an array.

    Args:
        params: any tree, also one stored weight alone.

    Returns:
        A tree of the same structure, of arrays.
    """
    return jax.tree.map(lambda leaf: leaf.to_dense() if is_stored(leaf) else leaf, params, is_leaf=is_stored)
