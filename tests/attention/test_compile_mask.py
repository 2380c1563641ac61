"""Compiled masks: the lists against the exact tiles, on the host and traced; memory at a million tokens."""

import tracemalloc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.attention import (
    Bits,
    BlockDense,
    Causal,
    Chunk,
    Dilated,
    Documents,
    Local,
    Segment,
    Sink,
    compile_mask,
    per_head,
)
from tests.attention.zoo import TOKENS, masks, oracle_dense, oracle_kinds, visited, visited_kinds


def check_lists(compiled, exact, *, tight=False):
    """Lists visit every tile that has a pair, never call a tile full that is not, and are in the promised layout."""
    kinds = np.broadcast_to(visited_kinds(compiled), exact.shape)
    if tight:
        np.testing.assert_array_equal(kinds, exact)
    assert ((kinds == exact) | (kinds == 1)).all()
    lists = compiled.lists
    for b, h, i in np.ndindex(lists.n_tot.shape):
        part, total = int(lists.n_part[b, h, i]), int(lists.n_tot[b, h, i])
        row = np.asarray(lists.idx[b, h, i])
        for listed in (row[:part], row[part:total]):
            assert (np.diff(listed) > 0).all()
        assert (row[total:] == (row[total - 1] if total else 0)).all()


@settings(deadline=None, max_examples=30)
@given(masks, st.sampled_from([(1, 4), (7, 3), (30, 8)]), st.sampled_from([24, 17]), st.booleans())
def test_lists_are_the_tiles_of_the_mask(pair, blocks, length, refine):
    (mask, oracle), (bq, bk) = pair, blocks
    dense = oracle_dense(oracle)
    if length < TOKENS and any(name.startswith(("q_", "kv_")) for name in mask.arrays):
        length = TOKENS
    dense = dense[:, :, :length]
    if any(name.startswith(("q_", "kv_")) for name in mask.arrays):
        kv_len = TOKENS
    else:
        kv_len = TOKENS - 1
        dense = dense[..., :kv_len]
    compiled = compile_mask(mask, length, kv_len, bq=bq, bk=bk, refine=refine)
    check_lists(compiled, oracle_kinds(dense, bq, bk), tight=refine)
    np.testing.assert_array_equal(np.broadcast_to(visited(compiled), dense.shape), dense)
    assert int(compiled.overflow) == 0


@settings(deadline=None, max_examples=15)
@given(masks, st.sampled_from([(8, 3)]))
def test_traced_and_host_agree(pair, blocks):
    mask, oracle = pair
    bq, bk = blocks
    if not mask.arrays:
        return
    host = compile_mask(mask, TOKENS, TOKENS, bq=bq, bk=bk, transpose=False)
    compiled = jax.jit(lambda m: compile_mask(m, TOKENS, TOKENS, bq=bq, bk=bk, transpose=False))(mask)
    np.testing.assert_array_equal(*np.broadcast_arrays(compiled.wanted, host.wanted))
    dense = oracle_dense(oracle)
    np.testing.assert_array_equal(np.broadcast_to(visited(compiled), dense.shape), dense)


def test_a_new_traced_mask_does_not_compile_anew():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def kinds(ids):
        return compile_mask(Causal() & Segment(ids), 16, 16, bq=4, bk=4, max_blocks=3)

    for lengths in ([8, 8], [4, 12], [16]):
        ids = np.repeat(np.arange(len(lengths)), lengths)
        compiled = kinds(ids)
        exact = oracle_kinds(np.asarray((Causal() & Segment(ids)).to_dense(16, 16)), 4, 4)
        wanted = (exact > 0).sum(-1)
        np.testing.assert_array_equal(compiled.wanted, wanted)
        np.testing.assert_array_equal(compiled.lists.n_tot, np.minimum(wanted, 3))
        assert int(compiled.overflow) == np.maximum(wanted - 3, 0).sum()


def test_a_million_tokens_without_a_grid_of_tiles():
    tokens, block = 2**20, 128
    tracemalloc.start()
    compiled = compile_mask(Causal() & Local(4096) | Sink(4), tokens, tokens, bq=block, bk=block)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    lists = compiled.lists
    leaves = jax.tree.leaves(compiled)
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
    assert sum(leaf.nbytes for leaf in leaves) < 20e6
    # 4096 tokens are 32 whole blocks back, one more in part, the diagonal, and the sink.
    assert lists.idx.shape == (1, 1, 8192, 35 - 1)
    np.testing.assert_array_equal(lists.n_tot[0, 0, 100:], 34)
    np.testing.assert_array_equal(lists.n_part[0, 0, 100:], 3)
    np.testing.assert_array_equal(np.sort(lists.idx[0, 0, 5000]), [0, *range(5000 - 32, 5001)])


def test_heads_and_examples_have_their_own_lists_only_where_they_differ():
    ids = np.array([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2, 3, 3]])
    assert compile_mask(Causal(), 8, 8, bq=2, bk=2).lists.idx.shape[:2] == (1, 1)
    assert compile_mask(Segment(ids), 8, 8, bq=2, bk=2).lists.idx.shape[:2] == (2, 1)
    both = compile_mask(per_head([Causal(), Local(0, 0), Causal()]) & Segment(ids), 8, 8, bq=2, bk=2)
    assert both.lists.idx.shape[:2] == (2, 3)


def test_tables_cost_nothing_where_tiles_are_aligned():
    blocks = np.eye(4, dtype=bool)
    aligned = compile_mask(BlockDense(blocks, 4) & Causal(), 16, 16, bq=2, bk=4)
    assert aligned.lists.elem == Causal().rule
    assert not aligned.lists.payload
    assert compile_mask(BlockDense(blocks, 4), 16, 16, bq=4, bk=4).lists.elem is None
    crossing = compile_mask(BlockDense(blocks, 4), 16, 16, bq=3, bk=4)
    assert set(crossing.lists.payload) == {"bits"}


def test_known_positions_choose_the_tiles():
    kept = np.array([0, 1, 40, 41, 42, 43, 90, 91])
    compiled = compile_mask(Causal() & Local(50), 2, 8, bq=2, bk=2, q_positions=np.array([91, 92]), kv_positions=kept)
    dense = (kept <= np.array([[91], [92]])) & (np.array([[91], [92]]) - kept <= 50)
    np.testing.assert_array_equal(compiled.to_dense()[0, 0], dense)
    np.testing.assert_array_equal(compiled.kinds()[0, 0, 0], [0, 1, 2, 2])
    np.testing.assert_array_equal(compiled.lists.payload["kv_pos"], kept[None])


def test_unordered_parts_are_looked_at_only_where_the_rest_is_open():
    # 2**15 tokens in blocks of 8 have 16 million tiles; the window leaves 5 in each row.
    tracemalloc.start()
    compiled = compile_mask(Causal() & Local(31) & Dilated(None, 3), 2**15, 2**15, bq=8, bk=8, transpose=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert compiled.lists.idx.shape == (1, 1, 4096, 5)
    assert peak < 20e6


def test_packed_documents():
    compiled = compile_mask(Causal() & Documents([8, 4, 12]), 24, 24, bq=4, bk=4)
    np.testing.assert_array_equal(compiled.lists.n_tot[0, 0], [1, 2, 1, 1, 2, 3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compile_mask(Causal(), 0, 4), "q_len must be at least 1, not 0"),
        (lambda: compile_mask(Causal(), 4, 4, bk=0), "bk must be at least 1, not 0"),
        (lambda: compile_mask(Causal(), 4, 4, max_blocks=0), "max_blocks must be at least 1, not 0"),
        (lambda: compile_mask(Causal(), 4, 4, q_positions=np.arange(3)), "4 queries"),
        (
            lambda: jax.jit(lambda i: compile_mask(Segment(i), 4, 4, refine=True).wanted)(jnp.zeros(4, int)),
            "refine=True needs known values",
        ),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bits_can_be_combined_in_any_way():
    matrix = np.random.default_rng(0).random((9, 9)) < 0.5
    mask = ~Bits(matrix) | Causal() & Chunk(4)
    q, k = np.arange(9)[:, None], np.arange(9)[None]
    compiled = compile_mask(mask, 9, 9, bq=4, bk=4)
    np.testing.assert_array_equal(compiled.to_dense()[0, 0], ~matrix | (k <= q) & (q // 4 == k // 4))
