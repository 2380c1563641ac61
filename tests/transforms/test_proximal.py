"""Proximal steps against their definition as minimizers, and exact zeros that stay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.masks.block import Block
from sparsejax.masks.channel import Channel
from sparsejax.masks.from_params import masks_from_params
from sparsejax.masks.nm import NM
from sparsejax.masks.roles import Roles
from sparsejax.masks.unstructured import Unstructured
from sparsejax.transforms.proximal import group_lasso, proximal_l1
from tests.nets import linen_net, nnx_net, plain_net


def step(element, params, updates=None, state=None, **extra_args):
    updates = jax.tree.map(jnp.zeros_like, params) if updates is None else updates
    updates, state = element.update(updates, element.init(params) if state is None else state, params, **extra_args)
    return optax.apply_updates(params, updates), state


def test_the_example_of_three_and_four():
    params = {"kernel": jnp.array([[3.0], [4.0]])}
    np.testing.assert_array_equal(step(proximal_l1(2.0, 0.5), params)[0]["kernel"], [[2], [3]])
    moved, _ = step(group_lasso(2.0, 0.5, weighted=False), params)
    np.testing.assert_allclose(moved["kernel"], [[2.4], [3.2]], rtol=1e-6)
    moved, _ = step(group_lasso(2.0, 0.5), params)
    np.testing.assert_allclose(moved["kernel"], np.array([[3], [4]]) * (1 - np.sqrt(2) / 5), rtol=1e-6)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), threshold=st.floats(0, 2))
def test_soft_thresholding_minimizes_its_objective(seed, threshold):
    w, u = np.random.default_rng(seed).normal(size=(2, 4, 3)).astype(np.float32)
    moved, _ = step(proximal_l1(threshold, 1.0), {"kernel": jnp.asarray(w)}, {"kernel": jnp.asarray(u)})
    got, v = np.asarray(moved["kernel"], np.float64), (w + u).astype(np.float64)

    def objective(x):
        return 0.5 * (x - v) ** 2 + threshold * np.abs(x)

    for other in (v, np.zeros_like(v), got + 1e-3, got - 1e-3):
        assert (objective(got) <= objective(other) + 1e-6).all()
    assert ((got == 0) == (np.abs(w + u) <= np.float32(threshold))).all()


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), threshold=st.floats(0, 1), weighted=st.booleans())
@pytest.mark.parametrize("structure", [Channel(), Channel(axis=-2), Block((2, 2)), Block((3, 2), pooling="max")])
def test_group_shrinkage_is_the_formula(structure, seed, threshold, weighted):
    v = np.random.default_rng(seed).normal(size=(5, 4)).astype(np.float32)
    element = group_lasso(threshold, 1.0, structure=structure, weighted=weighted)
    moved, _ = step(element, {"kernel": jnp.asarray(v)})
    rows, columns = structure.shape if isinstance(structure, Block) else (5, 1) if structure.axis == -1 else (1, 4)
    for i in range(0, 5, rows):
        for j in range(0, 4, columns):
            group = v[i : i + rows, j : j + columns].astype(np.float64)
            limit = threshold * (np.sqrt(group.size) if weighted else 1)
            expected = group * max(0, 1 - limit / np.linalg.norm(group))
            got = np.asarray(moved["kernel"])[i : i + rows, j : j + columns]
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
            assert (got == 0).all() or not (got == 0).any()


def test_single_elements_as_groups_are_soft_thresholding():
    params = {"kernel": jax.random.normal(jax.random.key(0), (6, 5))}
    one, _ = step(proximal_l1(0.7, 1.0), params)
    other, _ = step(group_lasso(0.7, 1.0, structure=Unstructured()), params)
    np.testing.assert_allclose(one["kernel"], other["kernel"], atol=1e-6)
    np.testing.assert_array_equal(one["kernel"] == 0, other["kernel"] == 0)


@pytest.mark.parametrize("grad_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_zeros_are_exact_in_every_dtype(dtype, grad_dtype):
    params = {"kernel": jax.random.normal(jax.random.key(0), (64, 8), dtype) * jnp.arange(1, 9, dtype=dtype) / 8}
    updates = {"kernel": jax.random.normal(jax.random.key(1), (64, 8), grad_dtype) / 8}
    total = np.asarray(params["kernel"] + updates["kernel"], np.float32)
    for element, small in (
        (proximal_l1(0.3, 1.0), np.abs(total) <= np.float32(0.3)),
        (group_lasso(4.0, 1.0, weighted=False), np.broadcast_to(np.linalg.norm(total, axis=0) <= 4, total.shape)),
    ):
        moved, _ = step(element, params, updates)
        assert moved["kernel"].dtype == dtype
        zero = np.asarray(moved["kernel"] == 0)
        np.testing.assert_array_equal(zero, small)
        assert zero.any()
        assert not zero.all()
        assert not np.signbit(np.asarray(moved["kernel"], np.float32))[zero].any()


def test_zeros_stay_and_adam_with_l1_finds_the_sparse_regressor():
    rng = np.random.default_rng(0)
    truth = np.zeros((30, 1), np.float32)
    truth[[3, 11, 20]] = [[2.0], [-1.5], [1.0]]
    x = rng.normal(size=(200, 30)).astype(np.float32)
    params = {"kernel": jnp.zeros((30, 1))}
    optimizer = optax.chain(optax.sgd(0.1), proximal_l1(0.1, 0.1))

    @jax.jit
    def train(params, state):
        grads = jax.grad(lambda p: 0.5 * jnp.mean((x @ p["kernel"] - x @ truth) ** 2))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(200):
        params, state = train(params, state)
    assert masks_from_params(params)["kernel"].reshape(-1).nonzero()[0].tolist() == [3, 11, 20]


def test_schedule_is_read_at_the_number_of_updates():
    params = {"kernel": jnp.full((2, 2), 10.0)}
    element = proximal_l1(1.0, optax.piecewise_constant_schedule(1.0, {2: 2.0}))
    state, seen = None, []
    for _ in range(4):
        params, state = step(element, params, state=state)
        seen.append(float(params["kernel"][0, 0]))
    assert seen == [9, 8, 6, 4]
    assert int(state.proximal_step) == 4


def test_only_sparse_leaves_shrink():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "head": {"kernel": jnp.ones((2, 2))}}
    for make in (proximal_l1, group_lasso):
        moved, _ = step(make(0.25, 1.0, rules={"head/*": None}), params)
        assert [float(leaf.min()) < 1 for leaf in jax.tree.leaves(moved)] == [False, False, True]
        masks = {"kernel": optax.MaskedNode(), "bias": optax.MaskedNode(), "head": {"kernel": jnp.ones((2, 2), bool)}}
        moved, _ = step(make(0.25, 1.0), params, masks=masks)
        assert [float(leaf.min()) < 1 for leaf in jax.tree.leaves(moved)] == [False, True, False]


def test_groups_of_attention_kernels_and_stacked_layers_follow_their_roles():
    v = np.random.default_rng(0).normal(size=(3, 4, 2, 5)).astype(np.float32)
    rules = {"stack": Roles(batch_axes=(0,), in_axes=(1,), out_axes=(2, 3))}
    moved, _ = step(group_lasso(1.1, 1.0, weighted=False, rules=rules), {"stack": jnp.asarray(v)})
    norms = np.linalg.norm(v, axis=1, keepdims=True)
    assert (norms < 1.1).any()
    expected = v * np.maximum(0, 1 - 1.1 / norms)
    np.testing.assert_allclose(moved["stack"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make_net", [nnx_net, linen_net, plain_net])
@pytest.mark.parametrize("make", [proximal_l1, group_lasso])
def test_flax_and_plain_models(make_net, make):
    _, params = make_net()
    params = jax.tree.map(lambda p: p.at[:, 0].multiply(1e-3) if p.ndim == 2 else p, params)
    optimizer = optax.chain(optax.adam(1e-2), make(10.0, 1e-2))
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(2):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    for mask in jax.tree.leaves(masks_from_params(params)):
        assert not mask[:, 0].any()
        assert mask[:, 1:].any()


@pytest.mark.parametrize("make", [proximal_l1, group_lasso])
def test_bad_input(make):
    params = {"layer": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(ValueError, match="strength is -1"):
        make(-1.0, 0.1)
    with pytest.raises(ValueError, match="learning_rate is nan"):
        make(1.0, float("nan"))
    element = make(1.0, 0.1)
    with pytest.raises(ValueError, match="pass `params`"):
        element.update(params, element.init(params))
    with pytest.raises(ValueError, match="matches no leaf"):
        step(make(1.0, 0.1, rules={"nothing": None}), params)


def test_groups_that_are_never_empty_are_refused():
    with pytest.raises(ValueError, match=r"kernel: group_lasso empties whole groups, which NM"):
        step(group_lasso(1.0, 0.1, structure=NM(2, 4)), {"kernel": jnp.ones((4, 4))})
