"""The mask algebra against NumPy functions written from the definitions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.attention import (
    AShape,
    BigBird,
    Bits,
    Causal,
    Chunk,
    KeyRange,
    Lengths,
    Local,
    Longformer,
    Prefix,
    Segment,
    Sink,
    Tokens,
    compile_mask,
    from_fn,
    per_head,
)
from sparsejax.attention.compile import tile_kinds
from tests.attention.zoo import BATCH, HEADS, TOKENS, masks, oracle_dense, oracle_kinds


@settings(deadline=None, max_examples=60)
@given(masks)
def test_elements_follow_the_definition(pair):
    mask, oracle = pair
    dense = np.broadcast_to(mask.to_dense(TOKENS, TOKENS), (BATCH, HEADS, TOKENS, TOKENS))
    np.testing.assert_array_equal(dense, oracle_dense(oracle))


@settings(deadline=None, max_examples=60)
@given(masks, st.sampled_from([1, 3, 8, 30]), st.sampled_from([1, 7, 8]))
def test_tile_rule_never_calls_a_tile_full_or_empty_that_is_not(pair, bq, bk):
    mask, oracle = pair
    kinds = tile_kinds(mask.rule, mask.values(TOKENS, TOKENS), bq=bq, bk=bk, q_len=TOKENS, kv_len=TOKENS)
    exact = oracle_kinds(oracle_dense(oracle), bq, bk)
    kinds = np.broadcast_to(kinds, exact.shape)
    assert ((kinds == exact) | (kinds == 1)).all()


@pytest.mark.parametrize(
    "mask", [Causal() & Local(7), Causal() & Chunk(6), Local(3, 5), KeyRange(3, 9) | Sink(2)], ids=str
)
@pytest.mark.parametrize("blocks", [(4, 4), (3, 5), (8, 4)])
def test_tile_rule_is_exact_for_plain_patterns(mask, blocks):
    sides = {"bq": blocks[0], "bk": blocks[1], "q_len": 24, "kv_len": 24}
    exact = oracle_kinds(np.asarray(mask.to_dense(24, 24)), *blocks)
    np.testing.assert_array_equal(tile_kinds(mask.rule, mask.values(24, 24), **sides), exact)


def test_traced_parameters_do_not_compile_anew():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def dense(mask):
        return mask.to_dense(6, 6)

    for offset, low in ((0, 1), (2, 0), (-1, 3)):
        mask = Causal(jnp.asarray(offset)) & KeyRange(jnp.asarray(low), jnp.asarray(5)) | Sink(jnp.asarray(low))
        q, k = np.arange(6)[:, None], np.arange(6)[None]
        np.testing.assert_array_equal(dense(mask)[0, 0], (k <= q + offset) & (k >= low) & (k < 5) | (k < low))


def test_positions_are_data():
    positions = np.array([[3, 0, 2], [9, 8, 7]])
    dense = Causal().to_dense(3, 10, q_positions=positions)
    np.testing.assert_array_equal(dense[:, 0], np.arange(10) <= positions[..., None])


def test_shared_arrays_are_kept_once():
    ids = np.zeros(4, np.int32)
    mask = Segment(ids) & Causal() | ~Segment(ids)
    assert sorted(mask.arrays) == ["kv_0", "q_0"]
    assert len(per_head([Causal(), Causal(), Local(2)]).rule.rules) == 2


def test_text_is_the_expression():
    mask = Causal() & (Local(4, 1) | Sink(2)) & ~(Chunk(3) | Sink(1))
    assert repr(mask) == "Causal() & (Local(4, 1) | Sink(2)) & ~(Chunk(3) | Sink(1))"
    assert eval(repr(mask)).rule == mask.rule


def test_permuted_attention_is_attention_permuted():
    order = np.random.default_rng(0).permutation(8)
    dense = np.asarray((Causal() & Local(2)).to_dense(8, 8))[0, 0]
    np.testing.assert_array_equal((Causal() & Local(2)).permute(order).to_dense(8, 8)[0, 0], dense[order][:, order])


def test_named_patterns():
    marks = np.zeros(12, bool)
    marks[[0, 5]] = True
    q, k = np.arange(12)[:, None], np.arange(12)[None]
    np.testing.assert_array_equal(Longformer(4, marks).to_dense(12, 12)[0, 0], (abs(q - k) <= 2) | marks[q] | marks[k])
    np.testing.assert_array_equal(AShape(2, 3).to_dense(12, 12)[0, 0], (k <= q) & ((k < 2) | (q - k < 3)))
    bird = np.asarray(BigBird(12, 1, random=2, seed=3).to_dense(12, 12))[0, 0]
    assert bird[[0, -1]].all()
    assert bird[:, [0, -1]].all()
    # Window of three, two edges, two random ones; the window of rows 2 to 9 does not meet the edges.
    np.testing.assert_array_equal(bird[2:10].sum(1), 7)


def even(q, k, q_flag, k_flag):
    return (q + k + q_flag + k_flag) % 2 == 0


def below(q, k, q_flag, k_flag):
    # Exact where both vectors are zero.
    return np.where((q[0] == q[1]) & (k[0] == k[1]), np.where((q[0] + k[0]) % 2 == 0, 2, 0), 1)


def test_users_function():
    flags = np.array([0, 1, 1, 0, 1, 0])
    mask = from_fn(even, q_vectors=[flags], kv_vectors=[np.zeros(6, int)])
    q, k = np.arange(6)[:, None], np.arange(6)[None]
    np.testing.assert_array_equal(mask.to_dense(6, 6)[0, 0], (q + k + flags[:, None]) % 2 == 0)
    zeros = np.zeros(6, int)
    tiled = from_fn(even, q_vectors=[zeros], kv_vectors=[zeros], tile=below)
    compiled = compile_mask(tiled, 6, 6, bq=1, bk=1)
    np.testing.assert_array_equal(compiled.kinds()[0, 0], np.where((q + k) % 2 == 0, 2, 0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bool(Causal()), "no truth value"),
        (lambda: Causal() & np.ones((2, 2), bool), "use Bits"),
        (lambda: Local(jnp.zeros(3, int)), "per_head"),
        (lambda: Chunk(0), "size must be at least 1, not 0"),
        (lambda: Chunk(2.5), "size must be an int, not 2.5"),
        (lambda: Local(2.5), "a bound must be an int or an integer scalar, not 2.5"),
        (lambda: Segment(np.zeros(3)), "q_ids must be int"),
        (lambda: Bits(np.zeros((2, 2))), "matrix must be bool"),
        (lambda: Tokens(), "use Full"),
        (lambda: per_head([]), "empty"),
        (lambda: Prefix(np.zeros((2, 2), int)), "length must be an int or int"),
        (lambda: Segment(np.zeros(3, int)).to_dense(4, 4), "4 queries"),
        (lambda: (Lengths(np.ones(2, int)) & Prefix(np.ones(3, int))).to_dense(2, 2), "different batch sizes"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
