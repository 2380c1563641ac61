"""Lists of sites and kernel maps: their construction, capacity, transposes, and what follows for convolutions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conv_problems import COMPILER, by_hand
from flax import nnx

from pallas_kernels.sparse_conv import pair_lists
from sparsejax import convolution
from sparsejax.convolution import (
    SiteMask,
    check_overflow,
    from_mask,
    masked_conv,
    masked_global_pool,
    masked_pool,
    sites_global_pool,
    sites_group_norm,
    sparse_conv,
    sparse_pool,
    tile_conv,
    tile_set,
    to_dense,
)
from sparsejax.nn import SubmanifoldConv

RANDOM = np.random.default_rng(0)
SEARCHES = ("native", "grid", "bisect")[not COMPILER :]
FOUR = {"shape": (4,), "batch_size": 2, "capacity": 3}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


from_coords = jax.jit(convolution.from_coords, static_argnames=("shape", "batch_size", "capacity", "duplicates"))
subm_map = jax.jit(convolution.subm_map, static_argnames=("kernel", "search"))
strided_map = jax.jit(convolution.strided_map, static_argnames=("kernel", "stride", "capacity", "search"))


def points(shape, count=60, samples=3, channels=4, repeats=False, seed=0):
    random = np.random.default_rng(seed)
    places = random.choice(samples * int(np.prod(shape)), count, replace=repeats)
    batch, *coords = np.unravel_index(places, (samples, *shape))
    feats = random.normal(size=(count, channels)).astype(np.float32)
    return jnp.asarray(batch), jnp.asarray(np.stack(coords, -1)), jnp.asarray(feats)


def make(shape=(7, 9), capacity=64, **options):
    samples = options.pop("samples", 3)
    return from_coords(*points(shape, samples=samples, **options), shape=shape, batch_size=samples, capacity=capacity)


def normal(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("duplicates", [slow("sum"), "mean", slow("max")])
def test_order_and_duplicates(duplicates):
    batch, coords, feats = points((5, 4), count=60, samples=2, repeats=True)
    build = jax.jit(
        lambda *arrays: from_coords(*arrays, shape=(5, 4), batch_size=2, capacity=50, duplicates=duplicates)
    )
    sites = build(batch, coords, feats)
    order = np.random.default_rng(1).permutation(60)
    again = build(batch[order], coords[order], feats[order])
    np.testing.assert_array_equal(sites.keys, again.keys)
    np.testing.assert_allclose(sites.feats, again.feats, rtol=1e-5, atol=1e-5)
    reduce = {"sum": np.sum, "mean": np.mean, "max": np.max}[duplicates]
    want = np.zeros((2, 5, 4, 4), np.float32)
    for b, i, j in set(map(tuple, np.column_stack([batch, coords]).tolist())):
        same = np.all(np.column_stack([batch, coords]) == (b, i, j), axis=1)
        want[b, i, j] = reduce(np.asarray(feats)[same], axis=0)
    np.testing.assert_allclose(to_dense(sites), want, rtol=1e-5, atol=1e-5)


def test_overflow_is_exact_and_reported():
    batch, coords, feats = points((7, 9), count=60)
    sites = [
        from_coords(batch, coords, feats, shape=(7, 9), batch_size=3, capacity=capacity) for capacity in (59, 60, 61)
    ]
    assert [bool(each.overflow) for each in sites] == [True, False, False]
    np.testing.assert_array_equal(sites[0].keys, sites[1].keys[:59])
    check_overflow(*sites[1:])
    with pytest.raises(ValueError, match="argument 0, a Sites of capacity 59"):
        check_overflow(sites[0])
    assert bool(strided_map(sites[1], 2, 2, capacity=8)[0].overflow)


def test_points_outside_and_invalid_ones_are_left_out():
    batch, coords = jnp.array([0, 0, 2, 0, -1]), jnp.array([[1], [4], [1], [2], [1]])
    valid = jnp.array([True, True, True, False, True])
    sites = from_coords(batch, coords, jnp.ones((5, 1)), shape=(4,), batch_size=2, capacity=5, valid=valid)
    assert int(sites.count) == 1
    np.testing.assert_array_equal(to_dense(sites)[0, :, 0], [0, 1, 0, 0])


@pytest.mark.parametrize("kind", [np.uint8, np.uint32, np.int64, np.uint64])
def test_numbers_beyond_int32_are_outside(kind):
    far = np.iinfo(kind).max
    batch = np.array([0, 0, far, 1, min(far, 2**32)], kind)
    coords = np.array([[far], [2], [1], [min(far, 2**32 + 1)], [3]], kind)
    if kind in (np.uint8, np.uint32):
        batch, coords = jnp.asarray(batch), jnp.asarray(coords)
    sites = convolution.from_coords(batch, coords, np.ones((5, 1), np.float32), **FOUR)
    np.testing.assert_array_equal(to_dense(sites)[..., 0], [[0, 0, 1, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("shape", [(40,), slow((4, 5, 6))])
def test_all_searches_make_one_map(shape):
    sites = make(shape, 70, count=40)
    first, *others = (jax.tree.leaves(strided_map(sites, 3, 2, search=s)) for s in SEARCHES)
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="search is 'hash'"):
        convolution.subm_map(sites, 3, search="hash")


@pytest.mark.parametrize(("kernel", "stride"), [slow(3, 1), (3, 2), slow(2, 2), slow((3, 2), (1, 2))])
def test_maps_are_consistent_and_transpose(kernel, stride):
    sites = make()
    out, kernel_map = strided_map(sites, kernel, stride) if stride != 1 else (sites, subm_map(sites, kernel))
    fwd, bwd = np.asarray(kernel_map.fwd), np.asarray(kernel_map.bwd)
    pairs = {(i, o, k) for k, o in itertools.product(*map(range, fwd.shape)) if (i := fwd[k, o]) < bwd.shape[1]}
    assert pairs == {(i, o, k) for k, i in itertools.product(*map(range, bwd.shape)) if (o := bwd[k, i]) < fwd.shape[1]}
    lists = pair_lists(kernel_map)
    assert pairs == {
        (int(lists.sources[k, n]), int(lists.targets[k, n]), k)
        for k in range(fwd.shape[0])
        for n in range(int(lists.counts[k]))
    }
    for a, b in zip(jax.tree.leaves(kernel_map), jax.tree.leaves(kernel_map.T.T), strict=True):
        np.testing.assert_array_equal(a, b)
    window = (kernel, kernel) if isinstance(kernel, int) else kernel
    weights, z = normal(*window, 4, 5), normal(out.capacity, 5) * out.used
    left = jnp.vdot(sparse_conv(sites.feats, weights, kernel_map), z)
    right = jnp.vdot(sites.feats, sparse_conv(z, weights.swapaxes(-1, -2), kernel_map.T))
    np.testing.assert_allclose(left, right, rtol=1e-4)


@pytest.mark.parametrize("kernel", [slow(2), 3])
def test_strided_equals_dense_everywhere_and_capacity_does_not_matter(kernel):
    sites, wide = make((7, 9), 64), make((7, 9), 128)
    weights, bias = normal(kernel, kernel, 4, 5), normal(5)
    results = []
    for each in (sites, wide):
        out, kernel_map = strided_map(each, kernel, 2)
        results.append(out.with_feats(sparse_conv(each.feats, weights, kernel_map, bias=bias)))
        check_overflow(results[-1])
    dense = to_dense(results[0])
    padding = [(0, 1), (0, 1)] if kernel == 2 else [(1, 1), (1, 1)]
    want = by_hand(to_dense(sites), weights, 2, padding=padding)
    there = np.asarray(to_dense(results[0].with_feats(jnp.ones_like(results[0].feats[:, :1]))))
    np.testing.assert_allclose(dense, (want + np.asarray(bias)) * there, rtol=1e-5, atol=1e-5)
    assert not np.any(want * (1 - there))
    np.testing.assert_array_equal(dense, to_dense(results[1]))
    assert not np.any(np.asarray(results[0].feats)[int(results[0].count) :])


@pytest.mark.slow
def test_the_default_capacity_is_enough_with_dilation():
    sites = make((12, 12), 60, count=60)
    out, kernel_map = convolution.strided_map(sites, 3, 2, dilation=2)
    check_overflow(out)
    weights = normal(3, 3, 4, 2)
    dense = to_dense(out.with_feats(sparse_conv(sites.feats, weights, kernel_map)))
    np.testing.assert_allclose(dense, by_hand(to_dense(sites), weights, 2, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_active_set_stays_and_inverse_restores_it():
    sites = make()
    down, kernel_map = strided_map(sites, 2, 2)
    feats = sparse_conv(sites.feats, normal(2, 2, 4, 6), kernel_map)
    up = sites.with_feats(sparse_conv(feats, normal(2, 2, 6, 4), kernel_map.T, bias=jnp.ones(4)))
    assert up.feats.shape == sites.feats.shape
    assert np.all(np.any(np.asarray(up.feats)[: int(sites.count)] != 0, axis=1))
    assert not np.any(np.asarray(up.feats)[int(sites.count) :])
    assert int(down.count) <= int(sites.count)


@pytest.mark.slow
def test_four_dimensions():
    sites = make((3, 4, 3, 4), 64, count=50)
    weights = normal(3, 3, 3, 3, 4, 2)
    out = to_dense(sites.with_feats(sparse_conv(sites.feats, weights, subm_map(sites, 3))))
    there = np.asarray(to_dense(sites.with_feats(jnp.ones((64, 1)) * sites.used)))
    np.testing.assert_allclose(out, by_hand(to_dense(sites), weights) * there, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduce", ["max", slow("mean"), slow("sum")])
def test_pools_and_their_gradients(reduce):
    sites = make()
    out, kernel_map = strided_map(sites, 3, 2)
    dense, there = np.asarray(to_dense(sites)), np.asarray(to_dense(sites.with_feats(jnp.ones((64, 1)) * sites.used)))
    padded = np.pad(np.where(there > 0, dense, np.nan), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=np.nan)
    want = np.zeros((3, 4, 5, 4))
    for b, i, j in itertools.product(range(3), range(4), range(5)):
        window = padded[b, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].reshape(-1, 4)
        window = window[~np.isnan(window[:, 0])]
        if len(window):
            want[b, i, j] = {"max": np.max, "mean": np.mean, "sum": np.sum}[reduce](window, axis=0)
    np.testing.assert_allclose(
        to_dense(out.with_feats(sparse_pool(sites.feats, kernel_map, reduce))), want, rtol=1e-5, atol=1e-6
    )
    z = normal(out.capacity, 4)
    value = lambda feats: jnp.vdot(sparse_pool(feats, kernel_map, reduce), z)  # noqa: E731
    direction = normal(64, 4) * sites.used
    numeric = (value(sites.feats + 1e-3 * direction) - value(sites.feats - 1e-3 * direction)) / 2e-3
    np.testing.assert_allclose(jnp.vdot(jax.grad(value)(sites.feats), direction), numeric, rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(sites_global_pool(sites, "sum"), dense.sum((1, 2)), rtol=1e-5, atol=1e-5)


def test_an_empty_sample_and_no_sites_at_all():
    sites = from_coords(jnp.array([1]), jnp.array([[2]]), jnp.ones((1, 2)), shape=(4,), batch_size=3, capacity=4)
    for reduce in ("mean", "max", "sum"):
        np.testing.assert_array_equal(sites_global_pool(sites, reduce), [[0, 0], [1, 1], [0, 0]])
    nothing = from_coords(batch=sites.batch[:0], coords=sites.coords[:0], feats=sites.feats[:0], **FOUR)
    assert int(nothing.count) == 0
    assert not np.any(sparse_conv(nothing.feats, jnp.ones((3, 2, 1)), subm_map(nothing, 3), bias=jnp.ones(1)))
    assert int(strided_map(nothing, 2, 2)[0].count) == 0


@pytest.mark.parametrize("search", SEARCHES)
def test_batches_without_samples(search):
    sites = from_mask(jnp.ones((0, 4, 1)), jnp.ones((0, 4), bool), capacity=2)
    assert int(sites.count) == 0
    np.testing.assert_array_equal(convolution.subm_map(sites, 3, search=search).fwd, np.full((3, 2), 2))
    assert not np.any(sites_group_norm(sites, 1))
    assert sites_global_pool(sites).shape == (0, 1)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("implementation", ["reference", "xla", "native"][: 2 + COMPILER])
@pytest.mark.parametrize("rows", [(0, 2), (2, 0), (0, 0)])
def test_lists_without_rows(rows, implementation, search):
    sites = from_mask(jnp.ones((1, 4, 2)), jnp.ones((1, 4), bool), capacity=rows[0])
    _, kernel_map = convolution.strided_map(sites, 2, 2, capacity=rows[1], search=search)
    run = lambda x, w: sparse_conv(x, w, kernel_map, implementation=implementation)  # noqa: E731
    y, back = jax.vjp(run, sites.feats, jnp.ones((2, 2, 3)))
    dx, dw = back(jnp.ones_like(y))
    assert (y.shape, dx.shape) == ((rows[1], 3), (rows[0], 2))
    for each in (y, dx, dw, sparse_pool(sites.feats, kernel_map)):
        assert not np.any(each)


def test_pools_of_many_half_precision_rows_and_of_what_is_not_finite():
    rows = jnp.ones((1024, 1), jnp.bfloat16)
    sites = from_mask(rows[None], jnp.ones((1, 1024), bool), capacity=1024)
    kernel_map = strided_map(sites, 1024, 1024)[1]
    everywhere = SiteMask(jnp.ones((1, 1), bool))
    late = rows.at[700].set(jnp.nan)
    broken = sites.with_feats(jnp.concatenate([rows, rows * jnp.inf, late], axis=1))

    def pools(sites, reduce):
        yield sites_global_pool(sites, reduce)
        yield sparse_pool(sites.feats, kernel_map, reduce)[:1]
        yield masked_pool(sites.feats[None], everywhere, 1024, reduce=reduce)[0]
        yield masked_global_pool(sites.feats[None], everywhere, reduce)

    for reduce, want in {"mean": 1.0, "sum": 1024.0, "max": 1.0}.items():
        for pooled in pools(sites, reduce):
            assert pooled.dtype == jnp.bfloat16
            assert float(pooled[0, 0]) == want
    for pooled in pools(broken, "max"):
        np.testing.assert_array_equal(pooled.astype(jnp.float32), [[1, np.inf, np.nan]])


def test_a_grid_beyond_what_a_batch_of_keys_could_hold():
    shape = (40_000, 40_000)  # 1.6e9 places a sample: three samples have more than 2^31
    batch, coords = jnp.array([0, 2, 2, 1]), jnp.array([[5, 5], [39_999, 39_998], [39_999, 39_999], [0, 0]])
    sites = from_coords(batch, coords, jnp.arange(1.0, 5.0)[:, None], shape=shape, batch_size=3, capacity=6)
    np.testing.assert_array_equal(sites.coords[:4], [[5, 5], [0, 0], [39_999, 39_998], [39_999, 39_999]])
    out = sparse_conv(sites.feats, jnp.ones((3, 3, 1, 1)), subm_map(sites, 3))
    np.testing.assert_array_equal(out[:, 0], [1, 4, 5, 5, 0, 0])
    with pytest.raises(ValueError, match="2500000000 places"):
        from_coords(batch, coords, jnp.ones((4, 1)), shape=(50_000, 50_000), batch_size=1, capacity=4)


X, ON = jnp.ones((2, 4, 3)), jnp.ones((2, 4), bool)
POINT = {"batch": jnp.zeros(3, int), "coords": jnp.zeros((3, 1), int), "feats": jnp.ones((3, 1)), **FOUR}
LISTED = from_mask(X, ON, capacity=8)
WEIGHTS = jnp.ones((3, 3, 5))
WRONG = {
    "mask is float32; it must be bool": lambda: from_mask(X, X[..., 0], capacity=3),
    "mask is int32; it must be bool": lambda: masked_conv(X, WEIGHTS, SiteMask(ON.astype(jnp.int32))),
    "mask is of type .*; wrap bool": lambda: masked_conv(X, WEIGHTS, None, mask_out=ON),
    "x is int32; it must be floating": lambda: masked_conv(X.astype(jnp.int32), WEIGHTS, None),
    "groups is 0": lambda: masked_conv(X, WEIGHTS, None, groups=0),
    "bias has shape .*; 5 channels need": lambda: masked_conv(X, WEIGHTS, None, bias=jnp.ones(1)),
    "padding is 1.5": lambda: masked_conv(X, WEIGHTS, None, padding=1.5),
    "wrap bool .samples": lambda: masked_pool(X, ON, 2),
    "x is int32; it must be": lambda: masked_pool(X.astype(jnp.int32), None, 2),
    "x is bool; it must be": lambda: masked_global_pool(ON[..., None], None),
    "no form at": lambda: SiteMask(jnp.ones((2, 0), bool)).at((4,)),
    "valid is int32": lambda: from_coords(**POINT, valid=jnp.ones(3, jnp.int32)),
    "valid has shape": lambda: from_coords(**POINT, valid=jnp.ones((3, 1), bool)),
    r"batch has shape \(3, 1\)": lambda: from_coords(**POINT | {"batch": POINT["coords"]}),
    "batch is a list": lambda: convolution.from_coords(**POINT | {"batch": [0, 0, 0]}),
    "a size of shape is 8.5": lambda: from_coords(**POINT | {"shape": (8.5,)}),
    "2500000000 places": lambda: convolution.from_coords(**POINT | {"shape": np.array([50_000, 50_000], np.int32)}),
    "capacity is -1": lambda: from_coords(**POINT | {"capacity": -1}),
    "capacity is 4.0": lambda: from_mask(X, ON, capacity=4.0),
    "batch_size is -1": lambda: from_coords(**POINT | {"batch_size": -1}),
    "samples of shape .* is too large": lambda: from_mask(
        *(jax.ShapeDtypeStruct((2, 2**15, 2**15, *last), kind) for last, kind in (((1,), float), ((), bool))),
        capacity=1,
    ),
    "kernel is 1.5": lambda: subm_map(LISTED, 1.5),
    "a window of .* does not fit": lambda: convolution.strided_map(LISTED, 40, 1, padding="VALID"),
    r"this map's window is \(3,\)": lambda: sparse_conv(LISTED.feats, WEIGHTS[:, None], subm_map(LISTED, 3)),
    "feats is int32": lambda: sparse_pool(LISTED.feats.astype(jnp.int32), subm_map(LISTED, 3)),
    "mask is int32": lambda: tile_set(ON.astype(jnp.int32), 2, capacity=4),
    "tiles.* is int32|x is int32": lambda: tile_conv(
        jnp.ones((8, 2, 3), jnp.int32), WEIGHTS, tile_set(ON, 2, capacity=8)
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_arguments_are_checked(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()


@pytest.mark.parametrize("padding", [(1, 1), np.int64(1), ((1, 1), (1, 1)), [np.int32(1), (1, 1)]])
def test_forms_of_padding(padding):
    x, weights, window = jnp.ones((1, 5, 6, 2)), normal(3, 3, 2, 2), np.array([3, 3])
    want = masked_conv(x, weights, None, padding="SAME")
    np.testing.assert_array_equal(masked_conv(x, weights, None, padding=padding), want)
    sites = from_mask(x, SiteMask(jnp.ones((1, 1, 1), bool)), capacity=30)
    out, kernel_map = convolution.strided_map(sites, window, 1, padding=padding)
    np.testing.assert_allclose(
        to_dense(out.with_feats(sparse_conv(sites.feats, weights, kernel_map))), want, rtol=1e-5, atol=1e-5
    )


def test_errors_name_what_is_wrong():
    sites = make()
    with pytest.raises(ValueError, match="needs odd sides"):
        subm_map(sites, 2)
    with pytest.raises(ValueError, match="duplicates is 'last'"):
        from_coords(*points((7, 9)), shape=(7, 9), batch_size=3, capacity=64, duplicates="last")
    with pytest.raises(ValueError, match="coords is float32"):
        from_coords(jnp.zeros(1, int), jnp.array([[1.7]]), jnp.ones((1, 1)), **FOUR)
    with pytest.raises(ValueError, match=r"weights have shape \(2, 2, 4, 5\)"):
        sparse_conv(sites.feats, normal(2, 2, 4, 5), subm_map(sites, 3))
    with pytest.raises(ValueError, match="groups must divide"):
        sparse_conv(sites.feats, normal(3, 3, 4, 5), subm_map(sites, 3), groups=2)
    with pytest.raises(ValueError, match="implementation='fast'"):
        sparse_conv(sites.feats, normal(3, 3, 4, 5), subm_map(sites, 3), implementation="fast")
    with pytest.raises(ValueError, match=r"feats have shape \(63, 4\)"):
        sparse_pool(sites.feats[:63], subm_map(sites, 3))
    with pytest.raises(ValueError, match="feature_group_count is 2; it must divide in_features 3"):
        SubmanifoldConv(3, 4, (3,), feature_group_count=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="mask has shape"):
        from_mask(jnp.ones((2, 3, 1)), jnp.ones((2, 4), bool), capacity=3)
