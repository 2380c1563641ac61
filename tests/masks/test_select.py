import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks.select import refill_top, select_top, select_top_global
from tests.masks.oracles import sorted_mask, top_mask

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2)
FAMILIES = {
    "normal": lambda rng: rng.standard_normal((12, 32)),
    "few values": lambda rng: rng.integers(0, 3, (12, 32)),
    "all equal": lambda rng: np.ones((12, 32)),
    "some NaN": lambda rng: np.where(rng.random((12, 32)) < 0.2, np.nan, rng.standard_normal((12, 32))),
    "all NaN": lambda rng: np.full((12, 32), np.nan),
    "extremes": lambda rng: rng.choice([np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40, 3e38, np.nan], (12, 32)),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_stable_sort_for_floats(family, dtype):
    rng = np.random.default_rng(0)
    scores = jnp.asarray(FAMILIES[family](rng).astype(np.float32)).astype(dtype)
    where = rng.random(scores.shape) < 0.4
    for count in (0, 1, 77, 200, 383, 384, 1000):
        np.testing.assert_array_equal(select_top(scores, count), top_mask(scores, count))
        np.testing.assert_array_equal(select_top(scores, count, where=where), top_mask(scores, count, where))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "bool", "int4", "uint4"])
def test_equals_a_stable_sort_for_integers(dtype):
    rng = np.random.default_rng(1)
    if dtype == "bool":
        scores = jnp.asarray(rng.random(200) < 0.5)
    else:
        info = jnp.iinfo(dtype)
        scores = np.concatenate([rng.integers(info.min, info.max, 190, endpoint=True), [info.min, info.max] * 5])
        scores = jnp.asarray(scores).astype(dtype)
    where = np.arange(200) % 3 > 0
    for count in (0, 1, 3, 100, 133, 199, 200):
        np.testing.assert_array_equal(select_top(scores, count), top_mask(scores, count))
        np.testing.assert_array_equal(select_top(scores, count, where=where), top_mask(scores, count, where))


@hypothesis.given(
    scores=hnp.arrays(
        np.float32, st.sampled_from([(7,), (3, 5), (2, 3, 4)]), elements=st.sampled_from([-1.0, -0.0, 0.0, 2.5, np.nan])
    ),
    count=st.integers(0, 30),
    data=st.data(),
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_counts_are_exact_and_ties_go_to_the_lower_index(scores, count, data):
    where = data.draw(hnp.arrays(np.bool_, scores.shape))
    mask = select_top(scores, count, where=where)
    assert int(mask.sum()) == min(count, int(where.sum()))
    np.testing.assert_array_equal(mask, top_mask(scores, count, where))


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (3, 0), (1,), (1, 1)])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_tiny_shapes(shape, count):
    scores = jnp.ones(shape)
    mask = select_top(scores, count)
    assert mask.shape == shape
    assert mask.dtype == jnp.bool_
    assert int(mask.sum()) == min(count, scores.size)


def test_traced_counts_do_not_compile_anew():
    traces = []

    @jax.jit
    def run(scores, count):
        traces.append(count)
        return select_top(scores, count)

    scores = jnp.asarray(np.random.default_rng(3).standard_normal((9, 9)), jnp.float32)
    for count in (-3, 0, 5, 80, 81, 99):
        np.testing.assert_array_equal(run(scores, jnp.int32(count)), top_mask(scores, max(count, 0)))
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int8"])
def test_counts_of_every_integer_dtype(dtype):
    scores = jnp.arange(600.0)
    assert int(select_top(scores, jnp.asarray(99, dtype)).sum()) == 99


def test_vmap_over_scores_counts_and_where():
    rng = np.random.default_rng(4)
    scores = rng.integers(0, 5, (6, 8, 8)).astype(np.float32)
    counts = np.array([0, 1, 13, 40, 63, 64], np.int32)
    where = rng.random(scores.shape) < 0.7
    masks = jax.vmap(lambda s, k, w: select_top(s, k, where=w))(scores, counts, where)
    for mask, s, k, w in zip(masks, scores, counts, where, strict=True):
        np.testing.assert_array_equal(mask, top_mask(s, k, w))


def test_inside_scan_and_cond():
    scores = jnp.asarray(np.random.default_rng(5).integers(0, 9, (40,)), jnp.float32)

    def step(carry, count):
        mask = jax.lax.cond(count > 3, lambda: select_top(scores, count), lambda: jnp.zeros(40, bool))
        return carry + mask.sum(), mask

    total, masks = jax.lax.scan(step, 0, jnp.array([2, 7, 39]))
    assert int(total) == 46
    np.testing.assert_array_equal(masks[1], top_mask(scores, 7))


def test_float64_under_x64():
    with jax.enable_x64(True):
        scores = 1.0 + np.random.default_rng(6).integers(0, 50, 300) * 2.0**-50
        scores[7] = np.nan
        mask = select_top(jnp.asarray(scores), 120)
        np.testing.assert_array_equal(mask, top_mask(scores, 120))
        assert select_top(jnp.asarray(scores), jnp.int64(3)).sum() == 3
        wide = jnp.array([2**62, 2**62 + 1, -(2**63), 5])
        assert select_top(wide, 1).tolist() == [False, True, False, False]


def test_above_two_to_the_24_elements():
    # Counted in float32, 2**24 + 1 and 2**24 are the same number.
    size = 2**24 + 4099
    scores = jnp.asarray(np.arange(size) % 3 == 0, jnp.int8)
    ones = -(-size // 3)
    for count in (ones + 1, 2**24 + 1, 2**24 + 4097):
        mask = np.asarray(select_top(scores, count))
        assert mask.sum() == count
        zeros = np.flatnonzero(mask & (np.arange(size) % 3 > 0))
        np.testing.assert_array_equal(zeros, np.flatnonzero(np.arange(size) % 3 > 0)[: count - ones])


def test_bfloat16_ties_are_settled_by_position():
    scores = jnp.asarray(np.random.default_rng(7).standard_normal((256, 512)), jnp.bfloat16)
    scores = jnp.abs(scores)
    mask = select_top(scores, 13_107)
    assert int(mask.sum()) == 13_107
    np.testing.assert_array_equal(mask, sorted_mask(scores.astype(jnp.float32), 13_107))


def test_subnormals_are_ordered():
    scores = np.array([1e-44, 3e-44, 0.0, -1e-44, 2e-44], np.float32)
    assert np.asarray(select_top(scores, 2)).tolist() == [False, True, False, False, True]


def test_global_is_one_threshold_over_all_arrays():
    rng = np.random.default_rng(8)
    arrays = [rng.integers(0, 6, shape).astype(np.float32) for shape in [(5, 3), (2, 2, 2), (40,), ()]]
    flat = np.concatenate([a.reshape(-1) for a in arrays])
    where = [None, rng.random((2, 2, 2)) < 0.5, rng.random(40) < 0.5, None]
    pairs = zip(arrays, where, strict=True)
    allowed = np.concatenate([np.ones(a.size, bool) if w is None else w.reshape(-1) for a, w in pairs])
    for count in (0, 1, 20, 40, 64):
        got = np.concatenate([np.asarray(m).reshape(-1) for m in select_top_global(arrays, count)])
        np.testing.assert_array_equal(got, top_mask(flat, count))
        got = np.concatenate([np.asarray(m).reshape(-1) for m in select_top_global(arrays, count, where=where)])
        np.testing.assert_array_equal(got, top_mask(flat, count, allowed))


def test_global_over_mixed_float_dtypes_and_over_nothing():
    masks = select_top_global([jnp.array([1.0, 2.0], jnp.bfloat16), jnp.array([1.5, 3.0], jnp.float32)], 2)
    assert [m.tolist() for m in masks] == [[False, True], [False, True]]
    assert select_top_global([], 3) == []


def test_refill_adds_the_best_of_the_rest():
    rng = np.random.default_rng(9)
    scores = rng.integers(0, 5, (6, 6)).astype(np.float32)
    kept = rng.random((6, 6)) < 0.3
    for count in (0, int(kept.sum()), 20, 36, 50):
        mask = np.asarray(refill_top(scores, kept, count))
        assert mask.sum() == max(min(count, 36), kept.sum())
        np.testing.assert_array_equal(mask, kept | top_mask(scores, max(count - kept.sum(), 0), ~kept))
    allowed = rng.random((6, 6)) < 0.5
    mask = np.asarray(refill_top(scores, kept, 36, where=allowed))
    np.testing.assert_array_equal(mask, kept | allowed)


def test_no_sort_and_no_float_sum():
    scores = jnp.zeros((8, 8))
    primitives = str(jax.make_jaxpr(functools.partial(select_top, count=3))(scores))
    assert "sort" not in primitives
    assert "top_k" not in primitives
    assert "reshape" not in primitives


def test_needs_no_array_beside_scores_and_mask():
    size = 1 << 20
    compiled = jax.jit(select_top).lower(jax.ShapeDtypeStruct((1024, 1024), jnp.float32), 5).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < size


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "count must be 0 or more, got -1", lambda: select_top(jnp.ones(3), -1)),
        (TypeError, "count must be an integer, got 0.5", lambda: select_top(jnp.ones(3), 0.5)),
        (TypeError, "count must be an integer scalar, got float32", lambda: select_top(jnp.ones(3), jnp.ones(()))),
        (TypeError, "count must be an integer scalar", lambda: select_top(jnp.ones(3), jnp.ones(2, int))),
        (TypeError, "scores must be real numbers, got complex64", lambda: select_top(jnp.ones(3, complex), 1)),
        (TypeError, "where must be a bool array, got float32", lambda: select_top(jnp.ones(3), 1, where=jnp.ones(3))),
        (ValueError, r"where has shape \(2,\)", lambda: select_top(jnp.ones(3), 1, where=jnp.ones(2, bool))),
        (ValueError, "where has 1 entries for 2", lambda: select_top_global([jnp.ones(3)] * 2, 1, where=[None])),
        (TypeError, "int32, float32 cannot be ranked", lambda: select_top_global([jnp.ones(3, int), jnp.ones(3)], 1)),
        (
            ValueError,
            "2147483648 scores are more than the 2147483647",
            lambda: jax.eval_shape(lambda s: select_top(s, 1), jax.ShapeDtypeStruct((2**31,), jnp.int8)),
        ),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()
