"""Every engine against the convolution computed by hand: forward, gradients, corner cases, the same bits again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conv_problems import ENGINES, by_hand, gradients_by_hand, listed, problem, tiled
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.convolution import SiteMask, masked_conv

CASES = {
    "1-D, side 5": {"dims": 1, "kernel": 5},
    "2-D, dilated": {"dims": 2, "kernel": 3, "dilation": 2},
    "2-D, strided": {"dims": 2, "kernel": 3, "stride": 2, "density": 0.6},
    "2-D, side 1, strided": {"dims": 2, "kernel": 1, "stride": 2},
    "2-D, depthwise": {"dims": 2, "kernel": 3, "inputs": 4, "outputs": 4, "groups": 4, "tile": 2},
    "2-D, two groups": {"dims": 2, "kernel": 3, "inputs": 4, "outputs": 6, "groups": 2, "stride": 2},
    "3-D": {"dims": 3, "kernel": 3, "tile": 2},
    "4-D": {"dims": 4, "kernel": 3, "tile": 2, "grid": 2},
}


def compare(p, engine, *, reference=False, tolerance=1e-5):
    mask_out = p.mask_out[..., None]
    want = by_hand(p.x, p.weights, p.stride, p.dilation, p.groups) * mask_out
    upstream = np.random.default_rng(1).normal(size=want.shape) * mask_out

    @jax.jit
    def run(x, weights):
        out, back = jax.vjp(lambda x, w: engine(p, x, w), x, weights)
        return out, *back(jnp.asarray(upstream, out.dtype))

    out, dx, dw = run(p.x, p.weights)
    assert out.dtype == p.x.dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=tolerance, atol=tolerance)
    want_dx, want_dw = gradients_by_hand(p, upstream)
    np.testing.assert_allclose(
        np.asarray(dx, np.float64), want_dx * p.mask[..., None], rtol=tolerance, atol=5 * tolerance
    )
    np.testing.assert_allclose(np.asarray(dw, np.float64), want_dw, rtol=tolerance, atol=50 * tolerance)
    return run


QUICK = ("1-D, side 5", "2-D, strided")
SLOW_BUT_SITES = [e if e == "sites" else pytest.param(e, marks=pytest.mark.slow) for e in ENGINES]
GEOMETRIES = [(1, 3), (1, 5), (2, 1), (2, 2), (2, 3), (3, 3)]


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_compute_the_masked_convolution(engine, case):
    compare(problem(**CASES[case]), ENGINES[engine])


@pytest.mark.parametrize(
    ("stride", "dilation", "padding", "groups"),
    [
        ((2, 1, 3), (1, 2, 1), ((1, 2), (0, 1), (2, 0)), 2),
        pytest.param((1, 1, 1), (1, 1, 1), "SAME", 1, marks=pytest.mark.slow),
        pytest.param((3, 3, 3), (2, 2, 2), "VALID", 4, marks=pytest.mark.slow),
    ],
)
def test_convolutions_of_volumes_by_planes_are_those_of_xla(stride, dilation, padding, groups):
    random = np.random.default_rng(0)
    x, weights = (
        jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((2, 9, 8, 7, 4), (3, 2, 3, 4 // groups, 8))
    )
    options = {"rhs_dilation": dilation, "feature_group_count": groups}

    def whole(x, weights):
        layout = ("NDHWC", "DHWIO", "NDHWC")
        return jax.lax.conv_general_dilated(x, weights, stride, padding, dimension_numbers=layout, **options)

    def planes(x, weights):
        return masked_conv(x, weights, None, stride=stride, padding=padding, dilation=dilation, groups=groups)

    @functools.partial(jax.jit, static_argnums=0)
    def computed(call, x, weights):
        y, pull = jax.vjp(call, x, weights)
        return y, *pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    for got, want in zip(computed(planes, x, weights), computed(whole, x, weights), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert planes(x[:, :0], weights).shape == whole(x[:, :0], weights).shape


@pytest.mark.slow
@pytest.mark.parametrize("engine", [tiled, listed])
def test_reference_paths(engine):
    p = problem(dims=2, kernel=3, stride=2, inputs=4, groups=2)
    compare(p, lambda p, x, w: engine(p, x, w, "reference"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16(engine):
    p = problem()
    half = type(p)(p.x.astype(jnp.bfloat16), p.weights.astype(jnp.bfloat16), p.coarse, p.tile)
    compare(half, ENGINES[engine], tolerance=3e-2)


@pytest.mark.parametrize("engine", SLOW_BUT_SITES)
def test_all_and_none_active_and_the_same_bits_again(engine):
    dense = problem(density=1.1)
    run = compare(dense, ENGINES[engine])
    first, second = run(dense.x, dense.weights), run(dense.x, dense.weights)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    empty = problem(density=-1.0)
    assert not np.any(np.asarray(ENGINES[engine](empty, empty.x, empty.weights)))


@pytest.mark.parametrize("engine", SLOW_BUT_SITES)
def test_translation_moves_the_result_and_borders_are_zeros(engine):
    p = problem(density=-1.0, grid=4)
    near = np.zeros((2, 4, 4), bool)
    near[0, 1, 1] = near[1, 0, 3] = True
    far = np.roll(near, (1, 1), (1, 2))
    far[1] = False  # the second sample's tile lies at the border, where a shift wraps around
    values = np.random.default_rng(2).normal(size=(2, 4, 4, 3)).astype(np.float32)
    x = np.full((2, 16, 16, 3), np.nan, np.float32)
    x[0, 4:8, 4:8], x[1, 0:4, 12:16] = values[0], values[1]
    moved = np.full_like(x, np.nan)
    moved[0, 8:12, 8:12] = values[0]
    run = jax.jit(lambda coarse, x: ENGINES[engine](type(p)(x, p.weights, coarse, 4), x, p.weights))
    here, there = run(jnp.asarray(near), jnp.asarray(x)), run(jnp.asarray(far), jnp.asarray(moved))
    np.testing.assert_allclose(np.asarray(here)[0, 4:8, 4:8], np.asarray(there)[0, 8:12, 8:12], rtol=1e-6, atol=1e-6)
    want = by_hand(x, p.weights)[1, 0:4, 12:16]
    np.testing.assert_allclose(np.asarray(here)[1, 0:4, 12:16], want, rtol=1e-5, atol=1e-5)
    assert run._cache_size() == 1  # two masks with different counts compile once


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from(GEOMETRIES),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from([(2, 3, 1), (4, 6, 2), (3, 3, 3)]),
    st.sampled_from([0.1, 0.5, 0.9]),
    st.integers(0, 10**6),
)
def test_engines_on_random_problems(engine, geometry, stride, dilation, features, density, seed):
    dims, kernel = geometry
    if kernel % 2 == 0:
        stride, dilation = 2, 1
    inputs, outputs, groups = features
    sizes = {"inputs": inputs, "outputs": outputs, "groups": groups, "density": density, "seed": seed}
    compare(problem(dims, kernel, stride, dilation, tile=4 if dims < 3 else 2, **sizes), ENGINES[engine])


def test_mask_of_every_stage_is_the_coarse_one_repeated():
    mask = SiteMask(jnp.asarray(np.random.default_rng(0).random((2, 3, 3)) < 0.5))
    for size in (3, 6, 12, 24):
        np.testing.assert_array_equal(
            mask.at((size, size)), np.kron(mask.mask, np.ones((1, size // 3, size // 3), bool))
        )
    np.testing.assert_array_equal(SiteMask(mask.at((12, 12))).at((3, 3)), mask.mask)
    with pytest.raises(ValueError, match="neither of 3 and 4 is a multiple"):
        mask.at((4, 3))


@pytest.mark.peers
@pytest.mark.parametrize(("dims", "stride"), [(2, 1), (2, 2), (3, 2)])
def test_engines_equal_torch(dims, stride):
    import torch

    p = problem(dims=dims, kernel=3, stride=stride, tile=4 if dims == 2 else 2)
    x = torch.from_numpy(np.moveaxis(np.nan_to_num(np.asarray(p.x)), -1, 1).copy())
    weights = torch.from_numpy(np.moveaxis(np.asarray(p.weights), (-1, -2), (0, 1)).copy())
    low, high = (0, 1) if stride == 2 else (1, 1)  # "SAME" of an even side
    x = torch.nn.functional.pad(x, (low, high) * dims)
    conv = {2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}[dims]
    want = np.moveaxis(conv(x, weights, stride=stride).numpy(), 1, -1) * p.mask_out[..., None]
    for engine in ENGINES.values():
        np.testing.assert_allclose(engine(p, p.x, p.weights), want, rtol=1e-5, atol=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize("dims", [1, 3])
def test_engines_equal_scipy(dims):
    from scipy.ndimage import correlate

    p = problem(dims=dims, kernel=3, tile=4 if dims == 1 else 2, inputs=2, outputs=2)
    x, weights = np.nan_to_num(np.asarray(p.x, np.float64)), np.asarray(p.weights, np.float64)
    want = np.zeros((*x.shape[:-1], 2))
    for b, i, o in np.ndindex(len(x), 2, 2):
        want[b, ..., o] += correlate(x[b, ..., i], weights[..., i, o], mode="constant")
    for engine in ENGINES.values():
        got = engine(p, p.x, p.weights)
        np.testing.assert_allclose(got, want * p.mask_out[..., None], rtol=1e-5, atol=1e-5)
