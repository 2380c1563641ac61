"""Blocks chosen at run time, against choices made by loops in NumPy."""

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
    Coverage,
    Forced,
    Full,
    Local,
    Random,
    Ratio,
    Segment,
    Threshold,
    TopK,
    TopP,
    compile_mask,
    from_dense_blocks,
    from_lists,
    from_pages,
    from_scores,
    per_head,
)
from tests.attention.zoo import visited_kinds

B, H, NQ, NK, BQ, BK = 2, 2, 4, 6, 4, 4
SIZES = {"q_len": 16, "kv_len": 22, "bq": BQ, "bk": BK}
choose = jax.jit(from_scores, static_argnames=("q_len", "kv_len", "bq", "bk", "forced"), inline=False)


def oracle(scores, count, base_kinds, must):
    """For every row: the forced tiles, and `count(ranked)` of the others, best first, lower number first."""
    chosen = np.zeros(scores.shape, int)
    for b, h, i in np.ndindex(scores.shape[:3]):
        kinds = base_kinds[b % len(base_kinds), h % base_kinds.shape[1], i]
        row = scores[b, h, i]
        free = [j for j in range(NK) if kinds[j] and not must[i, j] and row[j] > -np.inf]
        ranked = sorted(free, key=lambda j: (-row[j], j))
        kept = ranked[: count(row[ranked])] + [j for j in range(NK) if must[i, j] and kinds[j]]
        chosen[b, h, i, kept] = kinds[kept]
    return chosen


def some_scores(seed: int, *, ties: bool) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (B, H, NQ, NK)).astype(np.float32) if ties else rng.random((B, H, NQ, NK), np.float32)
    scores[rng.random(scores.shape) < 0.1] = -np.inf
    scores[rng.random(scores.shape) < 0.1] = np.nan
    return scores


def reach(weights, share):
    """Fewest leading weights whose sum is at least the share of the total."""
    sums = np.cumsum(weights)
    return 0 if not len(weights) or sums[-1] <= 0 else int(np.argmax(sums >= share * sums[-1] * (1 - 1e-6))) + 1


BUDGETS = [
    (TopK(2), lambda row: 2),
    (TopK(0), lambda row: 0),
    (TopK(jnp.asarray(3), max_blocks=4), lambda row: 3),
    (TopP(0.7), lambda row: reach(np.exp(row), 0.7)),
    (TopP(1.0), len),
    (Coverage(0.5), lambda row: min(len(row), max(1, reach(row, 0.5)))),
    (Coverage(0.3, min_blocks=3), lambda row: min(len(row), max(3, reach(row, 0.3)))),
    (Threshold(0.6), lambda row: int((row > 0.6).sum())),
    (Ratio(0.4), lambda row: -(-4 * len(row) // 10)),
]


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 10**6),
    st.booleans(),
    st.sampled_from(range(len(BUDGETS))),
    st.sampled_from([Forced(), Forced(sinks=1, diagonal=True), Forced(local=1), Forced(last_rows=1)]),
)
def test_budgets_choose_what_a_sort_chooses(seed, ties, which, forced):
    budget, count = BUDGETS[which]
    scores = some_scores(seed, ties=ties)
    base = compile_mask(Causal(6), **SIZES)
    must = np.zeros((NQ, NK), bool)
    must[:, : forced.sinks] = True
    must[NQ - forced.last_rows :] = True
    if forced.diagonal or forced.local:
        must |= abs(np.arange(NQ)[:, None] - np.arange(NK)) <= forced.local
    clean = np.where(np.isnan(scores), -np.inf, scores)
    mask = choose(jnp.asarray(scores), budget, Causal(6), forced=forced, **SIZES)
    np.testing.assert_array_equal(visited_kinds(mask), oracle(clean, count, visited_kinds(base), must))
    assert int(mask.overflow) == 0


def test_new_scores_and_budgets_do_not_compile_anew():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def wanted(scores, budget, ids):
        mask = from_scores(scores, budget, Causal(6) & Segment(ids, jnp.zeros(22, jnp.int32)), **SIZES)
        return mask.wanted, mask.lists.n_tot, mask.overflow

    for seed, threshold in ((0, 0.2), (1, 0.9), (2, 0.5)):
        scores = jax.random.uniform(jax.random.key(seed), (B, H, NQ, NK))
        ids = jnp.where(jnp.arange(16) < 4 * seed, 1, 0)
        count, total, overflow = wanted(scores, Threshold(jnp.asarray(threshold), max_blocks=2), ids)
        kinds = np.asarray(compile_mask(Causal(6) & Segment(np.asarray(ids), np.zeros(22, int)), **SIZES).kinds())
        expected = ((np.asarray(scores) > np.float32(threshold)) & (kinds > 0)).sum(-1)
        np.testing.assert_array_equal(count, expected)
        np.testing.assert_array_equal(total, np.minimum(expected, 2))
        assert int(overflow) == np.maximum(expected - 2, 0).sum()


def test_a_narrow_row_keeps_the_best_and_all_that_is_forced():
    scores = jnp.asarray([[[[1.0, 5.0, 3.0, 4.0, 2.0, 0.0]] * NQ]])
    mask = from_scores(scores, Threshold(0.5, max_blocks=2), **SIZES, forced=Forced(sinks=1))
    np.testing.assert_array_equal(mask.lists.idx[0, 0, 0], [0, 1, 3])
    assert int(mask.overflow) == NQ * 2


def test_random_choice_is_a_function_of_the_key():
    scores = jnp.zeros((B, H, NQ, NK))
    draws = [choose(scores, Random(0.5, jax.random.key(s)), Full(), **SIZES).kinds() for s in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()
    np.testing.assert_array_equal((np.asarray(draws[0]) > 0).sum(-1), 3)
    same = np.asarray(choose(scores, Random(0.5, jax.random.key(0), same_rows=True), Full(), **SIZES).kinds())
    np.testing.assert_array_equal(same, same[:, :, :1].repeat(NQ, 2))


def test_positions_that_are_known_at_run_time_place_the_diagonal():
    @jax.jit
    def kinds(positions):
        scores = jnp.zeros((1, 1, 1, NK))
        sizes = {"q_len": 2, "kv_len": 24, "bq": 2, "bk": 4}
        return from_scores(
            scores, TopK(0), Causal(), q_positions=positions, forced=Forced(diagonal=True), **sizes
        ).kinds()

    np.testing.assert_array_equal(kinds(jnp.array([9, 10]))[0, 0, 0], [0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(kinds(jnp.array([11, 12]))[0, 0, 0], [0, 0, 2, 1, 0, 0])


def test_key_head_scores_meet_masks_by_query_head():
    scores = jax.random.uniform(jax.random.key(0), (1, 2, NQ, NK))
    base = per_head([Full(), Local(0, 0), Full(), Full()])
    kinds = np.asarray(from_scores(scores, TopK(2), base, **SIZES).kinds())
    assert kinds.shape == (1, 4, NQ, NK)
    np.testing.assert_array_equal(kinds[0, 2], kinds[0, 3])


@pytest.mark.parametrize(
    "base", [None, Causal(6), BlockDense(np.eye(6, dtype=bool)[:4], 4), Bits(np.tri(16, 22, 6, dtype=bool))], ids=str
)
@pytest.mark.parametrize("traced", [False, True])
def test_dense_blocks_and_lists_are_the_same_tiles(base, traced):
    everything = Full() if base is None else base
    blocks = np.random.default_rng(1).random((B, H, NQ, NK)) < 0.5
    idx, count = np.argsort(~blocks, axis=-1, kind="stable"), blocks.sum(-1)
    idx = np.where(np.arange(NK) < count[..., None], idx, -1)

    def both(blocks, idx, count):
        return from_dense_blocks(blocks, base, **SIZES), from_lists(idx, count, base, **SIZES)

    dense, listed = (jax.jit(both) if traced else both)(blocks, idx, count)
    kinds = visited_kinds(compile_mask(everything, **SIZES)) * blocks
    for mask in (dense, listed):
        np.testing.assert_array_equal(visited_kinds(mask) > 0, kinds > 0)
    everywhere = np.asarray(everything.to_dense(16, 22))
    wide = blocks.repeat(BQ, 2).repeat(BK, 3)[..., :16, :22]
    np.testing.assert_array_equal(listed.to_dense(B, H), everywhere & wide)
    np.testing.assert_array_equal(dense.to_dense(B, H), everywhere & wide)


def test_pages():
    pages, count, lengths = np.array([[[3, 0], [1, 2]]]), np.array([[2, 1]]), np.array([14])
    mask = from_pages(pages, count, lengths, page_size=4, kv_len=20, q_len=2)
    seen = np.zeros((1, 2, 2, 20), bool)
    seen[0, 0, :, :4] = seen[0, 0, :, 12:14] = seen[0, 1, :, 4:8] = True
    seen[0, 0, 0, 13] = False
    np.testing.assert_array_equal(mask.to_dense(1, 2), seen)


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"need \[batch, heads, 4, 6\]"):
        from_scores(jnp.zeros((1, 1, 4, 5)), TopK(1), **SIZES)
    with pytest.raises(ValueError, match="must be bool"):
        from_dense_blocks(np.zeros((4, 6)), **SIZES)
    with pytest.raises(ValueError, match=r"\[batch, heads, 4, W\]"):
        from_lists(np.zeros((1, 1, 3, 2), int), np.zeros((1, 1, 3), int), **SIZES)
    with pytest.raises(ValueError, match="ratio must be above 0"):
        Ratio(0.0)
    with pytest.raises(ValueError, match="idx lists the block 6; 22 keys in blocks of 4 are blocks 0 to 5"):
        from_lists(np.full((1, 1, 4, 2), 6), np.ones((1, 1, 4), int), **SIZES)
    with pytest.raises(ValueError, match="idx lists the block 5 twice in a row"):
        from_lists(np.full((1, 1, 4, 2), 5), np.full((1, 1, 4), 2), **SIZES)
    with pytest.raises(ValueError, match="idx lists the block 4; 16 keys in blocks of 4 are blocks 0 to 3"):
        from_pages([[[0, 4]]], [[2]], [9], page_size=4, kv_len=16)
    with pytest.raises(ValueError, match="max_blocks must be at least 1, not 0"):
        from_dense_blocks(np.ones((4, 6), bool), max_blocks=0, **SIZES)
    for make, message in (
        (lambda: TopK(-1), "k must be an int of at least 0, not -1"),
        (lambda: TopK(1.5), "k must be an int of at least 0, not 1.5"),
        (lambda: TopP(1.5), "p must be above 0 and at most 1, not 1.5"),
        (lambda: Coverage(-0.1), "alpha must be above 0"),
        (lambda: Threshold(0.1, -1), "max_blocks must be an int of at least 0"),
        (lambda: Random(2.0, jax.random.key(0)), "ratio must be above 0"),
        (lambda: Forced(sinks=-1), "sinks must be an int of at least 0, not -1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="needs max_blocks"):
        TopK(jnp.asarray(2)).width(6)
