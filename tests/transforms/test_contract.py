"""What every preset owes an optax user, at least as strict as optax's own suite for its optimizers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax.transforms.access import masks_of
from sparsejax.transforms.sparsify import sparsify
from tests.problems import (
    LATENT,
    PRESETS,
    STEPS,
    exact_grads,
    exact_params,
    mlp_params,
    nnz,
    off_mask,
    quick_jit,
    regression_data,
    regression_loss,
    typed,
)

every_preset = pytest.mark.parametrize("name", PRESETS)


def preset(name, inner, params):
    return sparsify(inner, PRESETS[name].make(params))


@functools.lru_cache
def trained(name):
    """Trains the regression once with params and state donated; the rest of this file looks at what came out."""
    params = mlp_params()
    tx = preset(name, optax.adamw(2e-2, weight_decay=1e-3), params)
    state = tx.init(params)
    data = regression_data()
    chex.clear_trace_counter()

    @functools.partial(quick_jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(n=1)
    def step(params, state):
        loss, grads = jax.value_and_grad(regression_loss)(params, *data)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    types = jax.tree.map(jax.typeof, (params, state))
    history, losses = [], []
    for t in range(80):
        before = params, state
        params, state, loss = step(params, state)
        losses.append(float(loss))
        if t < STEPS:
            assert jax.tree.map(jax.typeof, (params, state)) == types
            given = before[0], before[1].inner_state, before[1].latent  # what no step reads is not donated
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
            history.append(jax.tree.map(lambda leaf: np.array(leaf, copy=True), (params, state)))
    return history, losses


@every_preset
def test_pruned_weights_are_exactly_zero_after_every_step(name):
    for params, state in trained(name)[0]:
        if float(state.data.get("softness", 0)) == 0:
            assert off_mask(params, state.masks) == 0


@every_preset
def test_masks_keep_exactly_what_they_should(name):
    for t, (_, state) in enumerate(trained(name)[0]):
        expected = PRESETS[name].counts(t)
        found = nnz(state.masks)
        assert (found if isinstance(expected, dict) else sum(found.values())) == expected, t
        assert list(found.values()) == state.targets.tolist()


@every_preset
def test_nothing_leaks_and_steps_are_counted(name):
    for t, (_, state) in enumerate(trained(name)[0]):
        assert state.leaks == 0
        assert state.mask_step == t + 1


@every_preset
def test_converges(name):
    losses = trained(name)[1]
    assert min(losses[-5:]) < 0.5 * losses[0]


@every_preset
def test_eager_and_scanned_steps_agree_bit_for_bit(name):
    # Eighths and quarters: no sum or product is rounded, so that no fusion of operations may show.
    params, grads = exact_params(), exact_grads()
    tx = preset(name, optax.sgd(0.25, momentum=0.5), params)

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state.masks)

    _, scanned = quick_jit(lambda carry: jax.lax.scan(step, carry, grads))((params, tx.init(params)))
    carry = params, tx.init(params)
    for t in range(STEPS):
        carry, seen = step(carry, jax.tree.map(lambda g: g[t], grads))  # noqa: B023
        chex.assert_trees_all_equal(seen, jax.tree.map(lambda leaf: leaf[t], scanned))  # noqa: B023


@every_preset
def test_unknown_extra_arguments_are_accepted_and_types_are_kept(name):
    """Updates have the parameters' dtype, the state its own: in all floating dtypes, also out of `lax.cond`."""
    with jax.enable_x64(True):
        for dtype in (jnp.bfloat16, jnp.float16, jnp.float64):  # float32 is what `trained` looks at
            params = mlp_params(dtype)
            tx = preset(name, optax.adam(1e-2), params)

            def step(params, state):
                update = lambda: tx.update(params, state, params, loss=1.0, unknown=2)  # noqa: B023, E731
                return jax.lax.cond(True, update, lambda: (params, state))

            state = jax.eval_shape(tx.init, params)
            assert jax.tree.map(typed, jax.eval_shape(step, params, state)) == jax.tree.map(typed, (params, state))


@pytest.mark.parametrize("name", ["rigl", "gradual", "static", "granet_sparse", *LATENT])
def test_updates_are_never_narrower_than_parameters(name):
    params = mlp_params()
    tx = preset(name, optax.sgd(1e-2), params)
    grads = mlp_params(jnp.bfloat16)
    updates, _ = jax.eval_shape(lambda g, p: tx.update(g, tx.init(p), p), grads, params)
    assert updates["out"]["kernel"].dtype == jnp.float32


@every_preset
def test_init_needs_only_shapes(name):
    params = mlp_params()
    tx = preset(name, optax.adamw(1e-2), params)
    state = tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, params), state)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    abstract = tx.init(shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, state)
    chex.assert_trees_all_equal_structs(abstract, state)


@every_preset
def test_init_makes_fresh_buffers(name):
    params = mlp_params()
    state = preset(name, optax.adamw(1e-2), params).init(params)
    addresses = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, state)) if leaf.size]
    assert len(set(addresses)) == len(addresses)


@every_preset
def test_map_params_finds_what_is_shaped_like_parameters(name):
    params = mlp_params()
    tx = preset(name, optax.adamw(1e-2), params)
    state = tx.init(params)
    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda leaf: leaf, state), state)
    found = []
    optax.tree.map_params(tx, lambda leaf: found.append(leaf.shape), state)
    assert set(found) == {leaf.shape for leaf in jax.tree.leaves(params)}
    assert len(found) >= 3 * len(jax.tree.leaves(params)) - 2  # masks of two leaves, moments of four


@pytest.mark.parametrize("name", ["static", "gradual", "rigl", "sr_ste", "movement"])
def test_a_micro_step_emits_exact_zeros(name):
    params = exact_params()
    tx = optax.MultiSteps(preset(name, optax.adam(1e-2), params), 2)
    state = tx.init(params)
    updates, after = tx.update(params, state, params)
    assert all(not np.asarray(u).any() for u in jax.tree.leaves(updates))
    chex.assert_trees_all_equal(after.inner_opt_state, state.inner_opt_state)


@pytest.mark.parametrize("name", ["rigl", "gradual", "sr_ste"])
def test_accumulated_gradients_move_masks_like_their_mean(name):
    """Outside, `MultiSteps` delivers the mean gradient: masks and weights are those of the large batch."""
    params, grads = exact_params(), exact_grads(12)
    single = preset(name, optax.sgd(0.25), params)
    multi = optax.MultiSteps(preset(name, optax.sgd(0.25), params), 2)

    def mean_step(carry, t):
        params, state = carry
        pair = jax.tree.map(lambda g: (g[2 * t] + g[2 * t + 1]) / 2, grads)
        updates, state = single.update(pair, state, params)
        return (optax.apply_updates(params, updates), state), None

    def micro_step(carry, t):
        params, state = carry
        updates, state = multi.update(jax.tree.map(lambda g: g[t], grads), state, params)
        return (optax.apply_updates(params, updates), state), None

    (large, state), _ = quick_jit(lambda c: jax.lax.scan(mean_step, c, jnp.arange(6)))((params, single.init(params)))
    (small, micro), _ = quick_jit(lambda c: jax.lax.scan(micro_step, c, jnp.arange(12)))((params, multi.init(params)))
    chex.assert_trees_all_equal(masks_of(micro), masks_of(state))
    chex.assert_trees_all_equal(small, large)


@pytest.mark.parametrize("name", ["static", "gradual", "rigl", "sr_ste", "top_kast"])
def test_elements_inside_get_the_masks(name):
    """They get those under which the step is taken: the new ones, or the view's where dense weights are kept."""
    seen = []

    def look(updates, state, params=None, *, masks, **_):
        seen.append(masks)
        return updates, state

    element = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), look)
    params = exact_params()
    tx = preset(name, optax.chain(element, optax.sgd(0.25)), params)
    state = tx.init(params)
    for t in range(3):
        grads = jax.tree.map(lambda g: g[t], exact_grads())  # noqa: B023
        before = state
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        chex.assert_trees_all_equal(seen.pop(), before.masks if name in LATENT else state.masks)
