"""SynFlow against closed forms, a numpy oracle in float64, and its promise never to empty a layer too soon."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.masks.budget import Counts
from sparsejax.masks.distributions import uniform
from sparsejax.masks.nm import NM
from sparsejax.masks.paths import named_leaves
from sparsejax.masks.rules import resolve
from sparsejax.masks.unstructured import Unstructured
from sparsejax.topology.controls import collapsed_layers
from sparsejax.topology.synflow import _on_the_way, synaptic_flow, synflow
from tests.nets import linen_net, nnx_net, plain_net


def chain(params, x):
    for name in sorted(params):
        x = jax.nn.relu(x @ params[name])
    return x


def random_chain(widths, seed=0, scale=1.0):
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    layers = enumerate(zip(keys, itertools.pairwise(widths), strict=True))
    return {f"layer{i}": scale * jax.random.normal(key, shape) / np.sqrt(shape[0]) for i, (key, shape) in layers}


def oracle(params, sparsity, rounds):
    """SynFlow on a chain of matrices by forward and backward products in numpy."""
    weights = [np.abs(np.asarray(params[name], np.float64)) for name in sorted(params)]
    size = sum(w.size for w in weights)
    final = round((1 - sparsity) * size)
    kept = [np.ones(w.shape, bool) for w in weights]
    for k in range(1, rounds + 1):
        masked = [w * m for w, m in zip(weights, kept, strict=True)]
        forward = [np.ones((1, weights[0].shape[0]))]
        for w in masked:
            forward.append(forward[-1] @ w)
        backward = [np.ones((weights[-1].shape[1], 1))]
        for w in reversed(masked):
            backward.append(w @ backward[-1])
        backward = backward[::-1]
        scores = [w * (forward[i].T @ backward[i + 1].T) for i, w in enumerate(masked)]
        flat = np.concatenate([np.where(m, s, -np.inf).reshape(-1) for s, m in zip(scores, kept, strict=True)])
        count = final if k == rounds else round(size * (final / size) ** (k / rounds))
        mask = np.zeros(size, bool)
        mask[np.argsort(-flat, kind="stable")[:count]] = True
        ends = np.cumsum([w.size for w in weights])[:-1]
        kept = [part.reshape(w.shape) for part, w in zip(np.split(mask, ends), weights, strict=True)]
    return kept


def test_flow_through_every_layer_is_the_sum_of_the_outputs():
    params = {"a": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "b": jnp.array([[-1.0], [2.0]])}
    scores = synaptic_flow(chain, params, jnp.zeros((1, 2)))
    assert scores["a"].tolist() == [[1, 4], [3, 8]]
    assert scores["b"].tolist() == [[4], [12]]
    assert scores["a"].sum() == scores["b"].sum() == 16


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000))
def test_what_flows_into_a_unit_flows_out_of_it(seed):
    params = random_chain((5, 7, 4, 3), seed)
    masks = jax.tree.map(lambda w: jax.random.uniform(jax.random.key(seed), w.shape) < 0.6, params)
    scores = list(synaptic_flow(chain, params, jnp.zeros((1, 5)), masks).values())
    for before, after in itertools.pairwise(scores):
        np.testing.assert_allclose(before.sum(axis=0), after.sum(axis=1), rtol=1e-5, atol=1e-6)
    for score, mask in zip(scores, jax.tree.leaves(masks), strict=True):
        assert not np.asarray(score)[~np.asarray(mask)].any()


@pytest.mark.parametrize(("sparsity", "rounds"), [(0.5, 1), (0.9, 10), (0.95, 30)])
def test_masks_are_those_of_the_oracle(sparsity, rounds):
    params = random_chain((12, 16, 16, 5), seed=1)
    masks = synflow(chain, params, jnp.zeros((1, 12)), sparsity, rounds=rounds)
    for mask, expected in zip(jax.tree.leaves(masks), oracle(params, sparsity, rounds), strict=True):
        np.testing.assert_array_equal(mask, expected)


def test_density_falls_exponentially_and_ends_exactly():
    plan = resolve({"w": jnp.ones((100, 100))}, None, Unstructured())
    counts = [int(_on_the_way(Counts({"w": 100}, None, ()), plan, k / 100).layers["w"]) for k in (1, 25, 50, 75, 100)]
    assert counts == [9550, 3162, 1000, 316, 100]


def test_a_hundred_rounds_empty_no_layer_where_one_round_does():
    params = random_chain((64, 256, 256, 10), seed=2)
    x = jnp.zeros((1, 64))
    at_once = synflow(chain, params, x, 0.99, rounds=1)
    in_rounds = synflow(chain, params, x, 0.99, rounds=100)
    assert collapsed_layers(at_once)
    assert not collapsed_layers(in_rounds)
    for masks in (at_once, in_rounds):
        assert sum(int(mask.sum()) for mask in jax.tree.leaves(masks)) == 845


def test_deep_networks_do_not_overflow():
    params = random_chain([16] * 9, seed=3, scale=1e6)  # the sum of the outputs is about 1e54
    x = jnp.zeros((1, 16))
    assert not np.isfinite(float(chain(jax.tree.map(jnp.abs, params), jnp.ones((1, 16))).sum()))
    masks = synflow(chain, params, x, 0.5, rounds=3)
    # In a chain, the scale of a layer scales all scores alike, so that these weights have the same masks.
    tame = jax.tree.map(lambda w: w / 1e6, params)
    for mask, expected in zip(jax.tree.leaves(masks), oracle(tame, 0.5, 3), strict=True):
        np.testing.assert_array_equal(mask, expected)


def test_beyond_float64_and_beyond_any_path_are_errors():
    x = jnp.zeros((1, 16))
    with pytest.raises(ValueError, match="outside the range"):
        synflow(chain, random_chain([16] * 12, scale=1e36), x, 0.5, rounds=2)
    with pytest.raises(ValueError, match="no path is left"):
        synflow(chain, {"a": jnp.zeros((16, 4)), "b": jnp.ones((4, 2))}, x, 0.5)
    collapsing = {"a": jnp.ones((16, 64)), "b": jnp.ones((64, 1)), "c": jnp.ones((1, 1))}
    with pytest.raises(ValueError, match=r"round 2 of 2.*no weight is left in a[;,]"):
        synflow(chain, collapsing, x, 0.999, rounds=2)
    with pytest.raises(ValueError, match="rounds is 0"):
        synflow(chain, random_chain((16, 4)), x, 0.5, rounds=0)


@pytest.mark.parametrize("make_net", [nnx_net, linen_net, plain_net])
def test_flax_and_plain_models(make_net):
    apply, params = make_net()
    masks = synflow(apply, params, jnp.zeros((1, 6)), 0.75, rounds=5)
    leaves = dict(named_leaves(masks))
    assert set(leaves) == {"hidden/kernel", "out/kernel"}
    assert sum(int(mask.sum()) for mask in leaves.values()) == 18


def test_token_ids_pass_as_they_are_and_embeddings_stay_dense():
    params = {"embedding": jnp.ones((5, 4)), "kernel": jax.random.normal(jax.random.key(0), (4, 4), jnp.bfloat16)}
    seen = []

    def apply(params, tokens):
        seen.append(tokens.dtype)
        return params["embedding"][tokens] @ params["kernel"]

    masks = synflow(apply, params, jnp.array([[0, 4]]), 0.5, rounds=2)
    assert masks["embedding"] == optax.MaskedNode()
    assert int(masks["kernel"].sum()) == 8
    assert set(seen) == {jnp.dtype("int32")}


def test_layerwise_shares_and_n_m():
    params = random_chain((8, 16, 4), seed=4)
    x = jnp.zeros((1, 8))
    by_layer = synflow(chain, params, x, 0.75, rounds=4, distribution=uniform)
    assert [int(mask.sum()) for mask in jax.tree.leaves(by_layer)] == [32, 16]
    for mask in jax.tree.leaves(synflow(chain, params, x, 0.5, rounds=4, structure=NM(2, 4))):
        assert (np.asarray(mask).reshape(-1, 4, mask.shape[1]).sum(axis=1) == 2).all()
