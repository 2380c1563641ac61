"""Controls for masks found before training: shuffled masks, masks without what no path reaches, empty layers."""

import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax.masks.budget import Counts
from sparsejax.masks.paths import map_with_names, named_leaves
from sparsejax.masks.rules import resolve
from sparsejax.masks.unstructured import Unstructured
from sparsejax.topology.engine import choose_units
from sparsejax.topology.leaves import spread_masks, unit_views
from sparsejax.topology.synflow import synaptic_flow


def shuffle_masks(masks, seed: int, *, rules=None, structure=Unstructured()):
    """Moves the kept weights of every layer to random places of the same layer.

    The control that tells whether a method has found which weights matter, or only how many each layer needs: what it
    found is in the places if the shuffled masks train worse.

    Args:
        masks: bool masks, `optax.MaskedNode()` where dense.
        seed: seed of the random places; each leaf draws from its own key.
        rules: the rules that the masks were made with.
        structure: the structure that the masks were made with; whole units are moved.

    Returns:
        A tree like `masks`; every layer, and every N:M group, keeps as many weights as before.

    Raises:
        ValueError: a mask does not have the structure, or the rules leave its leaf dense.

    Example:
        >>> import jax.numpy as jnp
        >>> masks = {"kernel": jnp.arange(12).reshape(3, 4) < 5}
        >>> shuffled = shuffle_masks(masks, seed=0)["kernel"]
        >>> shuffled.shape, int(shuffled.sum())
        ((3, 4), 5)

    References:
        Frankle et al., Pruning Neural Networks at Initialization: Why Are We Missing the Mark?, 2021
        (https://arxiv.org/abs/2009.08576); Su et al., Sanity-Checking Pruning Methods, 2020
        (https://arxiv.org/abs/2009.11094)
    """
    views = unit_views(_plan_of(masks, rules, structure))
    key = jax.random.key(seed)
    units, scores, counts = {}, {}, {}
    for path, mask in named_leaves(masks):
        view = views[path]
        units[path] = view.active(mask)
        if int(jnp.sum(view.spread(units[path]))) != int(jnp.sum(mask)):
            raise ValueError(
                f"{path}: the mask does not consist of whole units of {view.structure}; name its structure"
            )
        leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        scores[path] = jax.random.uniform(leaf_key, units[path].shape)
        counts[path] = view.count(units[path])
    chosen = choose_units(views, Counts(counts, None, ()), scores, dict.fromkeys(views))
    return spread_masks(masks, views, chosen)


def collapsed_layers(masks, *, rules=None) -> list[str]:
    """Names the layers of which nothing is kept: no signal passes them, so the network cannot learn.

    Args:
        masks: bool masks, `optax.MaskedNode()` where dense.
        rules: the rules that the masks were made with; they tell which axes stack layers.

    Returns:
        Names of the empty layers, `path[i]` for layer i of a stacked leaf; empty when all is well.

    Example:
        >>> import jax.numpy as jnp
        >>> collapsed_layers({"a": jnp.zeros((2, 2), bool), "b": jnp.ones((2, 2), bool)})
        ['a']
    """
    empty = []
    given = dict(named_leaves(masks))
    for leaf in _plan_of(masks, rules, Unstructured()):
        if leaf.structure is not None:
            stacked = len(leaf.roles.batch_axes)
            kept = jnp.moveaxis(given[leaf.path], leaf.roles.batch_axes, range(stacked))
            kept = np.asarray(jnp.any(kept, axis=tuple(range(stacked, kept.ndim)))).reshape(-1)
            empty += [name for name, any_kept in zip(leaf.layer_shapes, kept, strict=True) if not any_kept]
    return empty


def effective_masks(apply: Callable, params, inputs, masks):
    """Takes away the kept weights that no path from the inputs to the outputs goes through.

    They take part in no output, so the density of what remains is the effective one. A network whose layers all keep
    some weights may be cut through nevertheless; then nothing remains, and `collapsed_layers` names every layer.

    Args:
        apply: `apply(params, inputs) -> outputs`, as in `synflow`.
        params: the parameter tree. Kept weights count as connected whatever their value; other leaves, such as biases,
            carry a signal where they are not 0.
        inputs: as in `synflow`.
        masks: bool masks, `optax.MaskedNode()` where dense.

    Returns:
        A tree like `masks`, True where a kept weight lies on a path.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 1))}
        >>> masks = {"a": jnp.array([[True, True], [False, True]]), "b": jnp.array([[True], [False]])}
        >>> effective = effective_masks(lambda p, x: x @ p["a"] @ p["b"], params, jnp.zeros((1, 2)), masks)
        >>> effective["a"].tolist(), effective["b"].tolist()
        ([[True, False], [False, False]], [[True], [False]])

    References:
        Vysogorets & Kempe, Connectivity Matters: Neural Network Pruning Through the Lens of Effective Sparsity, 2023
        (https://arxiv.org/abs/2107.02306)
    """
    kept = dict(named_leaves(masks))

    def connection(path, value):
        if path not in kept:
            return value
        # Each weight is the inverse of the mean number kept per output, so that signals neither grow nor vanish.
        return jnp.where(kept[path], value.shape[-1] / jnp.maximum(jnp.sum(kept[path]), 1), 0).astype(jnp.float32)

    flow = synaptic_flow(apply, map_with_names(connection, params), inputs, masks)
    return map_with_names(lambda path, mask: flow[path] > 0, masks)


def _plan_of(masks, rules, structure):
    """The plan of the leaves that have masks; a dense leaf is a scalar, so that rules which name it find it."""

    def stand_in(mask):
        dense = isinstance(mask, optax.MaskedNode)
        return jax.ShapeDtypeStruct(() if dense else jnp.shape(mask), jnp.float32)

    likes = jax.tree.map(stand_in, masks, is_leaf=lambda mask: isinstance(mask, optax.MaskedNode))
    plan = resolve(likes, rules, structure)
    for leaf in plan:
        if leaf.structure is None and leaf.shape:
            raise ValueError(
                f"{leaf.path} has a mask but is {leaf.reason}; pass the rules that the masks were made with"
            )
    return plan
