"""SR-STE's decay and MaskSparsity's penalty: exactly the term of the paper on pruned weights, nothing on the others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsejax.transforms.penalties import mask_sparsity_penalty, sr_ste_decay
from tests.nets import linen_net, nnx_net, plain_net


def problem(dtype=jnp.float32):
    params = {"kernel": jnp.array([[1.0, -2.0], [0.0, 4.0]], dtype), "bias": jnp.array([3.0, -3.0], dtype)}
    grads = {"kernel": jnp.array([[0.5, 0.25], [1.0, -1.0]], dtype), "bias": jnp.ones(2, dtype)}
    masks = {"kernel": jnp.array([[True, False], [False, False]]), "bias": optax.MaskedNode()}
    return params, grads, masks


def test_sr_ste_adds_the_decay_of_pruned_weights():
    params, grads, masks = problem()
    element = sr_ste_decay(0.5)
    updates, _ = element.update(grads, element.init(params), params, masks=masks)
    assert updates["kernel"].tolist() == [[0.5, 0.25 - 1.0], [1.0, -1.0 + 2.0]]
    assert updates["bias"].tolist() == [1, 1]


def test_sr_ste_with_no_decay_is_straight_through():
    params, grads, masks = problem()
    updates, _ = sr_ste_decay(0.0).update(grads, optax.EmptyState(), params, masks=masks)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), updates, grads))


def test_penalty_is_the_sign_on_what_will_be_pruned():
    params, grads, masks = problem()
    updates, _ = mask_sparsity_penalty(0.5).update(grads, optax.EmptyState(), params, masks=masks)
    assert updates["kernel"].tolist() == [[0.5, 0.25 - 0.5], [1.0, -1.0 + 0.5]]
    assert updates["bias"].tolist() == [1, 1]


def test_kept_scales_feel_nothing_and_pruned_ones_go_to_zero():
    """The paper's use: norms' scales under a given mask, in front of an ordinary optimizer."""
    keep = {"scale": jnp.array([True, False, True, False])}
    params = {"scale": jnp.array([1.0, 0.8, -0.7, -0.5])}
    with_penalty = optax.chain(mask_sparsity_penalty(0.1, masks=keep), optax.sgd(0.1))
    without = optax.sgd(0.1)
    state, plain_state, plain = with_penalty.init(params), without.init(params), params
    for step in range(100):
        grads = {"scale": 0.01 * jnp.cos(jnp.arange(4.0) + step)}
        updates, state = with_penalty.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, plain_state = without.update(grads, plain_state, plain)
        plain = optax.apply_updates(plain, updates)
    kept = np.asarray(keep["scale"])
    np.testing.assert_array_equal(np.asarray(params["scale"])[kept], np.asarray(plain["scale"])[kept])
    assert (np.abs(np.asarray(params["scale"])[~kept]) < 0.02).all()


def test_penalties_come_before_momentum():
    params, grads, masks = problem()
    optimizer = optax.chain(sr_ste_decay(0.5), optax.sgd(0.1, momentum=0.9))
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(grads, state, params, masks=masks)
    gradient = np.array([[0.5, 0.25 - 1.0], [1.0, -1.0 + 2.0]])
    np.testing.assert_allclose(updates["kernel"], -0.1 * 1.9 * gradient, rtol=1e-6)


@pytest.mark.parametrize("element", [sr_ste_decay(0.01), mask_sparsity_penalty(0.01)])
@pytest.mark.parametrize("grad_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_updates_keep_their_dtype(element, dtype, grad_dtype):
    params, _, masks = problem(dtype)
    _, grads, _ = problem(grad_dtype)
    updates, _ = jax.jit(element.update)(grads, optax.EmptyState(), params, masks=masks)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(grad_dtype)}


def test_strengths_can_be_injected():
    params, grads, masks = problem()
    element = optax.inject_hyperparams(sr_ste_decay)(decay=0.5)
    updates, state = element.update(grads, element.init(params), params, masks=masks)
    assert updates["kernel"].tolist() == [[0.5, -0.75], [1.0, 1.0]]
    assert float(state.hyperparams["decay"]) == 0.5


@pytest.mark.parametrize("make_net", [nnx_net, linen_net, plain_net])
def test_flax_and_plain_models(make_net):
    _, params = make_net()
    grads = jax.tree.map(jnp.zeros_like, params)
    masks = jax.tree.map(lambda p: p > 0 if p.ndim == 2 else optax.MaskedNode(), params)
    updates, _ = sr_ste_decay(0.5).update(grads, optax.EmptyState(), params, masks=masks)
    for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        expected = np.minimum(np.asarray(p), 0) / 2 if p.ndim == 2 else np.zeros(p.shape)
        np.testing.assert_array_equal(u, expected)


def test_nnx_optimizer_with_masks_of_a_split_model():
    """`nnx.Optimizer` hands pure trees to `update`, while masks given beforehand come as a state of variables."""
    graph_apply, params = nnx_net()
    del graph_apply
    masks = jax.tree.map(lambda p: jnp.zeros(p.shape, bool), params)
    element = mask_sparsity_penalty(0.5, masks=masks)
    pure = nnx.to_pure_dict(params)
    updates, _ = element.update(jax.tree.map(jnp.zeros_like, pure), element.init(pure), pure)
    np.testing.assert_array_equal(updates["out"]["kernel"], 0.5 * np.sign(pure["out"]["kernel"]))


@pytest.mark.parametrize(("factory", "name"), [(sr_ste_decay, "decay"), (mask_sparsity_penalty, "strength")])
def test_bad_input(factory, name):
    params, grads, masks = problem()
    for value in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            factory(value)
    with pytest.raises(ValueError, match="pass `params` when calling `update`"):
        factory().update(grads, optax.EmptyState(), masks=masks)
    with pytest.raises(ValueError, match=rf"{factory.__name__} reads `masks=`.*sparsify\(optax.chain"):
        factory().update(grads, optax.EmptyState(), params)
    with pytest.raises(ValueError, match="masks names leaves that the updates lack: other"):
        factory().update(grads, optax.EmptyState(), params, masks={"other": jnp.ones(2, bool)})
