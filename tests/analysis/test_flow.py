"""Gradient flow against numpy sums, under jit, in narrow dtypes and with NaN under the mask."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax.analysis.flow import gradient_flow

RNG = np.random.default_rng(0)
GRADS = {"a": {"kernel": RNG.normal(size=(5, 7)), "bias": RNG.normal(size=7)}, "b": [RNG.normal(size=(7, 3))]}
MASKS = {"a": {"kernel": RNG.random((5, 7)) < 0.3, "bias": optax.MaskedNode()}, "b": [RNG.random((7, 3)) < 0.3]}


def as_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


def test_masked_flow_is_the_sum_of_squares_of_active_gradients():
    expected = {
        "a/bias": np.sum(GRADS["a"]["bias"] ** 2),
        "a/kernel": np.sum(GRADS["a"]["kernel"][MASKS["a"]["kernel"]] ** 2),
        "b/0": np.sum(GRADS["b"][0][MASKS["b"][0]] ** 2),
    }
    flow = jax.jit(gradient_flow)(as_jax(GRADS), as_jax(MASKS))
    assert list(flow.layers) == list(expected)
    np.testing.assert_allclose(list(flow.layers.values()), list(expected.values()), rtol=1e-5)
    np.testing.assert_allclose(flow.total, sum(expected.values()), rtol=1e-5)
    np.testing.assert_allclose(flow.effective, np.mean(np.sqrt(list(expected.values()))), rtol=1e-5)


def test_without_masks_the_flow_is_dense():
    flow = gradient_flow(as_jax(GRADS))
    np.testing.assert_allclose(flow.total, sum(np.sum(np.square(g)) for g in jax.tree.leaves(GRADS)), rtol=1e-5)


def test_it_is_the_decrease_of_the_loss_under_gradient_descent():
    def loss(w):
        return jnp.sum(jnp.square(w - 1))

    w, mask, rate = jnp.array([3.0, 0.0, 5.0]), jnp.array([True, False, True]), 1e-3
    gradient = jax.grad(loss)(w)
    decrease = loss(w) - loss(w - rate * jnp.where(mask, gradient, 0))
    np.testing.assert_allclose(decrease, rate * gradient_flow(gradient, mask).total, rtol=2e-3)


def test_nan_under_the_mask_does_not_count_and_on_it_does():
    grads, mask = jnp.array([2.0, jnp.nan]), jnp.array([True, False])
    assert float(gradient_flow(grads, mask).total) == 4.0
    assert jnp.isnan(gradient_flow(grads, ~mask).total)


def test_narrow_gradients_are_summed_in_float32():
    flow = gradient_flow({"w": jnp.full(4096, 1.0, jnp.bfloat16)})
    assert flow.total.dtype == jnp.float32
    assert float(flow.total) == 4096.0


@pytest.mark.parametrize(
    ("grads", "masks", "message"),
    [
        ({}, None, "no gradient to measure"),
        ({"w": jnp.ones(2)}, {"v": jnp.ones(2, bool)}, r"v has a mask but no gradient; the gradients are \['w'\]"),
        ({"w": jnp.ones(2)}, {"w": jnp.ones(3, bool)}, r"w: the mask has shape \(3,\), the gradient \(2,\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(grads, masks, message):
    with pytest.raises(ValueError, match=message):
        gradient_flow(grads, masks)
