"""Masks found before training and elements that read masks, at work inside `sparsify`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sparsejax
from sparsejax.masks.from_params import masks_from_params
from sparsejax.masks.nm import NM
from sparsejax.masks.paths import named_leaves
from sparsejax.topology.at_init import grasp, snip
from sparsejax.topology.synflow import synflow
from sparsejax.topology.tickets import lottery_ticket, rewind
from sparsejax.transforms.penalties import mask_sparsity_penalty, sr_ste_decay
from sparsejax.transforms.proximal import group_lasso, proximal_l1
from tests.problems import NNXMLP, mlp_apply, mlp_params, regression_data, regression_loss


def loss(params, batch):
    return regression_loss(params, *batch)


def train(optimizer, params, steps=4):
    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params, regression_data())
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def assert_masked(params, masks):
    weights = dict(named_leaves(params))
    for name, mask in named_leaves(masks):
        assert not np.asarray(weights[name])[~np.asarray(mask)].any(), name


FINDERS = {
    "snip": functools.partial(snip, loss),
    "grasp": functools.partial(grasp, loss),
    "synflow": lambda params, batches, sparsity: synflow(mlp_apply, params, batches[0][0], sparsity, rounds=5),
}


@pytest.mark.parametrize("name", FINDERS)
def test_masks_found_before_training_are_trained(name):
    params = mlp_params()
    masks = FINDERS[name](params, [regression_data()], 0.8)
    assert sum(int(mask.sum()) for mask in jax.tree.leaves(masks)) == 77  # 0.2 * 384 = 76.8
    optimizer = sparsejax.sparsify(optax.adam(3e-3), sparsejax.from_masks(masks))
    trained, state = train(optimizer, params, 30)
    assert_masked(trained, masks)
    for mask, expected in zip(jax.tree.leaves(sparsejax.masks_of(state)), jax.tree.leaves(masks), strict=True):
        np.testing.assert_array_equal(mask, expected)
    assert loss(trained, regression_data()) < 0.9 * loss(rewind(params, masks), regression_data())


def test_sr_ste_is_straight_through_with_the_decay_in_the_chain():
    plain = sparsejax.straight_through(0.5, structure=NM(2, 4))
    optimizer = optax.sgd(0.1, momentum=0.9)
    chained, _ = train(sparsejax.sparsify(optax.chain(sr_ste_decay(0.01), optimizer), plain), mlp_params())
    preset, _ = train(sparsejax.sparsify(optimizer, sparsejax.sr_ste(2, 4, decay=0.01)), mlp_params())
    without, _ = train(sparsejax.sparsify(optimizer, plain), mlp_params())
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.array_equal(a, b), chained, preset))
    assert not jax.tree.all(jax.tree.map(lambda a, b: jnp.array_equal(a, b), chained, without))


def test_the_penalty_shrinks_dense_weights_under_the_mask():
    def dense_under_mask(*elements):
        optimizer = optax.chain(*elements, optax.sgd(0.1))
        trained, state = train(sparsejax.sparsify(optimizer, sparsejax.straight_through(0.5)), mlp_params(), 20)
        assert_masked(trained, sparsejax.masks_of(state))
        pairs = zip(jax.tree.leaves(state.latent), jax.tree.leaves(state.masks), strict=True)
        return sum(float(jnp.abs(jnp.where(mask, 0, w)).sum()) for w, mask in pairs)

    assert dense_under_mask(mask_sparsity_penalty(0.05)) < 0.7 * dense_under_mask()


@pytest.mark.parametrize("element", [proximal_l1(0.3, 0.05), group_lasso(0.7, 0.05, structure=sparsejax.Block((4, 4)))])
@pytest.mark.parametrize(
    "algorithm", [sparsejax.static(0.5), sparsejax.rigl(0.5, update_every=2), sparsejax.straight_through(0.5)]
)
def test_proximal_steps_keep_weights_exactly_masked(element, algorithm):
    optimizer = sparsejax.sparsify(optax.chain(optax.sgd(0.05), element), algorithm)
    trained, state = train(optimizer, mlp_params(), 6)
    masks = sparsejax.masks_of(state)
    assert_masked(trained, masks)
    assert int(state.leaks) == 0
    stepped = dict(named_leaves(trained if state.latent is None else state.latent))
    on_mask = {name: mask if state.latent is None else jnp.ones_like(mask) for name, mask in named_leaves(masks)}
    assert any(bool((seen & (stepped[name] == 0)).any()) for name, seen in on_mask.items())
    assert not (trained["hidden"]["bias"] == 0).any()


def test_proximal_steps_in_an_nnx_optimizer():
    model = NNXMLP(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(optax.adam(1e-2), proximal_l1(2.0, 1e-2)), wrt=nnx.Param)
    x, y = regression_data()

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean((model(x) - y) ** 2))(model))

    for _ in range(5):
        step(model, optimizer)
    masks = masks_from_params(nnx.state(model, nnx.Param))
    assert 0 < sum(int(mask.sum()) for mask in jax.tree.leaves(masks)) < 384


def test_masks_found_for_an_nnx_model_are_trained_by_an_nnx_optimizer():
    model = NNXMLP(nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    x, y = regression_data()
    masks = snip(lambda params, _: jnp.mean((nnx.merge(graph, params)(x) - y) ** 2), params, [None], 0.8)
    algorithm = sparsejax.from_masks(masks)
    optimizer = nnx.Optimizer(model, sparsejax.sparsify(optax.adam(1e-2), algorithm), wrt=nnx.Param)
    for _ in range(2):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean((model(x) - y) ** 2))(model))
    assert_masked(nnx.state(model, nnx.Param), masks)
    assert int(jnp.count_nonzero(model.hidden.kernel[...]) + jnp.count_nonzero(model.out.kernel[...])) == 77


def test_lottery_tickets_with_a_fresh_optimizer_each_round():
    def run(params, masks, number):
        return train(sparsejax.sparsify(optax.adam(1e-2), sparsejax.from_masks(masks)), params, 5)[0]

    tickets = list(lottery_ticket(run, mlp_params(), rounds=2))
    assert [sum(int(mask.sum()) for mask in jax.tree.leaves(ticket.masks)) for ticket in tickets] == [384, 307, 245]
    for ticket in tickets:
        assert_masked(ticket.trained, ticket.masks)
