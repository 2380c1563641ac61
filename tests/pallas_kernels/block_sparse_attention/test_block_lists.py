"""Lists from grids, their transpose, and the rule as bits."""

import attention_zoo as zoo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.block_sparse_attention import causal, dense_mask, from_tiles, with_bits
from pallas_kernels.block_sparse_attention.rules import pack_bits, unpack_bits

QUICK = settings(max_examples=12, deadline=None)


def grids():
    return st.integers(0, 10**6).map(
        lambda seed: np.random.default_rng(seed).integers(0, 3, np.random.default_rng(seed + 1).integers(1, 6, 4))
    )


@QUICK
@given(grids())
def test_lists_hold_the_grid_partial_tiles_first(tiles):
    bm, hm, nq, nk = tiles.shape
    lists = from_tiles(tiles, bq=4, bk=4, q_len=4 * nq, kv_len=4 * nk)
    for b, h, i in np.ndindex(bm, hm, nq):
        ids, part, total = lists.idx[b, h, i], lists.n_part[b, h, i], lists.n_tot[b, h, i]
        assert ids[:part].tolist() == np.nonzero(tiles[b, h, i] == 1)[0].tolist()
        assert ids[part:total].tolist() == np.nonzero(tiles[b, h, i] == 2)[0].tolist()
        assert set(ids[total:]) <= {ids[total - 1] if total else 0}
    assert lists.density == pytest.approx((tiles > 0).mean())


@QUICK
@given(grids())
def test_transpose_lists_the_same_tiles_by_column(tiles):
    bm, hm, nq, nk = tiles.shape
    lists = from_tiles(tiles, bq=4, bk=4, q_len=4 * nq, kv_len=4 * nk)
    here = lists.transposed()
    traced = jax.jit(lambda x: x.transposed())(lists)
    assert here.transposed() is here
    for b, h, j in np.ndindex(bm, hm, nk):
        part, total, start = here.t_part[b, h, j], here.t_tot[b, h, j], here.t_ptr[b, h, j]
        rows = here.t_idx[b, h, start : start + total]
        assert rows[:part].tolist() == np.nonzero(tiles[b, h, :, j] == 1)[0].tolist()
        assert rows[part:].tolist() == np.nonzero(tiles[b, h, :, j] == 2)[0].tolist()
        slots = here.t_slot[b, h, start : start + total]
        assert (lists.idx[b, h, rows, slots] == j).all()
        assert (traced.t_part[b, h, j], traced.t_tot[b, h, j]) == (part, total)
        assert total == 0 or traced.t_ptr[b, h, j] == start
        assert traced.t_idx[b, h, start : start + total].tolist() == rows.tolist()
        assert traced.t_slot[b, h, start : start + total].tolist() == slots.tolist()


def test_transpose_is_as_long_as_there_are_tiles():
    tiles = np.eye(40, dtype=int)
    tiles[:, 0] = 1
    lists = from_tiles(tiles, bq=4, bk=4, q_len=160, kv_len=160).transposed()
    assert lists.t_idx.shape == (1, 1, 79)
    empty = from_tiles(np.zeros((2, 3), int), bq=4, bk=4, q_len=8, kv_len=12).transposed()
    assert empty.t_tot.sum() == 0
    assert empty.t_idx.tolist() == [[[0]]]


def test_traced_grid_gives_the_same_lists():
    tiles = np.random.default_rng(0).integers(0, 3, (3, 5))
    options = {"bq": 4, "bk": 4, "q_len": 12, "kv_len": 20, "width": 4}
    want, got = from_tiles(tiles, **options), jax.jit(lambda t: from_tiles(t, **options))(tiles)
    for name in ("idx", "n_part", "n_tot"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))


def test_a_bool_grid_is_full_without_a_rule_and_partial_with_one():
    grid = np.ones((1, 2), bool)
    options = {"bq": 4, "bk": 4, "q_len": 4, "kv_len": 8}
    assert from_tiles(grid, **options).n_part.item() == 0
    assert from_tiles(grid, **options, elem=causal).n_part.item() == 2


def test_grid_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"need \[\(batch, \(heads,\)\) 2, 3\]"):
        from_tiles(np.ones((2, 2), int), bq=4, bk=4, q_len=8, kv_len=9)


@given(st.integers(1, 20), st.integers(0, 1000))
@QUICK
def test_bits_round_trip(bk, seed):
    mask = np.random.default_rng(seed).random((3, bk)) < 0.5
    np.testing.assert_array_equal(unpack_bits(pack_bits(jnp.asarray(mask)), bk), mask)


@settings(max_examples=5, deadline=None)
@given(zoo.cases(options=("scale",)))
def test_bits_say_what_the_rule_says(case):
    lists = case.lists()
    if lists.elem is None:
        return
    want = dense_mask(lists, case.batch, case.heads, case.kv_heads)
    got = dense_mask(with_bits(lists, case.batch, case.heads), case.batch, case.heads, case.kv_heads)
    shape = (case.batch, case.heads, case.q_len, case.kv_len)
    np.testing.assert_array_equal(np.broadcast_to(got, shape), np.broadcast_to(want, shape))
