"""Modules of sparse convolution hold the parameters of Flax's, and compute at active sites what those do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.convolution import SiteMask, from_mask, from_tiles, strided_map, subm_map, tile_set, to_dense, to_tiles
from sparsejax.masks.block import Block
from sparsejax.nn import (
    InverseSparseConv,
    MaskedBatchNorm,
    MaskedConv,
    SiteBatchNorm,
    StridedSparseConv,
    SubmanifoldConv,
    sparsify_model,
)

SLOW = pytest.param({"feature_group_count": 4, "kernel_dilation": 2}, marks=pytest.mark.slow)
COARSE = jnp.array([[[True, False], [False, True]], [[False, True], [False, False]]])


def image(features=4, side=8, seed=0):
    return jax.random.normal(jax.random.key(seed), (2, side, side, features))


def scattered(features=4, density=0.3):
    """An image, zero but at random sites, and these as a list."""
    mask = jax.random.bernoulli(jax.random.key(7), density, (2, 8, 8))
    x = jnp.where(mask[..., None], image(features), 0)
    return x, from_mask(x, mask, capacity=int(mask.sum()) + 3)


def at(sites, dense):
    """The values of a dense array at sites, zeros in empty rows."""
    rows = np.asarray(dense)[(np.minimum(sites.batch, len(dense) - 1), *np.moveaxis(np.asarray(sites.coords), 1, 0))]
    return np.where(sites.used, rows, 0)


def take_over(layer, other):
    nnx.update(layer, nnx.state(other))
    return layer


@pytest.mark.parametrize(
    ("ours", "flax"),
    [
        (MaskedConv(4, 6, (3, 3), rngs=nnx.Rngs(0)), nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0))),
        (SubmanifoldConv(4, 6, (3, 3), rngs=nnx.Rngs(0)), nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0))),
        (
            StridedSparseConv(4, 6, (2, 2, 2), 2, use_bias=False, rngs=nnx.Rngs(0)),
            nnx.Conv(4, 6, (2, 2, 2), strides=2, use_bias=False, rngs=nnx.Rngs(0)),
        ),
        (InverseSparseConv(4, 6, (2, 2), rngs=nnx.Rngs(0)), nnx.ConvTranspose(4, 6, (2, 2), 2, rngs=nnx.Rngs(0))),
        (
            SubmanifoldConv(4, 4, (3,), feature_group_count=4, rngs=nnx.Rngs(0)),
            nnx.Conv(4, 4, (3,), feature_group_count=4, rngs=nnx.Rngs(0)),
        ),
        (MaskedBatchNorm(4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))),
        (SiteBatchNorm(4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_seed_gives_the_variables_of_flax(ours, flax):
    ours, flax = nnx.state(ours), nnx.state(flax)
    assert jax.tree.structure(ours) == jax.tree.structure(flax)
    jax.tree.map(np.testing.assert_array_equal, ours, flax)


def test_masked_conv_without_a_mask_is_conv():
    options = {"strides": 2, "padding": "CIRCULAR", "rngs": nnx.Rngs(0)}
    dense, ours = nnx.Conv(4, 6, (3, 3), **options), MaskedConv(4, 6, (3, 3), **options)
    np.testing.assert_array_equal(take_over(ours, dense)(image()), dense(image()))


@pytest.mark.parametrize("options", [{"strides": 2}, SLOW], ids=str)
def test_masked_conv_reads_and_writes_active_sites(options):
    layer = MaskedConv(4, 8, (3, 3), **options, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(8.0)
    mask, side = SiteMask(COARSE), 8 // options.get("strides", 1)
    inside, outside = (mask.at((n, n))[..., None] for n in (8, side))

    def total(layer, x, mask=mask):
        return jnp.sum(jnp.cos(y := layer(x, mask))), y

    (_, y), grads = nnx.jit(nnx.value_and_grad(total, has_aux=True))(layer, jnp.where(inside, image(), jnp.nan))
    dense = take_over(nnx.Conv(4, 8, (3, 3), **options, rngs=nnx.Rngs(0)), layer)
    np.testing.assert_allclose(y, jnp.where(outside, dense(jnp.where(inside, image(), 0)), 0), atol=1e-5)

    tiles = tile_set(COARSE, 4, capacity=4)

    def tiled(layer):
        y = layer(to_tiles(image(), tiles), tiles)
        return jnp.sum(jnp.cos(y) * tiles.used[:, None, None, None]), y

    (_, y_tiles), grads_tiles = nnx.jit(nnx.value_and_grad(tiled, has_aux=True))(layer)
    np.testing.assert_allclose(from_tiles(y_tiles, tiles.strided(options.get("strides", 1))), y, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads_tiles, grads)


@pytest.mark.parametrize("options", [{"kernel_dilation": 2}, {"feature_group_count": 4, "use_bias": False}], ids=str)
def test_submanifold_conv_is_conv_at_its_sites(options):
    x, sites = scattered()
    layer = SubmanifoldConv(4, 4, (3, 3), **options, rngs=nnx.Rngs(0))
    dense = take_over(nnx.Conv(4, 4, (3, 3), **options, rngs=nnx.Rngs(1)), layer)
    out = nnx.jit(lambda layer, sites: layer(sites))(layer, sites)
    np.testing.assert_allclose(out.feats, at(sites, dense(x)), atol=1e-5)
    shared = jax.jit(subm_map, static_argnames=("kernel", "dilation"))(
        sites, 3, dilation=options.get("kernel_dilation", 1)
    )
    np.testing.assert_allclose(layer(sites, shared).feats, out.feats, atol=1e-6)


@pytest.mark.parametrize(("side", "padding"), [(2, None), pytest.param(3, "SAME", marks=pytest.mark.slow)])
def test_strided_conv_and_its_inverse_are_those_of_flax(side, padding):
    x, sites = scattered()
    window = (side, side)
    down = StridedSparseConv(4, 6, window, 2, padding=padding, rngs=nnx.Rngs(0))
    dense_down = take_over(nnx.Conv(4, 6, window, strides=2, rngs=nnx.Rngs(1)), down)
    back = InverseSparseConv(6, 3, window, rngs=nnx.Rngs(2))
    dense_back = take_over(nnx.ConvTranspose(6, 3, window, 2, rngs=nnx.Rngs(3)), back)

    @nnx.jit
    def there_and_back(down, back, sites):
        out, kernel_map = strided_map(sites, window, 2, padding=padding)
        coarse = down(sites, out, kernel_map)
        return coarse, down(sites), back(coarse, sites, kernel_map)

    coarse, by_itself, fine = there_and_back(down, back, sites)
    np.testing.assert_allclose(coarse.feats, at(coarse, dense_down(x)), atol=1e-5)
    np.testing.assert_allclose(by_itself.feats, coarse.feats, atol=1e-6)
    np.testing.assert_allclose(fine.feats, at(sites, dense_back(to_dense(coarse))), atol=1e-5)


def test_norms_agree_with_flax_where_all_sites_are_active():
    x = image()
    dense = nnx.BatchNorm(4, momentum=0.5, use_fast_variance=False, rngs=nnx.Rngs(0))
    everywhere = MaskedBatchNorm(4, momentum=0.5, rngs=nnx.Rngs(0))
    unmasked = MaskedBatchNorm(4, momentum=0.5, use_fast_variance=False, rngs=nnx.Rngs(0))
    for average in (False, True):
        y = dense(x, use_running_average=average)
        masked = everywhere(x, average, mask=SiteMask(jnp.ones((2, 1, 1), bool)))
        np.testing.assert_allclose(masked, y, atol=1e-5)
        np.testing.assert_array_equal(unmasked(x, average), y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), nnx.state(everywhere), nnx.state(dense))


def test_norms_of_arrays_tiles_and_sites_agree():
    mask = SiteMask(COARSE).at((8, 8))
    x = jnp.where(mask[..., None], image(), jnp.nan)
    tiles, sites = tile_set(COARSE, 4, capacity=4), from_mask(x, mask, capacity=60)
    norms = [kind(4, momentum=0.5, rngs=nnx.Rngs(0)) for kind in (MaskedBatchNorm, MaskedBatchNorm, SiteBatchNorm)]
    for norm in norms:
        norm.scale[...], norm.bias[...] = jnp.arange(1.0, 5.0), jnp.arange(4.0)
    rows = np.asarray(x)[np.asarray(mask)]
    for average in (False, True):
        dense, tiled, listed = norms
        results = [
            dense(x, average, mask=SiteMask(COARSE)),
            from_tiles(tiled(to_tiles(x, tiles), average, mask=tiles), tiles),
            to_dense(listed(sites, average)),
        ]
        mean = rows.mean(0) * (0.5 if average else 1)
        variance = 0.5 + 0.5 * rows.var(0) if average else rows.var(0)
        want = np.zeros(x.shape, np.float32)
        want[np.asarray(mask)] = (rows - mean) / np.sqrt(variance + 1e-5) * np.arange(1, 5) + np.arange(4)
        for result in results:
            np.testing.assert_allclose(result, want, atol=1e-4)


def test_computation_in_bfloat16():
    x, sites = scattered()
    layer = SubmanifoldConv(4, 4, (3, 3), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert layer.kernel[...].dtype == jnp.float32
    out = layer(sites)
    norm = SiteBatchNorm(4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert out.feats.dtype == norm(out).feats.dtype == jnp.bfloat16
    dense = take_over(nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(1)), layer)
    np.testing.assert_allclose(out.feats.astype(float), at(sites, dense(x)), atol=0.05)


@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_masked_conv_takes_the_leading_axes_of_conv(lead):
    layer = MaskedConv(4, 6, (3, 3), strides=2, rngs=nnx.Rngs(0))
    samples = max(1, math.prod(lead))
    x = jax.random.normal(jax.random.key(0), (samples, 8, 8, 4))
    mask = SiteMask(jax.random.bernoulli(jax.random.key(1), 0.5, (samples, 4, 4)))
    got = layer(x.reshape(*lead, 8, 8, 4), mask)
    assert got.shape == (*lead, 4, 4, 6)
    np.testing.assert_array_equal(got.reshape(samples, 4, 4, 6), layer(x, mask))


@pytest.mark.parametrize(
    "options", [{"input_dilation": (1, 1)}, {"padding": ((1, 1), (1, 1))}, {"padding": 1}], ids=str
)
def test_tiles_take_what_equals_same_padding(options):
    tiles = tile_set(COARSE, 4, capacity=4)
    x = to_tiles(image(), tiles)
    layer, plain = (MaskedConv(4, 6, (3, 3), **each, rngs=nnx.Rngs(0)) for each in (options, {}))
    np.testing.assert_array_equal(layer(x, tiles), plain(x, tiles))


def test_what_does_not_fit_is_refused():
    tiles = tile_set(COARSE, 4, capacity=4)
    with pytest.raises(ValueError, match="padding is 0, which tiles lack"):
        MaskedConv(4, 4, (3, 3), padding=0, rngs=nnx.Rngs(0))(to_tiles(image(), tiles), tiles)
    with pytest.raises(ValueError, match=r"wrap bool \(samples"):
        MaskedConv(4, 4, (3, 3), rngs=nnx.Rngs(0))(image(), jnp.ones((2, 8, 8), bool))
    with pytest.raises(ValueError, match="x has 4 features; this layer normalises 7"):
        SiteBatchNorm(7, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))(scattered()[1])
    with pytest.raises(ValueError, match="feature_group_count is 0"):
        SubmanifoldConv(4, 4, (3, 3), feature_group_count=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="give both out and kernel_map"):
        StridedSparseConv(4, 4, (2, 2), 2, rngs=nnx.Rngs(0))(scattered()[1], scattered()[1])
    with pytest.raises(ValueError, match="padding is 'VALID', which tiles lack"):
        MaskedConv(4, 4, (3, 3), padding="VALID", rngs=nnx.Rngs(0))(to_tiles(image(), tiles), tiles)
    with pytest.raises(ValueError, match="axis 1 and"):
        MaskedBatchNorm(8, axis=1, rngs=nnx.Rngs(0))(image(), mask=SiteMask(COARSE))
    with pytest.raises(ValueError, match="use_running_average is None"):
        MaskedBatchNorm(4, use_running_average=None, rngs=nnx.Rngs(0))(image(), mask=SiteMask(COARSE))
    model = nnx.Dict(conv=MaskedConv(8, 8, (1, 1), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="unusual __call__"):
        sparsify_model(model, Block((4, 4)))
