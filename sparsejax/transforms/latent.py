"""The step of algorithms that keep dense weights under the mask: the user's parameters are a view of those."""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import optax

from sparsejax.masks.counts import exact_fraction
from sparsejax.masks.rules import resolve
from sparsejax.masks.sequence import run_if
from sparsejax.topology.algorithm import Algorithm
from sparsejax.topology.engine import move_masks, start_masks
from sparsejax.transforms.tree import count_leaks, map_sparse, no_leaf


def merge_latent(params, latent):
    """The parameters with the dense weights in place of their view."""
    return map_sparse(lambda dense, _: dense, latent, params)


def init_latent(algorithm: Algorithm, rules, plan, params):
    """Masks, dense weights and data before the first step.

    Returns:
        `(masks, latent, data)`; `latent` holds fresh copies, so that state and parameters can be donated together.
    """
    data = {} if algorithm.memory is None else {"memory": algorithm.memory.init(params)}
    first = _at_stage(algorithm, 0)
    first = dataclasses.replace(first, start=algorithm.start or algorithm.drop)
    masks = start_masks(first, _plan(algorithm, first, rules, plan, params), params, data.get("memory"))
    latent = map_sparse(lambda m, p: _copy(p), masks, params, dense=no_leaf)
    if algorithm.backward_sparsity is not None:
        data["trainable"] = start_masks(*_trained_set(first, plan), params, data.get("memory"))
    if algorithm.softness is not None:
        data["softness"] = jnp.asarray(algorithm.softness(0), jnp.float32)
    return masks, latent, data


def update_latent(algorithm: Algorithm, rules, plan, inner, grads, state, params, extra):
    """One step: train the dense weights, choose masks from them, and emit the way to the new view.

    Returns:
        `(updates, masks, inner_state, latent, data, leaks)`.
    """
    dense = merge_latent(params, state.latent)
    data = dict(state.data)
    known = {name: data[name] for name in ("trainable", "softness") if name in data}
    felt = grads
    if algorithm.gradient is None:
        felt = map_sparse(lambda m, g: jnp.where(m, g, jnp.zeros_like(g)), state.masks, grads)
    updates, inner_state = inner.update(felt, state.inner_state, dense, **{**extra, **known, "masks": state.masks})
    if "trainable" in data:
        updates = map_sparse(lambda t, u: jnp.where(t, u, jnp.zeros_like(u)), data["trainable"], updates)
    if algorithm.memory is not None:
        data["memory"] = algorithm.memory.update(data["memory"], dense, grads, state.masks, state.mask_step)
    dense = optax.apply_updates(dense, updates)
    step = optax.safe_increment(state.mask_step)

    def move():
        masks = _choose(algorithm, rules, plan, dense, grads, state.masks, data.get("memory"), step)
        trainable = data.get("trainable")
        if trainable is not None:
            trained = _trained_set(algorithm, plan)
            trainable = move_masks(*trained, dense, grads, trainable, data.get("memory"), step)
        view_is_exact = (state.mask_step > 0) & (data.get("softness", 0.0) == 0)
        return masks, trainable, jnp.where(view_is_exact, count_leaks(params, state.masks), 0)

    def stay():
        return state.masks, data.get("trainable"), jnp.zeros([], jnp.int32)

    if algorithm.steps.every == 1 and algorithm.steps.begin <= 1 and algorithm.steps.end is None:
        masks, trainable, leaks = move()
    else:
        masks, trainable, leaks = run_if(algorithm.steps.due(step), move, stay)
    if trainable is not None:
        data["trainable"] = trainable
    softness = None
    if algorithm.softness is not None:
        softness = data["softness"] = jnp.asarray(algorithm.softness(step), jnp.float32)
    emitted = jax.tree.map(
        lambda mask, p, w, u: u if isinstance(mask, optax.MaskedNode) else _to_view(mask, p, w, softness),
        masks,
        params,
        dense,
        updates,
        is_leaf=lambda value: isinstance(value, optax.MaskedNode),
    )
    latent = map_sparse(lambda m, w: w, masks, dense, dense=no_leaf)
    return emitted, masks, inner_state, latent, data, leaks


def _trained_set(algorithm: Algorithm, plan):
    """Algorithm and plan of the larger set of weights that are trained; N:M groups keep more than n of it."""
    density = 1 - exact_fraction(algorithm.backward_sparsity)

    def widen(leaf):
        if leaf.structure is None or leaf.structure.fixed_density is None:
            return leaf
        n = max(leaf.structure.n, math.ceil((density - Fraction(1, 1_000_000)) * leaf.structure.m))
        return dataclasses.replace(leaf, structure=dataclasses.replace(leaf.structure, n=n))

    return dataclasses.replace(algorithm, sparsity=algorithm.backward_sparsity), tuple(map(widen, plan))


def _to_view(mask, p, dense, softness):
    if softness is None:
        return jnp.where(mask, dense - p, -p)
    faded = jnp.where(softness > 0, softness.astype(dense.dtype) * dense, jnp.zeros_like(dense))
    return jnp.where(mask, dense - p, faded - p)


def _at_stage(algorithm: Algorithm, index: int) -> Algorithm:
    return dataclasses.replace(algorithm, structure=algorithm.stages[index][1]) if algorithm.stages else algorithm


def _plan(algorithm, staged, rules, plan, params):
    return plan if staged is algorithm else resolve(params, rules, staged.structure)


def _choose(algorithm: Algorithm, rules, plan, dense, grads, masks, memory, step):
    if not algorithm.stages:
        return move_masks(algorithm, plan, dense, grads, masks, memory, step)

    def choose_at(index):
        staged = _at_stage(algorithm, index)
        staged_plan = _plan(algorithm, staged, rules, plan, dense)
        return lambda: move_masks(staged, staged_plan, dense, grads, masks, memory, step)

    stage = sum((step >= first).astype(jnp.int32) for first, _ in algorithm.stages[1:])
    branches = [choose_at(index) for index in range(len(algorithm.stages))]
    return jax.lax.switch(stage, branches) if isinstance(stage, jax.core.Tracer) else branches[int(stage)]()


def _copy(p):
    return jnp.zeros_like(p) if isinstance(p, jax.ShapeDtypeStruct) else jnp.array(p, copy=True)
