"""SynFlow: masks found before training and without data. Train them with `from_masks(masks)`."""

import contextlib
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.masks.budget import Counts, count_units, unit_grid
from sparsejax.masks.distributions import global_
from sparsejax.masks.paths import named_leaves
from sparsejax.masks.rules import LeafPlan, resolve
from sparsejax.masks.unstructured import Unstructured
from sparsejax.topology.engine import choose_units
from sparsejax.topology.leaves import all_units, spread_like, spread_masks, unit_views, with_leaves


def synflow(
    apply: Callable,
    params,
    inputs,
    sparsity: float,
    *,
    rounds: int = 100,
    rules=None,
    structure=Unstructured(),
    distribution: Callable = global_,
):
    r"""Prunes before training and without data, in rounds that never empty a layer while another could give.

    Every parameter is replaced by its absolute value and every input by 1. With :math:`R` the sum of the outputs, the
    synaptic flow through a weight is

    .. math:: S_j = \left| \theta_j \frac{\partial R}{\partial \theta_j} \right|

    measured in round :math:`k` of :math:`n` on what is still kept; the round then keeps a fraction
    :math:`d^{k/n}` of all weights, with :math:`d` the final density (where layers have densities of their own, each
    layer by its own). In networks of linear layers, convolutions and ReLUs the flow through every layer is
    :math:`R`, and what flows into a unit flows out of it.

    :math:`R` grows exponentially with depth. Scores are worked out in float32, whatever the dtype of the parameters;
    from the first round on in which :math:`R` leaves the range of float32 they are worked out in float64, which needs
    a model that computes in the dtype of its parameters and inputs.

    Args:
        apply: `apply(params, inputs) -> outputs`, as at evaluation: no dropout, stored statistics in batch norms.
        params: the parameter tree at initialization.
        inputs: arrays, or a pytree of them, of the shapes that `apply` takes; one sample suffices. Floating leaves
            are replaced by ones, integer ones (token ids, positions) are passed as they are.
        sparsity: fraction of zeros in [0, 1), counted exactly as written.
        rounds: how many times to score and prune. The paper uses 100; a single round empties whole layers.
        rules: which leaves are sparse, as in `sparsify`.
        structure: what is kept together; scores are pooled over it.
        distribution: `global_` compares all layers under one threshold, as in the paper.

    Returns:
        A tree like `params` of bool masks, `optax.MaskedNode()` where dense: `from_masks(masks)` trains it.

    Raises:
        ValueError: `rounds` is below 1; :math:`R` is 0 (no path is left through the network), infinite or NaN; rules
            or structure do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"a": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "b": jnp.array([[1.0], [2.0]])}
        >>> masks = synflow(lambda p, x: x @ p["a"] @ p["b"], params, jnp.zeros((1, 2)), 0.5)
        >>> masks["a"].astype(int).tolist(), masks["b"].astype(int).tolist()
        ([[0, 1], [0, 1]], [[0], [1]])

    References:
        Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow, 2020,
        theorems 1-2 and algorithm 1 (https://arxiv.org/abs/2006.05467)
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; SynFlow prunes in 1 or more rounds, 100 in the paper")
    plan = resolve(params, rules, structure)
    views = unit_views(plan)
    units = all_units(views, dict(named_leaves(params)))
    final = count_units(plan, distribution, sparsity)
    flow = jax.jit(_unit_flow(apply, views))
    choose = jax.jit(_chooser(views, final.pool))
    positive, wide = _ones_and_magnitudes(params, inputs, jnp.float32), False
    for k in range(1, rounds + 1):
        with jax.enable_x64(True) if wide else contextlib.nullcontext():
            total, scores = flow(*positive, units)
        if not wide and not _in_range(total):
            wide = True
            with jax.enable_x64(True):
                positive = _ones_and_magnitudes(params, inputs, jnp.float64)
                total, scores = flow(*positive, units)
        if not 0 < float(total) < math.inf:
            raise ValueError(_no_flow(float(total), k, rounds, views, units))
        counts = _on_the_way(final, plan, k / rounds)
        units = choose(scores, counts.layers, counts.pooled, units)
    return spread_masks(params, views, units)


def synaptic_flow(apply: Callable, params, inputs, masks=None) -> dict:
    r"""The synaptic flow :math:`|\theta \, \partial R / \partial \theta|` through every weight; see `synflow`.

    Args:
        apply: `apply(params, inputs) -> outputs`.
        params: the parameter tree.
        inputs: as in `synflow`.
        masks: bool masks of the leaves to score, `optax.MaskedNode()` where dense; None scores every floating leaf.

    Returns:
        `{name: scores}`, float32 (float64 for float64 parameters), of the leaves' shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"a": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "b": jnp.array([[1.0], [2.0]])}
        >>> scores = synaptic_flow(lambda p, x: x @ p["a"] @ p["b"], params, jnp.zeros((1, 2)))
        >>> scores["a"].tolist(), scores["b"].tolist()
        ([[1.0, 4.0], [3.0, 8.0]], [[4.0], [12.0]])
    """
    wide = any(value.dtype == jnp.float64 for _, value in named_leaves(params))
    magnitudes, ones = _ones_and_magnitudes(params, inputs, jnp.float64 if wide else jnp.float32)
    if masks is None:
        floating = [(path, p) for path, p in named_leaves(magnitudes) if jnp.issubdtype(p.dtype, jnp.floating)]
        masks = {path: jnp.ones_like(p, dtype=bool) for path, p in floating}
    return _total_and_flow(apply, magnitudes, ones, dict(named_leaves(masks)))[1]


def _total_and_flow(apply, magnitudes, ones, masks: dict):
    def total_output(weights):
        masked = {path: jnp.where(masks[path], weight, 0) for path, weight in weights.items()}
        outputs = jax.tree.leaves(apply(with_leaves(magnitudes, masked), ones))
        return sum(jnp.sum(output) for output in outputs)

    weights = {path: value for path, value in named_leaves(magnitudes) if path in masks}
    total, gradients = jax.value_and_grad(total_output)(weights)
    return total, {path: jnp.abs(weights[path] * gradients[path]) for path in weights}


def _unit_flow(apply, views):
    """The masked network's summed outputs and pooled scores; scores are relative to their greatest, in float32."""

    def flow(magnitudes, ones, units):
        leaves = dict(named_leaves(magnitudes))
        masks = {path: spread_like(view, units[path], leaves[path]) for path, view in views.items()}
        total, scores = _total_and_flow(apply, magnitudes, ones, masks)
        greatest = jnp.max(jnp.stack([jnp.max(score) for score in scores.values()]))
        pooled = {path: view.pool((scores[path] / greatest).astype(jnp.float32)) for path, view in views.items()}
        # Scores can overflow, or all be 0, where the outputs are in range.
        return jnp.where(jnp.isfinite(greatest), jnp.where(greatest > 0, total, 0), jnp.nan), pooled

    return flow


def _ones_and_magnitudes(params, inputs, dtype):
    def is_floating(x):
        return jnp.issubdtype(jnp.result_type(x), jnp.floating)

    def magnitude(p):
        return jnp.abs(p.astype(dtype)) if is_floating(p) else p

    def one(x):
        return jnp.ones(jnp.shape(x), dtype) if is_floating(x) else x

    return jax.tree.map(magnitude, params), jax.tree.map(one, inputs)


def _in_range(total) -> bool:
    """Whether float32 also holds scores far below the total; below that, and above its range, float64 is needed."""
    return 1e-15 < float(total) < math.inf


def _no_flow(total: float, k: int, rounds: int, views, units) -> str:
    if total == 0:
        emptied = [path for path in views if not bool(jnp.any(units[path]))]
        where = f"; no weight is left in {', '.join(emptied)}" if emptied else ""
        return (
            f"synflow: the outputs are 0 in round {k} of {rounds}, no path is left through the network{where}; use "
            "more rounds, a lower sparsity, or initial weights that are not 0"
        )
    return (
        f"synflow: the sum of the outputs is {total} in round {k} of {rounds}, outside the range of the dtype that the "
        "model computes in; let it compute in the dtype of its parameters and inputs (float64 is tried), or start from "
        "smaller weights"
    )


def _on_the_way(final: Counts, plan: tuple[LeafPlan, ...], progress: float) -> Counts:
    """Counts after a part of the rounds: every count falls exponentially from all units to the final count."""
    sizes = {leaf.path: math.prod(unit_grid(leaf)) for leaf in plan if leaf.structure is not None}

    def between(size, count):
        count = np.asarray(count, np.int64)
        reached = np.rint(size * (count / size) ** progress).astype(np.int64)
        return jnp.asarray(np.maximum(reached, count), jnp.int32)

    layers = {path: between(sizes[path], count) for path, count in final.layers.items()}
    stacked = {leaf.path: len(leaf.layer_shapes) for leaf in plan if leaf.structure is not None}
    everything = sum(sizes[path] * stacked[path] for path in final.pool)
    return Counts(layers, between(everything, final.pooled) if final.pool else None, final.pool)


def _chooser(views, pool):
    def choose(scores, layers, pooled, where):
        return choose_units(views, Counts(layers, pooled, pool), scores, where)

    return choose
