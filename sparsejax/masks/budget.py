"""How many units every layer keeps: a distribution's shares as exact counts, for fixed and for moving sparsity."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.masks.counts import exact_fraction, keep_count, layer_counts, share, share_floor, to_ppm
from sparsejax.masks.distributions import uniform
from sparsejax.masks.rules import LeafPlan
from sparsejax.masks.unstructured import Unstructured

_STEPS = 1000  # resolution of the table that a moving sparsity is read from, for shares that are not proportional to it
_MILLION = 1_000_000


@dataclasses.dataclass(frozen=True)
class Counts:
    """Units to keep: `layers[path]` is an int, or an int32 array of the leaf's batch shape; `pooled` is one number.

    Args:
        layers: the count of each leaf that has one of its own.
        pooled: the count that the leaves of `pool` share under one threshold; None when there is no pool.
        pool: the paths of the pooled leaves.
    """

    layers: dict
    pooled: object
    pool: tuple[str, ...]


def unit_grid(leaf: LeafPlan) -> tuple[int, ...]:
    """Shape of the units of one layer of a leaf, without its batch axes."""
    if isinstance(leaf.structure, Unstructured):
        batch = {axis % len(leaf.shape) for axis in leaf.roles.batch_axes}
        return tuple(size for axis, size in enumerate(leaf.shape) if axis not in batch)
    return leaf.structure.grid(leaf.roles.matrix_shape(leaf.shape)[-2:])


def count_units(plan: tuple[LeafPlan, ...], distribution, sparsity, final=None) -> Counts:
    """Counts the units that each sparse leaf of a plan keeps.

    Args:
        plan: what `resolve` returned.
        distribution: shares the sparsity out over layers.
        sparsity: a Python number, counted exactly as written; or an array, traced or not, rounded to parts per million.
        final: what a moving sparsity ends at; a leaf to which a rule gives a sparsity of its own gets there in the same
            proportion. None: it is there.

    Returns:
        The `Counts`. For a Python number they are Python ints and sum to the exact total; for an array they are int32
        scalars. A layer keeps at least one unit.

    Raises:
        ValueError: the sparsity is not in [0, 1), or an N:M structure cannot have it.
    """
    sparse = [leaf for leaf in plan if leaf.structure is not None]
    fixed = {leaf.path: _fixed_sparsity(leaf) for leaf in sparse}
    free = [leaf for leaf in sparse if fixed[leaf.path] is None]
    shapes = {name: shape for leaf in free for name, shape in leaf.layer_shapes.items()}
    units = {name: math.prod(unit_grid(leaf)) for leaf in sparse for name in leaf.layer_shapes}
    static = not isinstance(sparsity, jax.Array)
    per_layer, pool_names = (_static if static else _moving)(distribution, shapes, units, sparsity)
    layers, pool = {}, []
    for leaf in sparse:
        names = list(leaf.layer_shapes)
        if fixed[leaf.path] is not None:
            done = 1.0 if static or final is None else _progress(sparsity, final)
            layers[leaf.path] = _fixed_count(leaf, fixed[leaf.path], math.prod(unit_grid(leaf)), sparsity, done)
        elif names[0] in pool_names:
            pool.append(leaf.path)
        elif leaf.roles.batch_axes:
            counts = [per_layer[name] for name in names]
            stacked = np.array(counts, np.int32) if static else jnp.stack(counts)
            layers[leaf.path] = stacked.reshape(leaf.roles.batch_shape(leaf.shape))
        else:
            layers[leaf.path] = per_layer[names[0]]
    pooled = None
    if pool:
        total = sum(units[name] for name in pool_names)
        if total >= 2**31:
            raise ValueError(
                f"one threshold over {total} units overflows 32-bit counts; use a distribution with per-layer shares, "
                "or give some leaves their own sparsity with rules"
            )
        pooled = max(1, keep_count(total, sparsity)) if static else share(total, _MILLION - to_ppm(sparsity))
        pooled = pooled if static else jnp.maximum(pooled, 1)
    return Counts(layers, pooled, tuple(pool))


def _fixed_sparsity(leaf: LeafPlan):
    """The sparsity that a rule or an N:M structure fixes for a leaf, or None."""
    if leaf.structure.fixed_density is not None:
        own = 1 - leaf.structure.fixed_density
        if leaf.sparsity is not None and abs(exact_fraction(leaf.sparsity) - own) > 1e-6:
            raise ValueError(f"{leaf.path}: a rule asks for sparsity {leaf.sparsity}, but {leaf.structure} has {own}")
        return own
    return leaf.sparsity


def _progress(sparsity, final):
    """How far a moving sparsity is on its way, from 0 to 1; NaN, which prunes nothing, is at 0."""
    share = jnp.where(jnp.asarray(final) > 0, sparsity / jnp.maximum(final, 1e-6), 1.0)
    return jnp.clip(jnp.where(jnp.isnan(share), 0.0, share), 0.0, 1.0)


def _fixed_count(leaf: LeafPlan, own, units: int, sparsity, done):
    if leaf.structure.fixed_density is None:
        kept = max(1, keep_count(units, own))
        if isinstance(done, float):
            return kept
        return jnp.where(done == 1, kept, jnp.maximum(share(units, _MILLION - to_ppm(float(own) * done)), 1))
    groups = units // leaf.structure.m
    if not isinstance(sparsity, jax.Array):
        return groups * leaf.structure.n
    # N:M groups are only ever as sparse as n of m; a sparsity still on its way there keeps more of each group. One part
    # per million of slack takes up the rounding of sparsities such as 1/3.
    m = leaf.structure.m
    wanted = jnp.minimum(to_ppm(sparsity), math.ceil(own * _MILLION))
    quota = ((_MILLION - wanted) * m + _MILLION - 1 - m) // _MILLION
    return groups * jnp.maximum(quota, leaf.structure.n)


def _shares(distribution, shapes, sparsity) -> tuple[dict, list[str]]:
    shares = distribution(shapes, sparsity)
    if set(shares) != set(shapes):
        raise ValueError(f"the distribution {distribution} gave shares for {sorted(shares)}, not for {sorted(shapes)}")
    own = {name: value for name, value in shares.items() if value is not None}
    return own, [name for name in shapes if shares[name] is None]


def _static(distribution, shapes, units, sparsity):
    if not shapes:
        exact_fraction(sparsity)
        return {}, []
    own, pool = _shares(distribution, shapes, sparsity)
    sizes = {name: units[name] for name in own}
    densities = {name: 1 - exact_fraction(value) for name, value in own.items()}
    return (layer_counts(sizes, densities) if own else {}), pool


def _moving(distribution, shapes, units, sparsity):
    if not shapes:
        return {}, []
    ppm = to_ppm(sparsity)
    if distribution is uniform:
        return _moving_uniform([units[name] for name in shapes], list(shapes), _MILLION - ppm), []
    own, pool = _shares(distribution, shapes, 0.5)
    if not own:
        return {}, pool
    table = _table(distribution, tuple(shapes.items()), tuple(units[name] for name in shapes))
    low, rest = ppm // _STEPS, ppm % _STEPS
    here, there = table[low], table[jnp.minimum(low + 1, _STEPS)]
    gap = there - here
    # gap * rest / 1000 in 32 bits, rounded towards zero so that it never oversteps the next entry
    part = (gap // _STEPS) * rest + ((gap % _STEPS) * rest) // _STEPS
    counts = jnp.maximum(here + part, 1)
    return {name: counts[index] for index, name in enumerate(shapes) if name in own}, pool


def _moving_uniform(sizes, names, keep):
    """Rounds down, then gives the units still missing from the exact total to the largest remainders."""
    floors = jnp.stack([share_floor(size, keep) for size in sizes])
    # The remainder size * keep - floor * 10^6 is below 10^6, so that it survives the overflow of its two terms.
    product = jnp.array(sizes, jnp.uint32) * keep.astype(jnp.uint32)
    remainders = (product - floors.astype(jnp.uint32) * jnp.uint32(_MILLION)).astype(jnp.int32)
    whole, rest = jnp.sum(remainders) // _MILLION, jnp.sum(remainders) % _MILLION
    odd = (jnp.sum(floors % 2) + whole) % 2 == 1
    missing = whole + ((rest > _MILLION // 2) | ((rest == _MILLION // 2) & odd))
    order = jnp.arange(len(sizes))
    ahead = (remainders > remainders[:, None]) | ((remainders == remainders[:, None]) & (order < order[:, None]))
    counts = jnp.maximum(floors + (jnp.sum(ahead, axis=1) < missing), 1)
    return {name: counts[index] for index, name in enumerate(names)}


@functools.lru_cache(maxsize=64)
def _table_values(distribution, shapes, units) -> np.ndarray:
    shapes, units = dict(shapes), dict(zip(dict(shapes), units, strict=True))
    rows = []
    for step in range(_STEPS):
        counts, _ = _static(distribution, shapes, units, step / _STEPS)
        rows.append([counts.get(name, 0) for name in shapes])
    rows.append([1] * len(shapes))
    return np.array(rows, np.int32)


def _table(distribution, shapes, units):
    return jnp.asarray(_table_values(distribution, shapes, units))
