"""Norms and pools over active sites against numpy on the gathered rows; the planner; tiles kept between layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_conv import native
from sparsejax.convolution import (
    SiteMask,
    apply_mask,
    check_overflow,
    conv_plan,
    from_mask,
    from_tiles,
    masked_batch_norm,
    masked_conv,
    masked_global_pool,
    masked_group_norm,
    masked_layer_norm,
    masked_pool,
    random_patch_mask,
    sites_group_norm,
    tile_conv,
    tile_set,
    to_dense,
    to_tiles,
)


def example():
    random = np.random.default_rng(0)
    mask = random.random((3, 4, 4)) < 0.5
    mask[1] = False  # one sample is empty
    x = random.normal(2.0, 3.0, size=(3, 4, 4, 6)).astype(np.float32)
    x[~mask] = np.nan
    scale, bias = random.normal(size=(2, 6)).astype(np.float32)
    return jnp.asarray(x), mask, {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}


def put_back(rows, mask):
    result = np.zeros((*mask.shape, rows.shape[-1]), np.float32)
    result[mask] = rows
    return result


def test_batch_norm():
    x, mask, affine = example()
    rows = np.asarray(x)[mask]
    normed = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
    want = put_back(normed * np.asarray(affine["scale"]) + np.asarray(affine["bias"]), mask)
    y, (mean, variance) = masked_batch_norm(x, SiteMask(jnp.asarray(mask)), **affine)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, rows.var(0), rtol=1e-5)
    sites = from_mask(x, jnp.asarray(mask), capacity=48)
    of_sites, _ = masked_batch_norm(sites.feats, sites.used, **affine)
    np.testing.assert_allclose(of_sites[: mask.sum()], want[mask], rtol=1e-4, atol=1e-5)
    assert not np.any(np.asarray(of_sites)[mask.sum() :])
    running, _ = masked_batch_norm(x, SiteMask(jnp.asarray(mask)), mean=jnp.ones(6), variance=jnp.full(6, 4.0))
    np.testing.assert_allclose(running, put_back((rows - 1) / np.sqrt(4 + 1e-5), mask), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(masked_batch_norm(x, SiteMask(jnp.asarray(mask)))[0] ** 3))(x)
    assert np.all(np.isfinite(gradient))
    assert not np.any(np.asarray(gradient)[~mask])


def test_batch_norm_over_devices():
    x, mask, affine = example()
    whole, _ = masked_batch_norm(x, SiteMask(jnp.asarray(mask)), **affine)
    parts, _ = jax.vmap(
        lambda x, mask: masked_batch_norm(x[None], SiteMask(mask[None]), axis_name="samples", **affine),
        axis_name="samples",
    )(x, jnp.asarray(mask))
    np.testing.assert_allclose(parts[:, 0], whole, rtol=1e-5, atol=1e-5)


def test_layer_and_group_norm():
    x, mask, affine = example()
    sites, scale, bias = SiteMask(jnp.asarray(mask)), *(np.asarray(a) for a in affine.values())
    rows = np.asarray(x)[mask]
    normed = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(
        masked_layer_norm(x, sites, **affine), put_back(normed * scale + bias, mask), rtol=1e-4, atol=1e-5
    )
    want = np.zeros((3, 4, 4, 6))
    for sample in (0, 2):
        rows = np.asarray(x)[sample][mask[sample]].reshape(-1, 2, 3)
        mean, variance = rows.mean((0, 2), keepdims=True), rows.var((0, 2), keepdims=True)
        want[sample][mask[sample]] = ((rows - mean) / np.sqrt(variance + 1e-6)).reshape(-1, 6) * scale + bias
    np.testing.assert_allclose(masked_group_norm(x, sites, 2, **affine), want, rtol=1e-4, atol=1e-5)
    rows = from_mask(x, sites.mask, capacity=48)
    of_rows = sites_group_norm(rows, 2, **affine)
    np.testing.assert_allclose(to_dense(rows.with_feats(of_rows)), want, rtol=1e-4, atol=1e-5)
    assert not np.any(np.asarray(of_rows)[mask.sum() :])
    with pytest.raises(ValueError, match="must divide the 6 channels"):
        masked_group_norm(x, sites, 4)
    with pytest.raises(ValueError, match="must divide the 6 channels"):
        sites_group_norm(rows, 4)


def test_everything_active_is_the_ordinary_norm():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4, 6)), jnp.float32)
    every = SiteMask(jnp.ones((2, 4, 4), bool))
    np.testing.assert_array_equal(masked_batch_norm(x, every)[0], masked_batch_norm(x, None)[0])
    np.testing.assert_allclose(
        masked_batch_norm(x, None)[0], (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(masked_pool(x, every, 2), masked_pool(x, None, 2))


@pytest.mark.parametrize("reduce", ["max", "mean", "sum"])
def test_pools(reduce):
    x, mask, _ = example()
    function = {"max": np.max, "mean": np.mean, "sum": np.sum}[reduce]
    want, want_global = np.zeros((3, 2, 2, 6)), np.zeros((3, 6))
    for b in range(3):
        if mask[b].any():
            want_global[b] = function(np.asarray(x)[b][mask[b]], axis=0)
        for i in range(2):
            for j in range(2):
                cut = np.s_[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                if mask[cut].any():
                    want[b, i, j] = function(np.asarray(x)[cut][mask[cut]], axis=0)
    sites = SiteMask(jnp.asarray(mask))
    np.testing.assert_allclose(masked_pool(x, sites, 2, reduce=reduce), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(masked_global_pool(x, sites, reduce), want_global, rtol=1e-5, atol=1e-5)


def test_layers_on_tiles_without_leaving_them():
    random = np.random.default_rng(3)
    mask = random_patch_mask(jax.random.key(0), 2, (3, 3), 4)
    x = jnp.asarray(random.normal(size=(2, 24, 24, 3)), jnp.float32)
    first, second = (jnp.asarray(random.normal(size=s) / 5, jnp.float32) for s in ((3, 3, 3, 5), (3, 3, 5, 2)))
    tiles = tile_set(mask.mask, 8, capacity=8)
    check_overflow(tiles)
    y = jax.nn.relu(tile_conv(to_tiles(x, tiles), first, tiles, bias=jnp.ones(5)))
    y = from_tiles(tile_conv(y, second, tiles, stride=2), tiles.strided(2))
    want = jax.nn.relu(masked_conv(x, first, mask, bias=jnp.ones(5)))
    want = masked_conv(apply_mask(want, mask), second, mask, stride=2)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    assert bool(tile_set(mask.mask, 8, capacity=7).overflow)
    with pytest.raises(ValueError, match="farther than the next tile"):
        tile_conv(to_tiles(x, tiles), jnp.zeros((19, 19, 3, 1)), tiles)
    with pytest.raises(ValueError, match="does not divide"):
        tiles.strided(3)


def test_the_planner(monkeypatch):
    def engine(density, **options):
        return conv_plan(
            density, **({"shape": (128, 128), "kernel": 3, "channels": 32, "backend": "cpu"} | options)
        ).engine

    monkeypatch.setattr(native, "unavailable", lambda: None)
    assert [engine(density) for density in (0.01, 0.5, 1.0)] == ["sites"] * 3
    assert engine(0.1, tile=16) == engine(1.0, shape=(32, 32, 32)) == "sites"
    assert engine(0.1, groups=32) == "masked"
    assert engine(0.9, shape=(20_000, 20_000)) == "sites"
    monkeypatch.setattr(native, "unavailable", lambda: "no C++ compiler was found")
    assert [engine(density) for density in (0.01, 0.1, 0.5, 1.0)] == ["sites", "sites", "masked", "masked"]
    assert [engine(density, tile=16) for density in (0.01, 0.2, 0.4)] == ["tiles", "tiles", "masked"]
    assert engine(0.3, shape=(32, 32, 32)) == "sites"
    assert [engine(density, tile=16, backend="gpu") for density in (0.01, 0.2, 0.9)] == ["sites", "tiles", "masked"]
    assert engine(0.05, backend="tpu") == "masked"
    assert "tiles 0.038" in str(conv_plan(0.01, shape=(64, 64), kernel=3, channels=8, tile=16, backend="cpu"))
    # Windows reach farther than the next tile.
    assert engine(0.03, tile=3, kernel=9, backend="gpu") == "sites"
    assert engine(0.01, tile=3, kernel=9) == "sites"
    wrong = {"density": 2, "backend": "cuda", "channels": -8, "groups": 0, "shape": (64.5, 64), "kernel": 0}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name} is {value if name != 'shape' else 64.5!r}"):
            engine(**{"density": 0.5, name: value})
    with pytest.raises(ValueError, match="groups is 5; it must divide the 32 channels"):
        engine(0.5, groups=5)


@pytest.mark.parametrize("norm", [masked_batch_norm, masked_layer_norm, masked_group_norm, sites_group_norm])
def test_norms_refuse_what_does_not_fit(norm):
    groups = {"groups": 1} if norm in (masked_group_norm, sites_group_norm) else {}

    ones, everywhere = jnp.ones((2, 4, 3)), jnp.ones((2, 4), bool)

    def call(x=ones, on=everywhere, **options):
        if norm is sites_group_norm:
            sites = from_mask(ones, on, capacity=8)
            return norm(sites.with_feats(x.reshape(8, 3)), **groups | options)
        return norm(x, SiteMask(on), **groups | options)

    call()
    for name in ("scale", "bias"):
        with pytest.raises(ValueError, match=rf"{name} has shape \(1,\); 3 channels need"):
            call(**{name: jnp.ones(1)})
    with pytest.raises(ValueError, match="is int32; it must be floating"):
        call(ones.astype(jnp.int32))
    with pytest.raises(ValueError, match="mask is float32; it must be bool"):
        call(on=jnp.ones((2, 4)))
    if groups:
        with pytest.raises(ValueError, match="groups is 0"):
            call(groups=0)


def test_masks_fit_the_samples_or_are_one_for_all():
    x, weights = jnp.ones((3, 4, 2)), jnp.ones((1, 2, 2))
    one, two = (SiteMask(jnp.arange(samples * 4).reshape(samples, 4) % 2 == 0) for samples in (1, 2))
    _, (mean, _) = masked_batch_norm(x, one)
    np.testing.assert_array_equal(mean, [1, 1])
    np.testing.assert_array_equal(masked_global_pool(x, one), np.ones((3, 2)))
    for call in (lambda: masked_conv(x, weights, two), lambda: masked_batch_norm(x, two)):
        with pytest.raises(ValueError, match="the mask is of 2 samples"):
            call()
    with pytest.raises(ValueError, match=r"bias has shape \(1,\)"):
        masked_conv(x, weights, None, bias=jnp.ones(1))
