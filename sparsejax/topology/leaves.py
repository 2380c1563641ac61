"""The sparse leaves of a tree by name: taken out, put back, and seen as units."""

import jax
import jax.numpy as jnp
import optax

from sparsejax.masks.layout import match_sharding
from sparsejax.masks.paths import map_with_names, named_leaves
from sparsejax.masks.rules import LeafPlan
from sparsejax.topology.engine import UnitView


def sparse_leaves(tree, plan: tuple[LeafPlan, ...]) -> dict:
    """The sparse leaves of a tree, `{path: leaf}`."""
    sparse = {leaf.path for leaf in plan if leaf.structure is not None}
    return {path: value for path, value in named_leaves(tree) if path in sparse}


def with_leaves(tree, leaves: dict):
    """The tree with the leaves that `leaves` names put in place of its own."""
    return map_with_names(lambda path, value: leaves.get(path, value), tree)


def unit_views(plan: tuple[LeafPlan, ...]) -> dict[str, UnitView]:
    """A view of each sparse leaf as the units that its structure keeps or prunes whole."""
    return {leaf.path: UnitView(leaf) for leaf in plan if leaf.structure is not None}


def spread_masks(tree, views: dict[str, UnitView], units: dict):
    """Masks with the structure and shardings of `tree`, of the units kept, `{path: bool units}`.

    Dense leaves become `optax.MaskedNode()`.
    """

    def mask(path, value):
        return spread_like(views[path], units[path], value) if path in views else optax.MaskedNode()

    return map_with_names(mask, tree)


def spread_like(view: UnitView, units, leaf):
    """The mask of the units kept, with the sharding of the leaf."""
    mask = view.spread(units)
    return match_sharding(mask, leaf) if isinstance(leaf, jax.Array) else mask


def all_units(views: dict[str, UnitView], leaves: dict) -> dict:
    """Units of which everything is kept, `{path: bool units}`, with the shardings of the leaves."""
    return {path: view.active(jnp.ones_like(leaves[path], dtype=bool)) for path, view in views.items()}
