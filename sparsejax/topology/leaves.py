"""The sparse leaves of a tree by name: taken out, put back, and seen as units."""

import optax

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
    """Masks like `tree` of the units kept, `{path: bool units}`; `optax.MaskedNode()` at dense leaves."""
    return map_with_names(
        lambda path, value: views[path].spread(units[path]) if path in views else optax.MaskedNode(), tree
    )
