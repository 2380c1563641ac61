"""Masks as pure functions: how they start, and the one move (prune, drop, grow) that every algorithm is made of."""

import jax
import jax.numpy as jnp
import optax

from sparsejax.masks.block import Block
from sparsejax.masks.budget import Counts, count_units
from sparsejax.masks.counts import share_floor, to_ppm
from sparsejax.masks.layout import match_sharding
from sparsejax.masks.paths import is_stored, map_with_names, named_leaves
from sparsejax.masks.rules import LeafPlan, resolve, resolve_stored
from sparsejax.masks.select import select_top, select_top_global
from sparsejax.masks.sequence import after
from sparsejax.masks.unstructured import Unstructured
from sparsejax.topology import scores
from sparsejax.topology.algorithm import NEVER, Algorithm, check_density
from sparsejax.topology.stored import StoredView


def plan_leaves(params, algorithm: Algorithm, rules=None) -> tuple[LeafPlan, ...]:
    """Resolves which leaves an algorithm makes sparse; starting masks, where given, have the last word.

    Raises:
        ValueError: as `resolve`; and where a starting mask does not fit its leaf.
    """
    if algorithm.masks is None or not named_leaves(params):
        check_density(algorithm.sparsity, algorithm.structure)
        return resolve(params, rules, algorithm.structure)
    given = dict(named_leaves(algorithm.masks))
    never = algorithm.steps == NEVER
    plan = _resolved_or_dense(params, algorithm, rules, never)
    shapes = {leaf.path: leaf.shape for leaf in plan}
    stored = {path for path, leaf in named_leaves(params, is_stored) if is_stored(leaf)}  # that is their starting mask
    for path, mask in given.items():
        if path in stored:
            continue
        if path not in shapes:
            raise ValueError(f"masks has a leaf {path!r} that the parameters lack; they have {sorted(shapes)[:8]}")
        if mask.dtype != jnp.bool_ or mask.shape != shapes[path]:
            raise ValueError(f"{path}: the starting mask is {mask.dtype}{mask.shape}; it must be bool{shapes[path]}")
    merged = []
    for leaf in plan:
        if leaf.path in stored:
            merged.append(leaf)
        elif leaf.path not in given:
            merged.append(LeafPlan(leaf.path, leaf.shape, None, None, None, "dense: no starting mask"))
        elif leaf.structure is None and not never:
            raise ValueError(f"{leaf.path}: has a starting mask but is {leaf.reason}; a mask that moves needs a rule")
        elif leaf.structure is None:
            merged.append(LeafPlan(leaf.path, leaf.shape, None, Unstructured(), None, "sparse: starting mask"))
        else:
            merged.append(leaf)
    if not stored and all(leaf.structure is None for leaf in merged):
        raise ValueError(
            "no leaf has a starting mask, so there is nothing to do; give a bool mask for each sparse leaf"
        )
    return tuple(merged)


def _resolved_or_dense(params, algorithm, rules, never: bool):
    if never and rules is None:  # masks that stay need no axis roles
        return tuple(
            resolve_stored(path, leaf, algorithm.structure, None)
            if is_stored(leaf)
            else LeafPlan(path, jnp.shape(leaf), None, None, None, "dense")
            for path, leaf in named_leaves(params, is_stored)
        )
    return resolve(params, rules, algorithm.structure)


def start_masks(algorithm: Algorithm, plan: tuple[LeafPlan, ...], params, data=None):
    """The masks before the first step.

    Args:
        algorithm: says how masks start.
        plan: what `plan_leaves` returned for `params`.
        params: the parameter tree. Where its leaves are abstract, magnitudes count as equal.
        data: the algorithm's memory.

    Returns:
        A tree like `params` of fresh bool arrays, `optax.MaskedNode()` at dense leaves. Those of stored leaves are of
        their grids, and say what is stored, whatever the algorithm would start with.
    """
    planned = {leaf.path: leaf for leaf in plan}

    def everything(path, p):
        if planned[path].structure is None:
            return optax.MaskedNode()
        return _concrete(p).mask() if planned[path].stored else _full(p)

    dense = map_with_names(everything, params, is_leaf=is_stored)
    stored = dict(named_leaves(dense))
    stored = {leaf.path: stored.pop(leaf.path) for leaf in plan if leaf.stored}
    if algorithm.masks is not None:
        given = dict(named_leaves(algorithm.masks)) | stored
        return map_with_names(lambda path, mask: match_sharding(jnp.array(given[path]), mask), dense)
    if algorithm.start is None or len(stored) == len(jax.tree.leaves(dense)):
        return dense
    values = _concrete(params)
    distribution = algorithm.start_distribution or algorithm.distribution
    counts = count_units(plan, distribution, algorithm.sparsity_at(0), algorithm.final_sparsity)
    counts = _without(counts, stored)
    views = {path: UnitView(planned[path]) for path, _ in named_leaves(dense) if path not in stored}
    units = _unit_scores(algorithm.start, views, values, None, dense, random_key(algorithm, 0), data)
    chosen = choose_units(views, counts, units, dict.fromkeys(views))

    def spread(path, mask):
        return mask if path in stored else match_sharding(views[path].spread(chosen[path]), mask)

    return map_with_names(spread, dense)


def _without(counts: Counts, stored: dict) -> Counts:
    """The counts of the leaves that are not stored; of a pool, what the stored ones leave."""
    if not stored:
        return counts
    pooled = [jnp.sum(mask, dtype=jnp.int32) for path, mask in stored.items() if path in counts.pool]
    return Counts(
        {path: count for path, count in counts.layers.items() if path not in stored},
        counts.pooled - sum(pooled) if counts.pool else None,
        tuple(path for path in counts.pool if path not in stored),
    )


def move_masks(algorithm: Algorithm, plan: tuple[LeafPlan, ...], params, grads, masks, data, step):
    """Moves masks once: prune to the step's counts, then drop and grow; see `Algorithm` for the exact order.

    Args:
        algorithm: the pieces.
        plan: what `plan_leaves` returned.
        params: weights, dense ones under the mask for latent algorithms.
        grads: gradients with respect to the masked weights.
        masks: the masks until now.
        data: the algorithm's memory.
        step: int32 scalar.

    Returns:
        The new masks, a tree like `masks`. NaN scores rank last: they are pruned first and grown last.
    """
    planned = {leaf.path: leaf for leaf in plan}
    leaves = dict(named_leaves(params, is_stored))
    views = {
        path: StoredView(planned[path], leaves[path]) if planned[path].stored else UnitView(planned[path])
        for path, _ in named_leaves(masks)
    }
    counts = count_units(plan, algorithm.distribution, algorithm.sparsity_at(step), algorithm.final_sparsity)
    key = random_key(algorithm, step)
    drop_key, grow_key = jax.random.split(key)

    def unit_scores(score, score_key):
        return _unit_scores(score, views, params, grads, masks, score_key, data)

    drop = unit_scores(algorithm.drop, drop_key)
    if algorithm.reselect:
        moved = choose_units(views, counts, drop, dict.fromkeys(views))
    else:
        moved = {path: views[path].active(mask) for path, mask in named_leaves(masks)}
        if algorithm.grow is None or algorithm.moving:
            moved = choose_units(views, counts, drop, moved)
        else:
            counts = Counts({}, None, ())
        if algorithm.grow is not None:
            fraction = to_ppm(algorithm.drop_fraction_at(step))
            moved = _swap(views, counts, drop, unit_scores(algorithm.grow, grow_key), moved, fraction)
    return map_with_names(lambda path, mask: match_sharding(views[path].spread(moved[path]), mask), masks)


def _unit_scores(score, views, params, grads, masks, key, data) -> dict:
    tree = dict(named_leaves(score(params, grads, masks, key, data), is_stored))
    drawn = {}
    if score is scores.random:  # blocks draw once each, so that stored and masked ones draw alike
        drawn = {path: view.like(tree[path]) for path, view in views.items() if isinstance(view.structure, Block)}
        drawn = score(drawn, None, None, key, None)
    for path, view in views.items():
        if path not in tree:
            raise ValueError(
                f"the score {score} gave no scores for {path!r}, only for {list(tree)[:5]}; it must return a tree like "
                "the parameters"
            )
        shape = tree[path].shape if is_stored(tree[path]) else jnp.shape(tree[path])
        if shape != view.shape:
            raise ValueError(f"{path}: the score {score} has shape {shape}, the weight {view.shape}")
    return {path: drawn[path] if path in drawn else view.pool(tree[path]) for path, view in views.items()}


def _swap(views, counts: Counts, drop, grow, active, fraction):
    swapped, done = {}, jnp.zeros([], jnp.int32)
    for path, view in views.items():
        before = after(done, active[path])
        nnz = view.count(before)
        kept = view.over_layers(lambda s, n, m: select_top(s, n, where=m))(
            after(done, drop[path]), nnz - share_floor(nnz, fraction), before
        )
        target = _of_layers(counts.layers.get(path, nnz), nnz)
        done = jnp.sum(view.count(kept))
        swapped[path] = view.over_layers(view.structure.refill)(after(done, grow[path]), kept, target)
        done = jnp.sum(view.count(swapped[path]))
    if counts.pool:
        missing = counts.pooled - sum(jnp.sum(swapped[path], dtype=jnp.int32) for path in counts.pool)
        extra = select_top_global(
            [grow[path] for path in counts.pool], missing, where=[~swapped[path] for path in counts.pool]
        )
        swapped |= {path: swapped[path] | more for path, more in zip(counts.pool, extra, strict=True)}
    return swapped


def _of_layers(count, like):
    """A count for each layer, sharded as the layers are: to map over them, all arguments must agree."""
    return match_sharding(jnp.broadcast_to(jnp.asarray(count, jnp.int32), like.shape), like)


def choose_units(views, counts: Counts, scores, where):
    """Keeps the best units of every layer, and of the pool under one threshold.

    Args:
        views: `{path: UnitView}`.
        counts: how many.
        scores: `{path: unit scores}`.
        where: `{path: bool units or None}`: the candidates.

    Returns:
        `{path: bool units}`.
    """
    chosen, done = {}, jnp.zeros([], jnp.int32)
    for path, count in counts.layers.items():
        view = views[path]
        candidates = jnp.ones_like(scores[path], dtype=bool) if where[path] is None and view.batch else where[path]
        count = _of_layers(count, view.count(candidates)) if view.batch else count
        choose = view.over_layers(lambda s, n, m, structure=view.structure: structure.choose(s, n, where=m))
        chosen[path] = choose(after(done, scores[path]), count, candidates)
        done = jnp.sum(view.count(chosen[path]))
    if counts.pool:
        pooled = select_top_global(
            [scores[path] for path in counts.pool], counts.pooled, where=[where[path] for path in counts.pool]
        )
        chosen |= dict(zip(counts.pool, pooled, strict=True))
    return chosen


class UnitView:
    """A leaf seen as units: arrays `(*batch, *grid)` with one entry for each thing that is kept or pruned whole."""

    def __init__(self, leaf: LeafPlan):
        self.structure = leaf.structure
        self.shape = leaf.shape
        self.roles = leaf.roles
        self.elementwise = isinstance(leaf.structure, Unstructured)
        self.batch = leaf.roles.batch_shape(leaf.shape) if leaf.roles else ()

    def over_layers(self, function):
        """Maps a function of one layer's units over the leaf's batch axes."""
        for _ in self.batch:
            function = jax.vmap(function)
        return function

    def pool(self, scores):
        """Unit scores of an array of the leaf's shape."""
        if self.elementwise:
            return jnp.moveaxis(scores, self.roles.batch_axes, range(len(self.batch))) if self.batch else scores
        return self.over_layers(self.structure.pool)(self.roles.to_matrix(scores))

    def like(self, scored):
        """An array of the units' shape, with the sharding that scores of units get."""
        return self.pool(scored)

    def active(self, mask):
        """Units of which any element is kept."""
        return self.pool(mask) if self.elementwise else self.pool(mask.astype(jnp.float32)) > 0

    def spread(self, units):
        """The mask, of the leaf's shape, of chosen units."""
        if self.elementwise:
            return jnp.moveaxis(units, range(len(self.batch)), self.roles.batch_axes) if self.batch else units
        matrix = self.roles.matrix_shape(self.shape)[-2:]
        spread = self.over_layers(lambda layer: self.structure.spread(layer, matrix))(units)
        return self.roles.from_matrix(spread, self.shape)

    def count(self, units):
        """Active units of each layer, int32 of the leaf's batch shape."""
        return jnp.sum(units, axis=tuple(range(len(self.batch), units.ndim)), dtype=jnp.int32)


def random_key(algorithm: Algorithm, step):
    """The key of a step: the same on every host, after every resume."""
    return jax.random.fold_in(jax.random.key(algorithm.seed), step)


def _concrete(params):
    """Zeros in the place of abstract leaves."""
    return jax.tree.map(lambda p: jnp.zeros_like(p) if isinstance(p, jax.ShapeDtypeStruct) else p, params)


def _full(p):
    return jnp.ones_like(p, dtype=bool)
