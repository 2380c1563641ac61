"""Lottery tickets: train, prune what ended small, rewind the rest to where it started, and again."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sparsejax.masks.budget import Counts
from sparsejax.masks.counts import exact_fraction
from sparsejax.masks.distributions import global_
from sparsejax.masks.paths import map_with_names, named_leaves
from sparsejax.masks.rules import LeafPlan, resolve
from sparsejax.masks.unstructured import Unstructured
from sparsejax.topology.engine import choose_units
from sparsejax.topology.leaves import all_units, sparse_leaves, spread_masks, unit_views


class Ticket(NamedTuple):
    """One round of a search for lottery tickets.

    Attributes:
        round: how often the masks have been pruned, from 0.
        masks: the masks that this round trained with.
        trained: the parameters after training; its off-mask weights are not looked at.
    """

    round: int
    masks: Any
    trained: Any


def rewind(params, masks):
    """Sets parameters back to an earlier state, keeping only the ticket: exactly theta_k on the mask and 0 off it.

    With freshly initialized parameters instead of theta_k it makes the re-initialization control.

    Args:
        params: the parameters at step k (k = 0 for the original lottery tickets).
        masks: bool masks, `optax.MaskedNode()` where dense; dense leaves are returned as they are.

    Returns:
        A tree like `params`.

    Example:
        >>> import jax.numpy as jnp
        >>> rewind({"w": jnp.array([[1.0, -2.0]])}, {"w": jnp.array([[False, True]])})["w"].tolist()
        [[0.0, -2.0]]
    """
    kept = dict(named_leaves(masks))
    unknown = set(kept) - {path for path, _ in named_leaves(params)}
    if unknown:
        raise ValueError(f"masks has leaves that params lacks: {sorted(unknown)}")
    return map_with_names(lambda path, p: jnp.where(kept[path], p, jnp.zeros_like(p)) if path in kept else p, params)


def lottery_ticket(
    train: Callable,
    params,
    *,
    rounds: int,
    rate: float = 0.2,
    rules=None,
    structure=Unstructured(),
    distribution: Callable = global_,
    masks=None,
) -> Iterator[Ticket]:
    """Searches lottery tickets by iterative magnitude pruning with rewinding.

    Round 0 trains the dense network. After each round the fraction `rate` of the weights that remain, those that ended
    smallest, is pruned: exactly ceil(rate * remaining). All parameters, dense leaves included, go back to `params`, and
    `train` starts afresh, with a fresh optimizer state. After n rounds the density is about (1 - rate)^n; masks are
    nested.

    To rewind to step k > 0, let `params` be those of step k and let `train` go on from k in schedule and data order.

    Args:
        train: `train(params, masks, round) -> trained params`. `params` are already rewound and exactly masked; it must
            keep them masked, for instance by `sparsify(optimizer, from_masks(masks))`.
        params: theta_k, the parameters that every round starts from.
        rounds: how many times to prune; `rounds + 1` trainings in all.
        rate: fraction of the remaining weights pruned after a round, counted exactly as written.
        rules: which leaves are sparse, as in `sparsify`.
        structure: what is pruned together; `rate` then counts its units.
        distribution: shares `rate` out over layers. `global_` prunes `rate` of all that remains under one threshold;
            `uniform` prunes `rate` in every layer; `layerwise({"head/*": 0.1, ...}, default=uniform)` gives layers
            rates of their own, as the original has for its output layer. A layer with a rate of its own keeps at least
            one unit.
        masks: masks to start from instead of dense ones, such as those of an interrupted search.

    Returns:
        An iterator over `Ticket`s, of rounds 0 to `rounds`; each training starts when its ticket is asked for.

    Raises:
        ValueError: `rounds` below 1, a rate outside (0, 1), a structure or rule that fixes a sparsity; a trained tree
            that has other leaves than `params`, or weights that are not finite.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"w": jnp.arange(1.0, 26.0).reshape(5, 5)}
        >>> tickets = lottery_ticket(lambda params, masks, round: params, params, rounds=3)
        >>> [(ticket.round, int(ticket.masks["w"].sum())) for ticket in tickets]
        [(0, 25), (1, 20), (2, 16), (3, 12)]

    References:
        Frankle & Carbin, The Lottery Ticket Hypothesis, 2019 (https://arxiv.org/abs/1803.03635); Frankle et al.,
        Stabilizing the Lottery Ticket Hypothesis, 2019 (https://arxiv.org/abs/1903.01611)
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; tickets need 1 or more rounds of pruning")
    if exact_fraction(rate) == 0:
        raise ValueError("rate is 0, so nothing would ever be pruned; the fraction pruned in a round is in (0, 1)")
    plan = resolve(params, rules, structure)
    rates = _layer_rates(plan, distribution, rate)
    views = unit_views(plan)
    if masks is None:
        units = all_units(views, dict(named_leaves(params)))
    else:
        given = _leaves_like("masks", masks, sparse_leaves(params, plan))
        units = {path: view.active(given[path]) for path, view in views.items()}

    def search(units) -> Iterator[Ticket]:
        for number in range(rounds + 1):
            masks = spread_masks(params, views, units)
            trained = train(rewind(params, masks), masks, number)
            weights = _leaves_like("train(...)", trained, sparse_leaves(params, plan))
            for path, weight in weights.items():
                if not bool(jnp.all(jnp.isfinite(weight))):
                    raise ValueError(f"round {number}: {path} is not finite after training, so it cannot be pruned")
            yield Ticket(number, masks, trained)
            if number < rounds:
                scores = {path: view.pool(jnp.abs(weights[path])) for path, view in views.items()}
                units = choose_units(views, _after_pruning(views, units, rates, rate), scores, units)

    return search(units)


def _layer_rates(plan: tuple[LeafPlan, ...], distribution, rate) -> dict:
    """`{path: exact rates, one for each layer in the leaf, or None for the common pool}`."""
    sparse = [leaf for leaf in plan if leaf.structure is not None]
    for leaf in sparse:
        if leaf.sparsity is not None or leaf.structure.fixed_density is not None:
            fixed = f"a rule's sparsity {leaf.sparsity}" if leaf.sparsity is not None else str(leaf.structure)
            raise ValueError(
                f"{leaf.path}: {fixed} fixes the sparsity, but tickets are pruned by a rate; give layers rates of "
                "their own by distribution=layerwise({...}), and use an unstructured, block or channel structure"
            )
    shares = distribution({name: shape for leaf in sparse for name, shape in leaf.layer_shapes.items()}, rate)
    rates = {}
    for leaf in sparse:
        own = [shares[name] for name in leaf.layer_shapes]
        rates[leaf.path] = None if own[0] is None else [exact_fraction(share) for share in own]
    return rates


def _after_pruning(views, units, rates, rate) -> Counts:
    layers, pool, pooled = {}, [], 0
    for path, view in views.items():
        remaining = np.asarray(view.count(units[path]))
        if rates[path] is None:
            pool.append(path)
            pooled += int(remaining.sum())
            continue
        kept = [
            max(1, int(n) - math.ceil(share * int(n))) if n else 0
            for n, share in zip(remaining.reshape(-1), rates[path], strict=True)
        ]
        layers[path] = np.array(kept, np.int32).reshape(remaining.shape) if view.batch else kept[0]
    if pool:
        pooled -= math.ceil(exact_fraction(rate) * pooled)
    return Counts(layers, pooled if pool else None, tuple(pool))


def _leaves_like(name: str, tree, leaves: dict) -> dict:
    """The leaves of `tree` that `leaves` names, checked to have their shapes."""
    found = dict(named_leaves(tree))
    for path, leaf in leaves.items():
        shape = jnp.shape(found[path]) if path in found else None
        if shape != jnp.shape(leaf):
            has = "no such leaf" if shape is None else f"shape {shape}"
            raise ValueError(f"{path}: {name} has {has} where params has shape {jnp.shape(leaf)}")
    return {path: found[path] for path in leaves}
