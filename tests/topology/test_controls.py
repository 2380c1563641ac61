"""Shuffled masks keep what each layer keeps; empty layers are found."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.masks.block import Block
from sparsejax.masks.nm import NM
from sparsejax.masks.roles import Roles
from sparsejax.masks.select import select_top_global
from sparsejax.topology.controls import collapsed_layers, effective_masks, shuffle_masks

STACKED = {"stack": Roles(batch_axes=(0,), in_axes=(1,), out_axes=(2,))}


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**31 - 1), kept=st.integers(0, 60))
def test_shuffling_keeps_the_count_of_every_layer(seed, kept):
    masks = {"a": {"kernel": jnp.arange(60).reshape(6, 10) < kept, "bias": optax.MaskedNode()}}
    shuffled = shuffle_masks(masks, seed)
    assert int(shuffled["a"]["kernel"].sum()) == kept
    assert shuffled["a"]["bias"] == optax.MaskedNode()
    assert (shuffled["a"]["kernel"] == shuffle_masks(masks, seed)["a"]["kernel"]).all()


def test_places_are_uniform_and_differ_between_seeds_and_leaves():
    masks = {name: jnp.arange(100).reshape(10, 10) < 20 for name in "ab"}
    often = sum(np.asarray(shuffle_masks(masks, seed)["a"], int) for seed in range(200))
    assert often.sum() == 200 * 20
    assert often.min() > 15  # 40 expected, standard deviation 5.7
    assert often.max() < 70
    one = shuffle_masks(masks, 0)
    assert (one["a"] != one["b"]).any()


def test_structure_is_kept():
    scores = jax.random.uniform(jax.random.key(0), (8, 6))
    pattern = {"kernel": NM(2, 4).mask(scores, 0.5)}
    shuffled = shuffle_masks(pattern, 1, structure=NM(2, 4))["kernel"]
    assert (np.asarray(shuffled).reshape(2, 4, 6).sum(axis=1) == 2).all()
    assert (shuffled != pattern["kernel"]).any()
    blocks = {"kernel": Block((4, 3)).mask(scores, 0.5)}
    shuffled = np.asarray(shuffle_masks(blocks, 3, structure=Block((4, 3)))["kernel"])
    assert sorted(shuffled.reshape(2, 4, 2, 3).sum(axis=(1, 3)).reshape(-1)) == [0, 0, 12, 12]


def test_stacked_layers_are_shuffled_each_for_itself():
    masks = {"stack": jnp.stack([jnp.arange(12).reshape(3, 4) < kept for kept in (0, 5, 12)])}
    shuffled = shuffle_masks(masks, 0, rules=STACKED)["stack"]
    assert shuffled.sum(axis=(1, 2)).tolist() == [0, 5, 12]


def test_errors_name_the_leaf():
    with pytest.raises(ValueError, match=r"layer/kernel: the mask does not consist of whole units of Block"):
        shuffle_masks({"layer": {"kernel": jnp.arange(12).reshape(3, 4) < 5}}, 0, structure=Block((3, 2)))
    with pytest.raises(ValueError, match="embedding has a mask but is dense"):
        shuffle_masks({"embedding": jnp.ones((3, 4), bool), "kernel": jnp.ones((3, 4), bool)}, 0)


def test_empty_layers_are_named():
    masks = {"a": jnp.zeros((2, 3), bool), "b": jnp.eye(3, dtype=bool), "bias": optax.MaskedNode()}
    assert collapsed_layers(masks) == ["a"]
    assert collapsed_layers({"b": masks["b"]}) == []
    stacked = {"stack": jnp.array([True, False, False])[:, None, None] & jnp.ones((3, 2, 2), bool)}
    assert collapsed_layers(stacked, rules=STACKED) == ["stack[1]", "stack[2]"]


def he_network(seed, widths=(64, 256, 256, 10)):
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    layers = enumerate(zip(keys, itertools.pairwise(widths), strict=True))
    return {f"layer{i}": jax.random.normal(key, shape) * np.sqrt(2 / shape[0]) for i, (key, shape) in layers}


def chain(params, x):
    for name in sorted(params):
        x = jax.nn.relu(x @ params[name])
    return x


def test_magnitude_at_initialization_collapses_at_two_percent():
    """Wide layers start with smaller weights and lose nearly all: hardly an output is left that an input reaches."""
    for seed in range(3):
        params = he_network(seed)
        chosen = select_top_global([jnp.abs(w) for w in params.values()], round(0.02 * 84480))
        masks = dict(zip(params, chosen, strict=True))
        effective = effective_masks(chain, params, jnp.zeros((1, 64)), masks)
        reached = int(effective["layer2"].any(axis=0).sum())
        assert reached <= 2
        if reached == 0:
            assert collapsed_layers(effective) == ["layer0", "layer1", "layer2"]
    fine = effective_masks(chain, params, jnp.zeros((1, 64)), jax.tree.map(lambda w: jnp.ones(w.shape, bool), params))
    assert collapsed_layers(fine) == []


def test_a_weight_is_effective_when_a_path_goes_through_it():
    masks = {
        "a": jax.random.uniform(jax.random.key(0), (6, 5)) < 0.4,
        "b": jax.random.uniform(jax.random.key(1), (5, 4)) < 0.3,
    }
    effective = effective_masks(chain, jax.tree.map(lambda m: jnp.zeros(m.shape), masks), jnp.zeros((1, 6)), masks)
    a, b = np.asarray(masks["a"]), np.asarray(masks["b"])
    np.testing.assert_array_equal(effective["a"], a & b.any(axis=1)[None, :])
    np.testing.assert_array_equal(effective["b"], b & a.any(axis=0)[:, None])
