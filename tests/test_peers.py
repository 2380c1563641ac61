"""Comparisons with independent libraries, run by `make test-peers`, which fails where one of them is absent."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax

pytestmark = pytest.mark.peers


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what they import is not ours to mend
@pytest.mark.parametrize("name", ["torch", "scipy", "equinox", "spconv"])
def test_it_is_installed(name):
    assert importlib.import_module(name)


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98])
def test_magnitude_masks_are_those_of_torch(sparsity):
    import torch
    from torch.nn.utils import prune

    weight = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
    mask = sparsejax.Unstructured().mask(jnp.abs(weight), sparsity)
    layer = torch.nn.Linear(48, 64)
    layer.weight.data = torch.from_numpy(weight)
    prune.l1_unstructured(layer, "weight", amount=weight.size - int(mask.sum()))
    np.testing.assert_array_equal(mask, layer.weight_mask.numpy() != 0)


def test_channel_masks_are_those_of_torch():
    import torch
    from torch.nn.utils import prune

    weight = np.random.default_rng(1).normal(size=(48, 64)).astype(np.float32)
    mask = sparsejax.Channel(axis=-1).mask(jnp.abs(weight), 0.75)
    layer = torch.nn.Linear(48, 64)
    layer.weight.data = torch.from_numpy(weight.T.copy())
    prune.ln_structured(layer, "weight", amount=48, n=1, dim=0)
    np.testing.assert_array_equal(mask, layer.weight_mask.numpy().T != 0)


def test_global_magnitude_is_that_of_torch():
    import torch
    from torch.nn.utils import prune

    shapes = {"a": (20, 30), "b": (30, 10), "c": (10, 7)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    optimizer = sparsejax.sparsify(optax.identity(), sparsejax.global_magnitude(0.8))
    _, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    masks = sparsejax.masks_of(state)
    layers = torch.nn.ModuleDict({name: torch.nn.Linear(*shape) for name, shape in shapes.items()})
    for name, layer in layers.items():
        layer.weight.data = torch.from_numpy(np.array(params[name].T))
    total = sum(p.size for p in params.values())
    kept = sum(int(mask.sum()) for mask in masks.values())
    prune.global_unstructured(
        [(layer, "weight") for layer in layers.values()], prune.L1Unstructured, amount=total - kept
    )
    for name, layer in layers.items():
        np.testing.assert_array_equal(masks[name], layer.weight_mask.numpy().T != 0)


def test_selection_is_that_of_scipy_ranks():
    from scipy.stats import rankdata

    scores = np.random.default_rng(2).integers(0, 9, size=(40, 25)).astype(np.float32)
    order = rankdata(-scores.ravel(), method="ordinal").reshape(scores.shape)
    for count in (0, 1, 333, 999, 1000):
        np.testing.assert_array_equal(sparsejax.select_top(jnp.asarray(scores), count), order <= count)
