"""SNIP and GraSP against closed forms: a quadratic loss has gradient A theta and H g = A^2 theta."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.masks.block import Block
from sparsejax.masks.channel import Channel
from sparsejax.masks.distributions import uniform
from sparsejax.masks.nm import NM
from sparsejax.masks.paths import named_leaves
from sparsejax.topology.at_init import grasp, snip
from tests.nets import linen_net, nnx_net, plain_net


def quadratic(params, matrix):
    theta = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(params)])
    return 0.5 * theta @ matrix @ theta


def quadratic_problem(seed, sizes=((3, 4), (4, 2))):
    rng = np.random.default_rng(seed)
    params = {f"layer{i}": rng.normal(size=shape).astype(np.float32) for i, shape in enumerate(sizes)}
    size = sum(p.size for p in params.values())
    matrix = rng.normal(size=(size, size)).astype(np.float32)
    theta = np.concatenate([p.reshape(-1) for p in params.values()]).astype(np.float64)
    return jax.tree.map(jnp.asarray, params), jnp.asarray(matrix + matrix.T), theta


def flat(masks):
    return np.concatenate([np.asarray(mask).reshape(-1) for mask in jax.tree.leaves(masks)])


def largest(scores, count):
    kept = np.zeros(scores.size, bool)
    kept[np.argsort(-scores, kind="stable")[:count]] = True
    return kept


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000), sparsity=st.sampled_from([0.25, 0.5, 0.9]))
def test_snip_keeps_the_largest_weight_times_gradient(seed, sparsity):
    params, matrix, theta = quadratic_problem(seed)
    masks = snip(quadratic, params, [matrix], sparsity)
    expected = np.abs(theta * (np.asarray(matrix, np.float64) @ theta))
    np.testing.assert_array_equal(flat(masks), largest(expected, round((1 - sparsity) * theta.size)))


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000), sparsity=st.sampled_from([0.25, 0.5, 0.9]))
def test_grasp_keeps_the_largest_weight_times_hessian_gradient_product_with_its_sign(seed, sparsity):
    params, matrix, theta = quadratic_problem(seed)
    a = np.asarray(matrix, np.float64)
    scores = theta * (a @ (a @ theta))
    masks = grasp(quadratic, params, [matrix], sparsity)
    np.testing.assert_array_equal(flat(masks), largest(scores, round((1 - sparsity) * theta.size)))


def test_grasp_prunes_the_most_negative_product_first():
    """With A = a a', theta = 1: theta * A^2 theta = |a|^2 (a . theta) a = 45 (3, 1, 1, -2)."""
    a = jnp.array([3.0, 1.0, 1.0, -2.0])
    masks = grasp(quadratic, {"kernel": jnp.ones((2, 2))}, [jnp.outer(a, a)], 0.25)
    assert flat(masks).tolist() == [True, True, True, False]


@pytest.mark.parametrize("method", [snip, grasp])
def test_how_data_is_cut_into_batches_does_not_matter(method):
    params, whole, _ = quadratic_problem(3)
    part = jnp.asarray(np.random.default_rng(4).normal(size=whole.shape), jnp.float32)
    part = part + part.T
    together = method(quadratic, params, [whole], 0.5)
    in_pieces = method(quadratic, params, iter([part, whole - part]), 0.5)
    assert (flat(together) == flat(in_pieces)).all()


@pytest.mark.parametrize("method", [snip, grasp])
def test_scale_of_the_loss_does_not_matter(method):
    params, matrix, _ = quadratic_problem(5)
    scaled = method(lambda p, batch: 16.0 * quadratic(p, batch), params, [matrix], 0.5)
    assert (flat(scaled) == flat(method(quadratic, params, [matrix], 0.5))).all()


@pytest.mark.parametrize("make_net", [nnx_net, linen_net, plain_net])
@pytest.mark.parametrize("method", [snip, grasp])
def test_masks_of_flax_and_plain_models(make_net, method):
    apply, params = make_net()
    x = jax.random.normal(jax.random.key(1), (16, 6))
    labels = jnp.arange(16) % 3

    def loss(params, batch):
        logits = apply(params, batch[0]) / 200
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    masks = method(loss, params, [(x, labels)], 0.75)
    leaves = dict(named_leaves(masks))
    assert set(leaves) == {"hidden/kernel", "out/kernel"}
    assert sum(int(mask.sum()) for mask in leaves.values()) == 18
    assert all(mask.dtype == bool for mask in leaves.values())
    dense = jax.tree.leaves(masks, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))
    assert sum(isinstance(leaf, optax.MaskedNode) for leaf in dense) == 2


@pytest.mark.parametrize(
    ("structure", "sparsity", "kept"),
    [(Block((2, 2)), 0.5, 24), (Channel(), 0.75, 16), (NM(1, 4), 0.75, 12)],
)
def test_structures(structure, sparsity, kept):
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 6))}
    x = jax.random.normal(jax.random.key(1), (4, 8))
    mask = snip(lambda p, x: jnp.sum((x @ p["kernel"]) ** 2), params, [x], sparsity, structure=structure)["kernel"]
    assert int(mask.sum()) == kept


def test_layers_may_keep_shares_of_their_own():
    params, matrix, _ = quadratic_problem(6)
    masks = snip(quadratic, params, [matrix], 0.5, distribution=uniform)
    assert [int(mask.sum()) for mask in jax.tree.leaves(masks)] == [6, 4]


def test_half_precision_and_integer_leaves():
    params = {"kernel": jnp.arange(1, 9, dtype=jnp.bfloat16).reshape(4, 2), "steps": jnp.int32(7)}
    masks = grasp(lambda p, x: jnp.sum((x @ p["kernel"]) ** 2), params, [jnp.ones((1, 4), jnp.bfloat16)], 0.5)
    assert int(masks["kernel"].sum()) == 4
    assert masks["steps"] == optax.MaskedNode()


@pytest.mark.parametrize("method", [snip, grasp])
def test_bad_input(method):
    params = {"layer": {"kernel": jnp.ones((2, 2))}}

    def loss(params, batch):
        return jnp.sum(params["layer"]["kernel"]) * batch

    with pytest.raises(ValueError, match="batches is empty"):
        method(loss, params, [], 0.5)
    with pytest.raises(ValueError, match="layer/kernel are not finite"):
        method(lambda p, batch: jnp.sum(p["layer"]["kernel"] ** 2) * batch, params, [jnp.nan], 0.5)
    with pytest.raises(ValueError, match="every score is 0"):
        method(loss, params, [jnp.float32(0)], 0.5)
    with pytest.raises(ValueError, match="sparsity"):
        method(lambda p, batch: jnp.sum(p["layer"]["kernel"] ** 2), params, [0.0], 1.0)
