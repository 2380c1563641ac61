"""Exact zeros whatever optimizer is inside and whatever wrapper is outside, and every kind of tree."""

import chex
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax.masks.distributions import uniform
from sparsejax.topology.dynamic import rigl, set_, static
from sparsejax.topology.latent import nm, sr_ste
from sparsejax.topology.magnitude import gradual
from sparsejax.transforms.access import check, masks_of, sparsify_states
from sparsejax.transforms.sparsify import sparsify
from tests.problems import PRESETS, exact_params, mixed_params, mlp_params, nnz, off_mask, quick_jit, small_params

MATRIX = {
    "rigl": lambda: rigl(0.75, update_every=2, stop=7, distribution=uniform),
    "gradual": lambda: gradual(0.75, begin=1, end=5, update_every=2),
    "sr_ste": lambda: sr_ste(2, 4),
}


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
    ("algorithm", "dtype", "grad_dtype"),
    [
        ("rigl", "bfloat16", None),
        ("rigl", "float32", "bfloat16"),
        ("rigl", "bfloat16", "float32"),
        ("sr_ste", "bfloat16", None),
    ],
)
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
        tx = sparsify(optax.sgd(0.25), PRESETS[name].make(plain))
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
