"""What every preset owes an optax user, at least as strict as optax's own suite for its optimizers."""

import functools

import chex
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax.masks.distributions import uniform
from sparsejax.masks.paths import named_leaves
from sparsejax.topology.dynamic import rigl, set_, static
from sparsejax.topology.latent import nm, sr_ste
from sparsejax.topology.magnitude import gradual
from sparsejax.transforms.access import check, masks_of, sparsify_states
from sparsejax.transforms.sparsify import sparsify
from tests.problems import (
    LATENT,
    PRESETS,
    STEPS,
    exact_grads,
    exact_params,
    mixed_params,
    mlp_params,
    regression_data,
    regression_loss,
)

# Tiny programs, many of them: what the compiler saves in time is more than they take.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
every_preset = pytest.mark.parametrize("name", PRESETS)


def preset(name, inner, params):
    return sparsify(inner, PRESETS[name].make(params))


def off_mask(params, masks):
    """Bits of everything off the masks: 0 only for +0.0."""
    found = 0
    for path, mask in named_leaves(masks):
        off = np.asarray(dict(named_leaves(params))[path])[~np.asarray(mask)]
        found += int(np.count_nonzero(off.view(np.uint8)))
    return found


def nnz(masks):
    return {path: int(np.sum(mask)) for path, mask in named_leaves(masks)}


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


MATRIX = {
    "rigl": lambda: rigl(0.75, update_every=2, stop=7, distribution=uniform),
    "gradual": lambda: gradual(0.75, begin=1, end=5, update_every=2),
    "sr_ste": lambda: sr_ste(2, 4),
}


def typed(leaf):
    return leaf.shape, leaf.dtype, leaf.weak_type


def small_params(dtype=jnp.float32):
    kernel = jax.random.normal(jax.random.key(0), (8, 8)) / 3
    return {"kernel": kernel.astype(dtype), "bias": jnp.ones(8, dtype)}


def labels(params):
    return {"kernel": "sparse", "bias": "dense"}


INNER = {
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "sgd_momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "lion": lambda: optax.lion(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "muon": lambda: optax.contrib.muon(1e-2),
    "rmsprop": lambda: optax.rmsprop(1e-2),
    "lamb": lambda: optax.lamb(1e-2),
    "nadam": lambda: optax.nadam(1e-2),
    "ademamix": lambda: optax.contrib.ademamix(1e-2),
    "clip_and_decay": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, mask=decayed)),
    "schedule": lambda: optax.adam(optax.linear_schedule(1e-2, 1e-3, 5)),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 2),
    "partition": lambda: optax.partition({"sparse": optax.adam(1e-2), "dense": optax.sgd(1e-2)}, labels),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(optax.linear_schedule(1e-2, 1e-3, 5)),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2, warmup_steps=2),
    "mechanize": lambda: optax.contrib.mechanize(optax.adam(1e-2)),
    "lbfgs": lambda: optax.lbfgs(1e-2, linesearch=None),
    "sam": lambda: optax.contrib.sam(optax.sgd(1e-2), optax.sgd(1e-2), sync_period=2),
    "prodigy": lambda: optax.contrib.prodigy(1e-2),
}


def decayed(params):
    return {"kernel": True, "bias": False}


OUTER = {
    "multi_steps": lambda make: optax.MultiSteps(make(), 2).gradient_transformation(),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(), 2),
    "masked": lambda make: optax.masked(make(), {"kernel": True, "bias": False}),
    "partition": lambda make: optax.partition({"sparse": make(), "dense": optax.sgd(1e-2)}, labels),
    "named_chain": lambda make: optax.named_chain(("sparse", make()), ("seen", optax.snapshot("updates", lambda u: u))),
    "conditionally_mask": lambda make: optax.transforms.conditionally_mask(make(), lambda step: step % 2 == 0),
    "keep_params_nonnegative": lambda make: optax.chain(make(), optax.keep_params_nonnegative()),
}


def check_matrix_cell(tx, dtype=jnp.float32, grad_dtype=None, steps=8):
    """Trains a quadratic; looks at zeros, counts and types after every step."""
    params = small_params(dtype)
    state = tx.init(params)

    @quick_jit
    def step(params, state, t):
        grads = jax.tree.map(lambda p: 0.5 * p - 0.1 * t * jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)
        grads = jax.tree.map(lambda g: g.astype(grad_dtype or dtype), grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    types = jax.tree.map(jax.typeof, (params, state))
    before = params
    for t in range(steps):
        params, state = step(params, state, jnp.float32(t))
        if grad_dtype is None:
            assert jax.tree.map(jax.typeof, (params, state)) == types
        [sparse] = sparsify_states(state)
        if sparse.mask_step > 0:
            assert off_mask(params, sparse.masks) == 0
            assert list(nnz(sparse.masks).values()) == sparse.targets.tolist()
        assert sparse.leaks == 0
        assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(params))
    assert (before["kernel"] != params["kernel"]).any()
    assert sparse.targets.tolist() in ([16], [32])
    return params, state


@pytest.mark.parametrize("algorithm", MATRIX)
@pytest.mark.parametrize("inner", INNER)
def test_zeros_are_exact_with_any_optimizer_inside(inner, algorithm):
    check_matrix_cell(sparsify(INNER[inner](), MATRIX[algorithm]()))


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [("bfloat16", None), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
@pytest.mark.parametrize("algorithm", ["rigl", "sr_ste"])
@pytest.mark.parametrize("inner", ["adam", "adamw", "sgd_momentum", "lion", "adafactor", "muon"])
def test_zeros_are_exact_in_every_dtype(inner, algorithm, dtype, grad_dtype):
    check_matrix_cell(sparsify(INNER[inner](), MATRIX[algorithm]()), dtype, grad_dtype)


@pytest.mark.parametrize("algorithm", MATRIX)
@pytest.mark.parametrize("outer", OUTER)
def test_zeros_are_exact_under_any_wrapper_that_gates_whole_steps(outer, algorithm):
    check_matrix_cell(OUTER[outer](lambda: sparsify(optax.adam(1e-2), MATRIX[algorithm]())), steps=16)


@pytest.mark.parametrize("outer", OUTER)
def test_zeros_are_exact_under_any_wrapper_in_bfloat16(outer):
    check_matrix_cell(OUTER[outer](lambda: sparsify(optax.sgd(1e-2), MATRIX["rigl"]())), jnp.bfloat16, steps=16)


def test_a_schedule_of_the_sparsity_can_be_injected():
    @optax.inject_hyperparams
    def build(sparsity, learning_rate):
        return sparsify(optax.adam(learning_rate), rigl(sparsity, distribution=uniform, update_every=2, stop=9))

    params = small_params()
    tx = build(sparsity=lambda step: 0.5 + 0.25 * (step >= 4), learning_rate=1e-2)
    state = tx.init(params)
    step = quick_jit(chex.assert_max_traces(lambda p, s: tx.update(p, s, p), n=1))
    kept = []
    for _ in range(8):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
        assert off_mask(params, masks_of(state)) == 0
        kept.append(nnz(masks_of(state))["kernel"])
    assert kept == [32] * 4 + [16] * 4
    np.testing.assert_allclose(state.hyperparams["sparsity"], 0.75)


def test_two_groups_can_be_sparse_in_different_ways():
    params = mlp_params()
    tx = optax.partition(
        {
            "first": sparsify(optax.adam(1e-2), rigl(0.75, update_every=2, distribution=uniform)),
            "second": sparsify(optax.sgd(1e-2), sr_ste(2, 4)),
        },
        lambda params: {"hidden": "first", "out": "second"},
    )
    state = tx.init(params)
    step = quick_jit(tx.update)
    for _ in range(5):
        updates, state = step(params, state, params)
        params = optax.apply_updates(params, updates)
    masks = masks_of(state)
    assert nnz(masks) == {"hidden/kernel": 64, "out/kernel": 64}
    assert masks["hidden"]["bias"] == optax.MaskedNode()
    assert off_mask(params, masks) == 0
    assert bool((masks["out"]["kernel"].reshape(4, 4, 8).sum(1) == 2).all())
    assert check(params, state).nnz == 128


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


@pytest.mark.parametrize("make", [static, set_, rigl])
def test_vmap_over_seeds_is_a_loop_over_seeds(make):
    params = jax.tree.map(lambda p: jnp.round(p * 16) / 8, small_params())
    options = {} if make is static else {"update_every": 2}

    def run(seed):
        tx = sparsify(optax.sgd(0.25, momentum=0.5), make(0.75, seed=seed, **options))

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=4)[0]

    together = quick_jit(jax.vmap(run))(jnp.arange(3))
    alone = quick_jit(run)
    for seed in range(3):
        chex.assert_trees_all_equal(alone(seed), jax.tree.map(lambda leaf: leaf[seed], together))  # noqa: B023
    kept = together[1].masks["kernel"]
    assert bool((kept[0] != kept[1]).any())
    assert bool((kept[1] != kept[2]).any())


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


def test_leaves_that_cannot_be_sparse_are_left_alone():
    """None, MaskedNode, empty, scalar, integer and complex leaves pass as if sparsify were not there."""
    params = {
        "kernel": jax.random.normal(jax.random.key(0), (8, 8)),
        "none": None,
        "masked": optax.MaskedNode(),
        "empty": jnp.zeros((0, 4)),
        "scalar": jnp.float32(2.0),
        "integers": jnp.arange(16).reshape(4, 4),
        "complex": jnp.ones((4, 4), jnp.complex64),
        "list": [jnp.ones((8, 8)), ()],
    }
    grads = jax.tree.map(jnp.ones_like, params)
    inner = optax.sgd(0.5, momentum=0.5)
    for name, make in MATRIX.items():
        tx = sparsify(inner, make(), rules={"empty": None})
        state, plain = tx.init(params), inner.init(params)
        chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, params), state)
        now = params
        for _ in range(2):  # at step 2 RigL takes no step
            updates, state = tx.update(grads, state, now)
            expected, plain = inner.update(grads, plain, now)
            now = optax.apply_updates(now, updates)
            for leaf in ("none", "masked", "empty", "scalar", "integers", "complex"):
                chex.assert_trees_all_equal(updates[leaf], expected[leaf])
        masks = masks_of(state)
        assert set(nnz(masks)) == {"kernel", "list/0"}, name
        assert off_mask(now, masks) == 0


@pytest.mark.parametrize("name", ["gradual", "movement"])
def test_trees_of_any_kind_give_the_same_masks(name):
    plain = exact_params()
    kinds = plain, flax.core.freeze(plain), [tuple(layer[leaf] for leaf in sorted(layer)) for layer in plain.values()]
    results = []
    for params in kinds:
        tx = preset(name, optax.sgd(0.25), plain)
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
        results.append(jax.tree.leaves((params, masks_of(state))))
    for result in results[1:]:
        chex.assert_trees_all_equal(result, results[0])


def test_every_kind_of_kernel_trains_with_its_own_axes():
    """Convolutions, attention and stacked layers: exact counts, and N:M groups along the inputs."""
    params = mixed_params()
    tx = sparsify(optax.adam(1e-2), rigl(0.75, update_every=1), rules={"norm/*": None})
    state = quick_jit(tx.init)(params)
    started, now = nnz(state.masks), params
    step = quick_jit(tx.update)
    for _ in range(2):
        updates, state = step(now, state, now)
        now = optax.apply_updates(now, updates)
    assert nnz(state.masks) == started
    assert off_mask(now, state.masks) == 0
    assert set(started) == {
        "conv/kernel", "attention/query/kernel", "attention/out/kernel", "blocks/query/kernel", "blocks/out/kernel",
        "head/kernel",
    }  # fmt: skip
    tx = sparsify(optax.adam(1e-2), nm(2, 4))
    masks = quick_jit(lambda params: tx.update(params, tx.init(params), params)[1].masks)(params)
    assert bool((masks["conv"]["kernel"].sum(2) == 2).all())
    assert bool((masks["attention"]["query"]["kernel"].reshape(2, 4, 2, 4).sum(1) == 2).all())
    assert bool((masks["attention"]["out"]["kernel"].reshape(2, 4, 8).sum(1) == 2).all())
    assert bool((masks["blocks"]["query"]["kernel"].reshape(3, 2, 4, 2, 4).sum(2) == 2).all())
    assert bool((masks["blocks"]["out"]["kernel"].sum(2) == 2).all())
