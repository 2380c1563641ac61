"""Moving the blocks of stored weights: their units, their slots, and the signal that asks for a probe."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.masks.budget import count_units
from sparsejax.masks.layout import unshard
from sparsejax.masks.paths import is_stored, map_with_names, named_leaves
from sparsejax.masks.rules import LeafPlan
from sparsejax.masks.sequence import run_if
from sparsejax.parameters.slots import move_layer
from sparsejax.topology import scores
from sparsejax.topology.algorithm import Algorithm

_PROBES = 64  # update steps at which a schedule is held against the capacity


class StoredView:
    """A stored leaf seen as units, one for each block of its grid; the same face as `UnitView`.

    Args:
        plan: the leaf's plan.
        leaf: the `BlockSparse` itself.
    """

    elementwise = False

    def __init__(self, plan: LeafPlan, leaf):
        self.structure, self.shape, self.roles = plan.structure, plan.shape, plan.roles
        self.leaf = leaf
        self.batch = leaf.batch

    def over_layers(self, function):
        """Maps a function of one layer's units over the stacked layers."""
        return self.leaf.over_layers(function)

    def pool(self, scored):
        """Scores of all blocks: of stored ones from their elements, of absent ones what the probe says of them."""
        slots = unshard(self.leaf.pool(scored.values), -2)
        grid = self.leaf.to_grid(slots, 0)
        return jnp.where(self.leaf.mask(), grid, scored.probe.astype(grid.dtype))

    def active(self, mask):
        """The mask of a stored leaf is that of its units."""
        return mask

    def spread(self, units):
        """The mask of a stored leaf is that of its units."""
        return units

    def count(self, units):
        """Active units of each layer, int32 of the leaf's batch shape."""
        return jnp.sum(units, axis=(-2, -1), dtype=jnp.int32)

    def like(self, scored):
        """An array of the units' shape, with the sharding that scores of units get."""
        return scored.probe


class Moved(NamedTuple):
    """Where the blocks of a stored leaf lie from now on.

    Attributes:
        lists: the lists.
        stays: slots that hold the block that they held before, bool [..., groups, slots].
        lost: blocks that found no slot, int32.
    """

    lists: object
    stays: jax.Array
    lost: jax.Array


def stored_leaves(params, plan: tuple[LeafPlan, ...]) -> dict:
    """The stored leaves whose blocks may move, `{path: BlockSparse}`."""
    moving = {leaf.path for leaf in plan if leaf.stored}
    return {path: leaf for path, leaf in named_leaves(params, is_stored) if path in moving}


def move_blocks(leaf, mask) -> Moved:
    """Puts the blocks that `mask` keeps into a leaf's slots."""
    lists, stays = leaf.over_layers(lambda lists, grid: move_layer(lists, grid, leaf.structure))(leaf.lists, mask)
    found = jnp.sum(lists.rows < leaf.grid[0], dtype=jnp.int32)
    return Moved(lists, stays, jnp.sum(mask, dtype=jnp.int32) - found)


def needs_probe(algorithm: Algorithm) -> bool:
    """Whether growth reads gradients of absent blocks."""
    return algorithm.grow not in (None, scores.random)


def probe_signal(algorithm: Algorithm, step) -> jax.Array:
    """What `probe_when` must be for the gradients of a step: int32 scalar."""
    if not needs_probe(algorithm):
        return jnp.zeros([], jnp.int32)
    return jnp.asarray(algorithm.steps.due(step), jnp.int32)


def check_stored(algorithm: Algorithm, plan: tuple[LeafPlan, ...], params) -> None:
    """Raises `ValueError` naming the leaf where an algorithm asks of stored leaves what they cannot do."""
    leaves = stored_leaves(params, plan)
    if not leaves:
        return
    path = next(iter(leaves))
    for name, asked in (
        ("dense weights under the mask", algorithm.latent),
        ("gradients of pruned weights", algorithm.gradient is not None),
        ("a memory", algorithm.memory is not None),
    ):
        if asked:
            raise ValueError(
                f"{path}: is stored in blocks and has no {name.removeprefix('a ')} off them, which the algorithm "
                "keeps; train masks on dense parameters with it, and use to_sparse afterwards"
            )
    if needs_probe(algorithm) and algorithm.steps.due(0):
        raise ValueError(
            f"{path}: blocks would grow by gradients at step 0, whose gradients of absent blocks were not asked for; "
            "begin at step 1 or later"
        )
    if not (algorithm.reselect or (algorithm.grow is not None and (algorithm.moving or algorithm.reset_all))):
        return
    begin, end = algorithm.steps.begin, algorithm.steps.end
    end = begin + _PROBES * algorithm.steps.every if end is None else end
    stride = max(1, (end - begin) // algorithm.steps.every // _PROBES) * algorithm.steps.every
    with jax.ensure_compile_time_eval():
        for step in [*range(begin, end, stride), end]:
            counts = count_units(plan, algorithm.distribution, algorithm.sparsity_at(jnp.int32(step)))
            for path, leaf in leaves.items():
                room = leaf.capacity // leaf.structure.groups
                if path in counts.pool:
                    needed = leaf.grid[0] * leaf.grid[1] // leaf.structure.groups
                    why = "shares one threshold with others, so that it may come to keep all of them"
                else:
                    most = int(jnp.max(jnp.asarray(counts.layers[path])))
                    needed = -(-most // leaf.structure.groups)
                    why = f"keeps {most} at step {step}"
                if needed > room:
                    raise ValueError(
                        f"{path}: has slots for {leaf.capacity} blocks, but {why}; make it with a larger capacity, "
                        "to_sparse(..., capacity=share of all blocks)"
                    )


def arrange(stored: dict, masks, due) -> dict[str, Moved]:
    """Puts the blocks that masks keep into the slots of stored leaves, where it is time.

    Args:
        stored: `{path: BlockSparse}`.
        masks: the mask tree after the move.
        due: whether masks move at this step.

    Returns:
        `{path: Moved}`.
    """
    if not stored:
        return {}
    chosen = {path: mask for path, mask in named_leaves(masks) if path in stored}
    return run_if(
        due,
        lambda: {path: move_blocks(leaf, chosen[path]) for path, leaf in stored.items()},
        lambda: {path: Moved(leaf.lists, leaf.active, jnp.zeros([], jnp.int32)) for path, leaf in stored.items()},
    )


def stored_updates(params, updates, moved: dict[str, Moved], signal):
    """Puts the updates of values back into the shape of the parameters; indices get the difference to the new ones.

    Args:
        params: the parameters.
        updates: what the inner optimizer gave for their values.
        moved: where blocks lie from now on.
        signal: what `probe_when` is to be.

    Returns:
        A tree like `params`.
    """

    def update(path, leaf, values):
        if not is_stored(leaf):
            return values
        still = dataclasses.replace(jax.tree.map(jnp.zeros_like, leaf), values=values)
        if path not in moved:
            return still
        lists = jax.tree.map(jnp.subtract, moved[path].lists, leaf.lists)
        return dataclasses.replace(still, lists=lists, probe_when=signal - leaf.probe_when)

    return map_with_names(update, params, updates, is_leaf=is_stored)
