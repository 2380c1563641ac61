"""Names of the leaves of a tree: `blocks/0/kernel` for NNX states, linen dicts, lists and dataclasses alike."""

import jax


def path_name(key_path) -> str:
    """Joins a key path with slashes; the `.value` that NNX puts behind a variable is not part of the name.

    Args:
        key_path: a tuple of JAX key entries, as `jax.tree_util.tree_flatten_with_path` gives them.

    Returns:
        The name, `""` for a tree that is a single leaf.

    Example:
        >>> import jax
        >>> [(path, _)] = jax.tree_util.tree_flatten_with_path({"blocks": [{"kernel": 1.0}]})[0]
        >>> path_name(path)
        'blocks/0/kernel'
    """
    parts = [jax.tree_util.keystr((key,), simple=True) for key in key_path]
    if len(parts) > 1 and parts[-1] == "value" and isinstance(key_path[-1], jax.tree_util.GetAttrKey):
        parts = parts[:-1]
    return "/".join(parts)


def is_stored(node) -> bool:
    """Whether a node of a tree is one sparse parameter in compressed storage, such as a `BlockSparse`."""
    return getattr(type(node), "stored", False)


def named_leaves(tree, is_leaf=None) -> list[tuple[str, object]]:
    """Lists the leaves of a tree with their names, in the tree's own order.

    Args:
        tree: any pytree. `None` and `optax.MaskedNode` have no leaves and do not appear.
        is_leaf: as in `jax.tree.map`; `is_stored` lists sparse parameters whole.

    Returns:
        A list of `(name, leaf)`.

    Example:
        >>> named_leaves({"layer": {"kernel": 1, "bias": None}})
        [('layer/kernel', 1)]
    """
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]]


def map_with_names(function, tree, *rest, is_leaf=None):
    """`jax.tree.map` whose function gets the leaf's name first.

    Args:
        function: called as `function(name, leaf, *rest_leaves)`.
        tree: the tree that sets the structure.
        *rest: trees of which `tree`'s structure is a prefix.
        is_leaf: as in `jax.tree.map`.

    Returns:
        A tree of the structure of `tree`.

    Example:
        >>> map_with_names(lambda name, leaf: f"{name}={leaf}", {"a": 1})
        {'a': 'a=1'}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest, is_leaf=is_leaf
    )
