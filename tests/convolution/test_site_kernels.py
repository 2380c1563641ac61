"""What only the paths of the convolution over rows do: how they are chosen, and the C++ kernels at odd sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conv_problems import COMPILER
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import native as build
from pallas_kernels.sparse_conv import explain, native, sparse_conv
from sparsejax.convolution import check_overflow, from_coords, strided_map, subm_map

needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler; the refusal test ran")


def example(count=300, inputs=3, outputs=5, groups=1, shape=(40, 30), dtype=np.float32, search=None, seed=0):
    """Rows, weights and a map of sites in two samples, with empty rows at the end."""
    random = np.random.default_rng(seed)
    places = random.choice(2 * int(np.prod(shape)), count, replace=False)
    batch, *coords = np.unravel_index(places, (2, *shape))
    feats = random.normal(size=(count, inputs)).astype(dtype)
    arrays = (jnp.asarray(a) for a in (batch, np.stack(coords, -1), feats))
    sites = from_coords(*arrays, shape=shape, batch_size=2, capacity=count + 7)
    weights = random.normal(size=(3 ** len(shape), inputs // groups, outputs)).astype(dtype)
    return sites, jnp.asarray(weights), subm_map(sites, 3, search=search)


@functools.partial(jax.jit, static_argnums=(3, 4))
def computed(x, weights, kernel_map, groups, implementation):
    """y, dx and dw."""
    call = lambda x, w: sparse_conv(x, w, kernel_map, groups=groups, implementation=implementation)  # noqa: E731
    y, pull = jax.vjp(call, x, weights)
    return y, *pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


def test_the_choice_without_a_compiler(monkeypatch):
    monkeypatch.setattr(build, "unavailable", lambda source, targets: "no C++ compiler was found")
    sites, weights, kernel_map = example(30, search="grid")
    choice = explain(sites.feats, weights, kernel_map)
    assert choice.name == "xla"
    assert "native refused: no C++ compiler was found" in str(choice)
    with pytest.raises(ValueError, match="no C\\+\\+ compiler was found"):
        sparse_conv(sites.feats, weights, kernel_map, implementation="native")
    want = sparse_conv(sites.feats, weights, kernel_map, implementation="xla")
    np.testing.assert_array_equal(sparse_conv(sites.feats, weights, kernel_map), want)
    with pytest.raises(ValueError, match="search='native' does not work here: no C"):
        subm_map(sites, 3, search="native")
    for a, b in zip(jax.tree.leaves(subm_map(sites, 3)), jax.tree.leaves(kernel_map), strict=True):
        np.testing.assert_array_equal(a, b)


def test_named_paths_work_or_refuse():
    sites, weights, kernel_map = example(30)
    with pytest.raises(ValueError, match="tpu refused: TPUs gather rows slowly"):
        sparse_conv(sites.feats, weights, kernel_map, implementation="tpu")
    with pytest.raises(ValueError, match="implementation='fast'"):
        sparse_conv(sites.feats, weights, kernel_map, implementation="fast")
    with pytest.raises(ValueError, match="x is int32"):
        sparse_conv(sites.feats.astype(jnp.int32), weights, kernel_map)
    if COMPILER:
        assert explain(sites.feats, weights, kernel_map).name == "native"


def compare(features, sizes, dtype, seed):
    (inputs, outputs, groups), (count, side) = features, sizes
    with jax.enable_x64(dtype == np.float64):
        sites, weights, kernel_map = example(count, inputs, outputs, groups, (side,), dtype, seed=seed)
        call = sites.feats, weights, kernel_map, groups
        tolerance = 1e-12 if dtype == np.float64 else 3e-4
        for got, want in zip(computed(*call, "native"), computed(*call, "reference"), strict=True):
            assert got.dtype == want.dtype == dtype
            np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@needs_compiler
@pytest.mark.parametrize(
    ("features", "sizes", "dtype"),
    [
        ((35, 48, 1), (2100, 2400), np.float32),  # several parts and panels
        ((3, 17, 1), (2100, 1100), np.float32),  # most tiles are whole
        ((4, 32, 1), (2100, 1050), np.float32),  # all sites are active: gradients read rows where they lie
        ((6, 4, 2), (40, 40), np.float64),
    ],
)
def test_native_equals_reference(features, sizes, dtype):
    compare(features, sizes, dtype, 0)


@needs_compiler
@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from([(1, 1, 1), (3, 17, 1), (16, 33, 1), (6, 4, 2), (5, 5, 5), (35, 48, 1), (4, 8, 4)]),
    st.sampled_from([(1, 4), (9, 40), (700, 1200), (2100, 2400), (2100, 1100)]),
    st.sampled_from([np.float32, np.float64]),
    st.integers(0, 10**6),
)
def test_native_equals_reference_at_any_size(features, sizes, dtype, seed):
    compare(features, sizes, dtype, seed)


def one_by_one(listed, rows, window, scale, shift, spread):
    """What `native.neighbours` finds, from a dictionary of all sites."""
    batch, keys, shape, samples = (np.asarray(part) for part in listed)
    known = {(b, k): row for row, (b, k) in enumerate(zip(batch.tolist(), keys.tolist(), strict=True)) if b < samples}
    batch, keys, rows_shape = (np.asarray(part) for part in rows[:3])
    table = np.full((np.prod(window), len(keys)), len(listed[1]), np.int32)
    for row in np.flatnonzero(batch < samples):
        coords = np.array(np.unravel_index(keys[row], rows_shape))
        for number, tap in enumerate(np.ndindex(*window)):
            at = coords * scale + shift + np.array(tap) * spread
            if np.all((at >= 0) & (at < shape)):
                key = int(np.ravel_multi_index(tuple(at), tuple(shape)))
                table[number, row] = known.get((batch[row], key), len(listed[1]))
    return table


@needs_compiler
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_native_neighbours_are_those_of_a_search_one_by_one(data):
    dims, random = data.draw(st.integers(1, 4)), np.random.default_rng(data.draw(st.integers(0, 10**6)))

    def each(low, high):
        return tuple(random.integers(low, high, dims).tolist())

    def sorted_sites(shape, samples):
        size = int(np.prod(shape))
        places = np.unique(random.integers(0, samples * size, int(random.integers(1, 60))))
        batch, keys = np.full((2, len(places) + 3), 2**31 - 1, np.int32)
        batch[:], batch[: len(places)], keys[: len(places)] = samples, places // size, places % size
        return batch, keys, shape, samples

    most = 20_000 if data.draw(st.booleans()) and dims < 3 else 64 // 4 ** (dims - 1) + 2  # walked along, or bits
    samples, window, spread = int(random.integers(1, 4)), each(1, 4), each(1, 40 // dims)
    listed = rows = sorted_sites(each(1, most), samples)
    scale, shift = (1,) * dims, tuple(-(side // 2) * d for side, d in zip(window, spread, strict=True))
    if data.draw(st.booleans()):
        rows, scale, shift = sorted_sites(each(1, most), samples), each(1, 4), each(-9, 4)
    found = native.neighbours(listed, rows, window, scale=scale, shift=shift, spread=spread)
    np.testing.assert_array_equal(found, one_by_one(listed, rows, window, scale, shift, spread))
    back = np.full((len(found), len(listed[1])), len(rows[1]), np.int32)
    for tap, row in np.argwhere(np.asarray(found) < len(listed[1])):
        back[tap, found[tap, row]] = row
    np.testing.assert_array_equal(native.inverse(found, len(listed[1])), back)


@needs_compiler
def test_native_gives_the_same_bits_again_and_for_more_rows():
    sites, weights, kernel_map = example(2300, 8, 16, shape=(60, 60))
    first = computed(sites.feats, weights, kernel_map, 1, "native")
    for _ in range(3):
        jax.tree.map(np.testing.assert_array_equal, computed(sites.feats, weights, kernel_map, 1, "native"), first)
    half = sites.feats.astype(jnp.bfloat16)
    got = sparse_conv(half, weights, kernel_map)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), first[0], rtol=0.1, atol=0.3)


@needs_compiler
def test_native_under_vmap_is_one_call_for_each_element():
    sites, weights, kernel_map = example(50)
    stack = jnp.stack([weights, 2 * weights])
    y = jax.jit(jax.vmap(lambda w: sparse_conv(sites.feats, w, kernel_map, implementation="native")))(stack)
    np.testing.assert_allclose(y[1], 2 * y[0], rtol=1e-6)


@pytest.mark.slow
def test_many_sites_in_a_huge_grid():
    shape, random = (20_000, 20_000), np.random.default_rng(0)
    near = random.integers(0, 19_998, size=(1500, 2))
    coords = jnp.asarray(np.concatenate([near, near + random.integers(0, 2, size=near.shape)]))
    count = len(coords)
    feats = jnp.asarray(random.normal(size=(count, 4)), jnp.float32)
    sites = from_coords(jnp.zeros(count, int), coords, feats, shape=shape, batch_size=1, capacity=count)
    check_overflow(sites)
    found, searched = subm_map(sites, 3), subm_map(sites, 3, search="bisect")
    np.testing.assert_array_equal(found.fwd, searched.fwd)
    assert int(jnp.sum(found.fwd[0] < count)) > 100
    down, searched = strided_map(sites, 2, 2)[1], strided_map(sites, 2, 2, search="bisect")[1]
    np.testing.assert_array_equal(down.bwd, searched.bwd)
    weights = jnp.asarray(random.normal(size=(9, 4, 3)), jnp.float32)
    for got, want in zip(
        *(computed(sites.feats, weights, found, 1, name) for name in (None, "reference")), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
