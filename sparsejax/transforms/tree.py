"""Small maps over a tree of masks and the trees that go with it."""

import jax
import jax.numpy as jnp
import optax

from sparsejax.masks.paths import is_stored, named_leaves
from sparsejax.masks.sequence import after


def is_masked_node(value) -> bool:
    """Whether a mask tree says "dense" here."""
    return isinstance(value, optax.MaskedNode)


def map_sparse(function, masks, *trees, dense=lambda *leaves: leaves[0]):
    """Maps `function(mask, *leaves)` over sparse leaves, `dense(*leaves)` over the others.

    Args:
        function: for leaves that have a mask.
        masks: the mask tree.
        *trees: trees of the same structure.
        dense: for leaves that have none; returns the first tree's by default.

    Returns:
        A tree like `masks`.
    """
    return jax.tree.map(
        lambda mask, *leaves: dense(*leaves) if is_masked_node(mask) else function(mask, *leaves),
        masks,
        *trees,
        is_leaf=is_masked_node,
    )


def no_leaf(*_):
    """For `map_sparse(dense=...)`: the result has no leaf where the mask tree has none."""
    return optax.MaskedNode()


def has_stored(tree) -> bool:
    """Whether any leaf is stored in compressed form."""
    return any(map(is_stored, jax.tree.leaves(tree, is_leaf=is_stored)))


def values_of(tree):
    """The tree that optimizers see: of a stored leaf only its values."""
    if not has_stored(tree):
        return tree
    return jax.tree.map(lambda leaf: leaf.values if is_stored(leaf) else leaf, tree, is_leaf=is_stored)


def kept_elements(mask, leaf) -> jax.Array:
    """How many elements of a leaf its mask keeps, that of a stored leaf being one of blocks: int32 scalar."""
    return leaf.count(mask) if is_stored(leaf) else jnp.sum(mask, dtype=jnp.int32)


def count_nnz(masks, params) -> jax.Array:
    """Kept elements of each sparse leaf: int32 array, in the order of the tree."""
    counts, done = [], jnp.zeros([], jnp.int32)
    leaves = dict(named_leaves(params, is_stored))
    for path, mask in named_leaves(masks):
        done = kept_elements(after(done, mask), leaves[path])
        counts.append(done)
    return jnp.stack(counts) if counts else jnp.zeros([0], jnp.int32)


def count_leaks(params, masks) -> jax.Array:
    """Elements off the mask that are not exactly zero (NaN included), over all sparse leaves: int32 scalar."""
    total = jnp.zeros([], jnp.int32)
    leaves = dict(named_leaves(params, is_stored))
    for path, mask in named_leaves(masks):
        leaf, off = leaves[path], ~mask
        if is_stored(leaf):
            leaf, off = leaf.values, ~leaf.live(leaf.active)
        total = total + jnp.sum(after(total, leaf != 0) & off, dtype=jnp.int32)
    return total


def keep_moments(optimizer, state, keep):
    """Zeroes every part of an optimizer's state that is shaped like a parameter, where `keep` is False.

    Args:
        optimizer: the transformation that `state` belongs to.
        state: its state.
        keep: tree like the parameters, bool arrays, `optax.MaskedNode` where everything is kept.

    Returns:
        The state, of the same structure. Parts of other shapes, such as factored moments, stay.
    """
    if not jax.tree.leaves(keep):
        return state

    def zero(moment, kept):
        if is_masked_node(moment) or is_masked_node(kept) or jnp.shape(moment) != kept.shape:
            return moment
        return jnp.where(kept, moment, jnp.zeros_like(moment))

    try:
        return optax.tree.map_params(optimizer, zero, state, keep, is_leaf=is_masked_node)
    except (AttributeError, IndexError, TypeError):
        # An optimizer whose init looks into the parameters, as line searches do, cannot be mapped by a placeholder.
        like_params = _kind(keep)

        def same_kind(node):
            return _kind(node) == like_params

        def zero_tree(node):
            return jax.tree.map(zero, node, keep, is_leaf=is_masked_node) if same_kind(node) else node

        return jax.tree.map(zero_tree, state, is_leaf=same_kind)


def check_trees(grads, masks, params) -> None:
    """Raises `ValueError` naming the leaves in which gradients, masks and parameters do not match."""
    leaves = dict(named_leaves(params, is_stored))
    shapes = {path: _shape(leaf) for path, leaf in leaves.items()}
    of_masks = shapes | {path: leaf.probe.shape for path, leaf in leaves.items() if is_stored(leaf) and leaf.moves}
    kind = _kind(params)
    for name, tree, wanted in (
        ("gradients", grads, shapes),
        ("masks in the optimizer state", masks, of_masks),
    ):
        found = {path: _shape(leaf) for path, leaf in named_leaves(tree, is_stored)}
        extra = [path for path in found if path not in shapes]
        if extra:
            raise ValueError(
                f"the {name} have leaves that the parameters lack: {extra[:5]}; the parameters have "
                f"{list(shapes)[:5]}. Initialise the optimizer with the parameters that it updates"
            )
        for path, shape in found.items():
            if shape != wanted[path]:
                raise ValueError(f"{path}: the {name} have shape {shape}, the parameter has {wanted[path]}")
        if found.keys() == shapes.keys() and _kind(tree) != kind:
            raise ValueError(
                f"the {name} and the parameters are trees of different kinds, {_kind(tree)} and {kind}: the "
                "optimizer, the gradients and the parameters must come from one and the same kind of tree"
            )
    masked = {path for path, _ in named_leaves(masks)}
    given = {path for path, _ in named_leaves(grads, is_stored)}
    missing = [path for path in shapes if path not in given]
    sparse = [path for path in missing if path in masked]
    if sparse:
        raise ValueError(f"no gradients for the sparse leaves {sparse[:5]}; leave them dense, rules={{path: None}}")
    if missing or _kind(grads) != kind:
        raise ValueError(
            f"the gradients and the parameters are trees of different structure; parameters without a gradient: "
            f"{missing[:5]}. Differentiate with respect to all parameters, or divide the optimizer with optax.partition"
        )


def _shape(leaf):
    return leaf.values.shape if is_stored(leaf) else jnp.shape(leaf)


def _kind(tree):
    return jax.tree.structure(tree, is_leaf=lambda node: node is None or is_masked_node(node) or is_stored(node))
