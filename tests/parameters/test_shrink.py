import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.masks.paths import map_with_names
from sparsejax.parameters.shrink import shrink
from sparsejax.parameters.shrink_groups import tied_axes


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def masked(params, masks):
    return map_with_names(lambda name, leaf: leaf * masks[name] if name in masks else leaf, params)


def check(apply, params, masks, x, tolerance=1e-5):
    small, report = shrink(apply, params, masks, x)
    np.testing.assert_allclose(apply(small, x), apply(masked(params, masks), x), rtol=tolerance, atol=tolerance)
    return small, report


def mlp(seed=0, bias=True):
    params = {"up": normal(seed, 4, 8), "bias": normal(seed + 1, 8), "down": normal(seed + 2, 8, 3)}
    return params | ({"shift": normal(seed + 3, 3)} if bias else {})


def apply_mlp(p, x):
    y = jax.nn.gelu(x @ p["up"] + p["bias"]) @ p["down"]
    return y + p["shift"] if "shift" in p else y


def columns(shape, axis, pruned):
    mask = np.ones(shape, bool)
    np.moveaxis(mask, axis, 0)[list(pruned)] = False
    return jnp.asarray(mask)


X = normal(9, 5, 4)


def test_pruned_inputs_leave_a_constant_that_the_next_bias_takes():
    params = mlp()
    small, report = check(apply_mlp, params, {"up": columns((4, 8), 1, [1, 5, 6])}, X)
    assert small["up"].shape == (4, 5)
    assert small["bias"].shape == (5,)
    assert small["down"].shape == (5, 3)
    assert report.folded == ("shift",)
    assert "shift: constants of pruned units folded in" in str(report)


def test_random_numbers_of_a_fixed_key_are_inputs_like_others():
    apply = lambda p, x: apply_mlp(p, x + jax.random.normal(jax.random.key(1), x.shape))  # noqa: E731
    small, _ = check(apply, mlp(), {"up": columns((4, 8), 1, [1, 5, 6])}, X)
    assert small["up"].shape == (4, 5)


def test_without_a_bias_the_units_stay_and_the_report_says_why():
    small, report = check(apply_mlp, mlp(bias=False), {"up": columns((4, 8), 1, [1, 5, 6])}, X)
    assert small["up"].shape == (4, 8)
    assert "3 pruned units stay: they leave a constant, and the next layer has no bias" in str(report)


def test_pruned_outputs_are_cut_without_folding():
    small, report = check(apply_mlp, mlp(bias=False), {"down": columns((8, 3), 0, [0, 7])}, X)
    assert small["up"].shape == (4, 6)
    assert report.folded == ()


def test_one_unit_stays():
    small, report = check(apply_mlp, mlp(), {"up": jnp.zeros((4, 8), bool), "down": jnp.zeros((8, 3), bool)}, X)
    assert small["up"].shape == (4, 1)
    assert "at least 1 of each group is kept" in str(report)


def test_other_trees_are_cut_alike():
    params, masks = mlp(), {"up": columns((4, 8), 1, [0]), "down": columns((8, 3), 0, [0])}
    small, report = shrink(apply_mlp, params, masks, X)
    again = report.cut(masks)
    assert again["up"].shape == small["up"].shape
    assert bool(again["up"].all())
    assert bool(again["down"].all())


def test_heads_inside_a_flat_axis():
    def apply(p, x):
        fused = x @ p["qkv"]
        q, k, v = (part.reshape(*x.shape[:-1], -1, 2) for part in jnp.split(fused, 3, axis=-1))
        weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k), axis=-1)
        return jnp.einsum("hts,shd->thd", weights, v).reshape(len(x), -1) @ p["out"]

    params = {"qkv": normal(0, 4, 18), "out": normal(1, 6, 4)}
    groups = tied_axes(apply, params, X)
    [heads] = groups.free
    assert groups[heads].size == 3
    masks = groups.masks(params, {heads: np.array([True, False, True])})
    small, _ = check(apply, params, masks, X)
    assert small["qkv"].shape == (4, 12)
    assert small["out"].shape == (4, 4)


def test_concatenation_and_residual():
    def apply(p, x):
        a, b = x @ p["a"], jnp.tanh(x @ p["b"])
        joined = jnp.concatenate([a + b, x @ p["c"]], axis=-1)
        return joined.T.T @ p["out"]

    params = {"a": normal(0, 4, 3), "b": normal(1, 4, 3), "c": normal(2, 4, 2), "out": normal(3, 5, 2)}
    masks = {"a": columns((4, 3), 1, [1]), "b": columns((4, 3), 1, [1, 2]), "c": columns((4, 2), 1, [0])}
    small, report = check(apply, params, masks, X)
    assert small["out"].shape == (3, 2)
    assert small["a"].shape == (4, 2)
    assert small["c"].shape == (4, 1)
    assert "still in use, unpruned in a axis 1" in str(report)


def test_a_layer_norm_blocks_the_cut():
    def apply(p, x):
        h = x @ p["a"]
        h = (h - h.mean(-1, keepdims=True)) * jax.lax.rsqrt(h.var(-1, keepdims=True) + 1e-6) * p["scale"]
        return h @ p["b"]

    params = {"a": normal(0, 4, 8), "scale": normal(1, 8), "b": normal(2, 8, 2)}
    masks = {"a": columns((4, 8), 1, [0]), "b": columns((8, 2), 0, [0])}
    small, report = check(apply, params, masks, X)
    assert small["a"].shape == (4, 8)
    assert "the function counts it" in str(report)
    assert "7 when it is smaller" in str(report)


def test_a_size_written_into_the_function_blocks_the_cut():
    def apply(p, x):
        return (x @ p["a"]).reshape(len(x), 4, -1).sum(-1) @ p["b"]

    groups = tied_axes(apply, {"a": normal(0, 4, 8), "b": normal(1, 4, 2)}, X)
    assert "written into the function" in str(groups) or "fails when it is smaller" in str(groups)


def test_what_is_not_traced_is_refused():
    def apply(p, x):
        return jax.lax.sort(x @ p["a"], dimension=1) @ p["b"]

    params = {"a": normal(0, 4, 8), "b": normal(1, 8, 2)}
    with pytest.raises(ValueError, match=r"a: 1 of 8 units along axis 1 are pruned.*primitive 'sort'"):
        shrink(apply, params, {"a": columns((4, 8), 1, [3])}, X)
    small, _ = shrink(apply, params, {"a": jnp.ones((4, 8), bool)}, X)
    assert small["a"].shape == (4, 8)


@pytest.mark.parametrize("masks", [{"up": jnp.ones((4, 7), bool)}, {"other": jnp.ones((4, 8), bool)}])
def test_a_mask_that_fits_nothing(masks):
    with pytest.raises(ValueError, match="masks"):
        shrink(apply_mlp, mlp(), masks, X)


def test_a_group_that_stays_cannot_be_pruned():
    params = mlp()
    groups = tied_axes(apply_mlp, params, X)
    with pytest.raises(ValueError, match="axis of an input"):
        groups.prune(params, {"up axis 0": 0.5})
    with pytest.raises(KeyError, match="no group is named"):
        groups.prune(params, {"sideways": 0.5})


ACTIVATIONS = (jax.nn.relu, jnp.tanh, jax.nn.sigmoid, jax.nn.gelu)


@pytest.mark.slow
@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10**6), st.lists(st.integers(2, 6), min_size=1, max_size=3), st.booleans())
def test_random_nets_with_random_masks(seed, widths, residual):
    random = np.random.default_rng(seed)
    sizes = [4, *widths, 3]
    acts = [ACTIVATIONS[i] for i in random.integers(0, 4, len(sizes))]
    params = {
        f"w{i}": jnp.asarray(random.normal(size=(a, b)), jnp.float32)
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    }
    params |= {f"b{i}": jnp.asarray(random.normal(size=b), jnp.float32) for i, b in enumerate(sizes[1:])}

    def apply(p, x):
        for i in range(len(sizes) - 1):
            y = acts[i](x @ p[f"w{i}"] + p[f"b{i}"])
            x = x + y if residual and sizes[i] == sizes[i + 1] else y
        return x

    masks = {}
    for name, leaf in params.items():
        if leaf.ndim == 2 or random.random() < 0.3:
            mask = random.random(leaf.shape) < 0.9
            for axis in range(leaf.ndim):
                mask &= np.expand_dims(
                    random.random(leaf.shape[axis]) < 0.7, tuple(a for a in range(leaf.ndim) if a != axis)
                )
            masks[name] = jnp.asarray(mask)
    check(apply, params, masks, X)
