"""Selectors: pooled scores, patterns used again, Quest, SeerAttention."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.attention import (
    Causal,
    Context,
    Forced,
    PageBounds,
    Quest,
    Ratio,
    Reuse,
    ScoreSelector,
    SeerGate,
    Threshold,
    TopK,
    compile_mask,
    pooled_scores,
    quest_scores,
    seer_loss,
    seer_target,
    sparse_attention,
    stats_grid,
)


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_pooled_scores_are_products_of_means():
    q, k = draw(1, 10, 4, 8), draw(1, 7, 2, 8, seed=1)
    scores = pooled_scores(4, 3)(q, k, Context())
    assert scores.shape == (1, 4, 3, 3)
    mean = np.asarray(q)[0, 8:10, 3].mean(0) @ np.asarray(k)[0, 6:7, 1].mean(0) / np.sqrt(8)
    np.testing.assert_allclose(scores[0, 3, 2, 2], mean, rtol=1e-5)
    assert pooled_scores(4, 3) == pooled_scores(4, 3)


def test_a_group_can_share_its_blocks():
    q, k = draw(1, 16, 4, 8), draw(1, 16, 2, 8, seed=1)
    select = ScoreSelector(TopK(2), pooled_scores(4, 4), bq=4, bk=4, group_reduce=jnp.max)
    mask, _, scores = select(q, k, base=Causal())
    assert mask.lists.idx.shape == (1, 2, 4, 2)
    own = np.asarray(pooled_scores(4, 4)(q, k, Context()))
    np.testing.assert_array_equal(scores[0, 1], np.maximum(own[0, 2], own[0, 3]))


def test_a_pattern_is_used_again_in_a_scan():
    select = Reuse(ScoreSelector(TopK(1), pooled_scores(4, 4), bq=4, bk=4), every=3)
    q, k = draw(6, 1, 16, 2, 8), draw(1, 16, 2, 8, seed=1)
    mask, state, _ = select(q[0], k)

    def step(state, q):
        mask, state, _ = select(q, k, state=state)
        return state, mask.lists.idx

    _, idx = jax.lax.scan(step, state, q[1:])
    seen = [mask.lists.idx, *idx]
    fresh = [select.selector(x, k)[0].lists.idx for x in q]
    for at, source in enumerate([0, 0, 0, 3, 3, 3]):
        np.testing.assert_array_equal(seen[at], fresh[source])


def test_quest_bounds_every_key_and_is_exact_for_pages_of_one():
    q, k = draw(2, 1, 4, 8), draw(2, 20, 2, 8, seed=1)
    lengths = np.array([20, 13])
    products = np.einsum("bhd,bkhd->bhk", np.asarray(q)[:, 0], np.asarray(k).repeat(2, 2)).reshape(2, 2, 2, 20)
    exact = quest_scores(q, PageBounds.of_cache(k, lengths, 1))
    np.testing.assert_allclose(exact[0], products[0].sum(1), rtol=1e-4, atol=1e-4)
    assert (np.asarray(exact)[1, :, 13:] == -np.inf).all()
    bound = np.asarray(quest_scores(q, PageBounds.of_cache(k, lengths, 4)))
    for page in range(5):
        keys = products[0, :, :, 4 * page : 4 * page + 4].max(-1).sum(1)
        assert (bound[0, :, page] >= keys - 1e-4).all()
    assert (bound[1, :, 4] == -np.inf).all()


def test_quest_bounds_grow_with_the_cache():
    k = draw(2, 11, 2, 8)
    bounds = PageBounds.empty(2, 3, 2, 8, page_size=4)
    for first, last in ((0, 3), (3, 4), (4, 9), (9, 11)):
        bounds = bounds.append(k[:, first:last])
    chex.assert_trees_all_equal(bounds, PageBounds.of_cache(k, np.array([11, 11]), 4))


def test_quest_attends_to_all_pages_if_it_may_and_to_the_newest_always():
    q, k, v = draw(2, 1, 4, 8), draw(2, 20, 2, 8, seed=1), draw(2, 20, 2, 8, seed=2)
    lengths = np.array([18, 9])
    context = Context(kv_lengths=lengths)
    mask, _, _ = Quest(Ratio(1.0), page_size=4)(q, k, context=context)
    seen = np.arange(20) < lengths[:, None]
    np.testing.assert_array_equal(mask.to_dense(2, 4)[:, 0, 0], seen)
    mask, _, scores = Quest(TopK(2), page_size=4)(q, k, context=context)
    kinds = np.asarray(mask.kinds())[:, :, 0]
    for b, h in np.ndindex(2, 2):
        newest = (lengths[b] - 1) // 4
        others = np.argsort(-np.asarray(scores)[b, h, :newest], kind="stable")[:2]
        np.testing.assert_array_equal(np.flatnonzero(kinds[b, h]), np.sort([*others, newest]))
    sparse_attention(q, k, v, mask, implementation="xla")
    with pytest.raises(ValueError, match="needs a state"):
        Quest(TopK(2))(q, k)


def test_seer_target_is_the_block_maximum_of_each_row():
    q, k, v = draw(1, 12, 4, 8), draw(1, 12, 2, 8, seed=1), draw(1, 12, 2, 8, seed=2)
    mask = compile_mask(Causal(), 12, 12, bq=4, bk=4)
    _, aux = sparse_attention(q, k, v, mask, block_stats="max", implementation="xla")
    logits = np.einsum("qhd,khd->hqk", np.asarray(q)[0], np.asarray(k)[0].repeat(2, 1)) / np.sqrt(8)
    logits = np.where(np.tri(12, dtype=bool), logits, -np.inf)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    blocks = weights.reshape(4, 3, 4, 3, 4).max((2, 4))
    np.testing.assert_allclose(stats_grid(mask, aux.block_stats)[0], blocks, atol=1e-5)
    np.testing.assert_allclose(seer_target(mask, aux.block_stats)[0], blocks / blocks.sum(-1, keepdims=True), atol=1e-5)


def test_distillation_teaches_the_gate_only():
    gate = SeerGate(2, 1, 8, block=4, gate_dim=8, budget=Threshold(0.0), rngs=nnx.Rngs(0))
    q, k = draw(2, 32, 2, 8), draw(2, 32, 1, 8, seed=1)
    mask = compile_mask(Causal(), 32, 32, bq=4, bk=4)
    target = seer_target(mask, sparse_attention(q, k, k, mask, block_stats="max", implementation="xla")[1].block_stats)
    np.testing.assert_allclose(seer_loss(jnp.log(target + 1e-30), target, mask), 0, atol=1e-5)

    @nnx.jit
    def step(gate):
        loss, gradients = nnx.value_and_grad(lambda gate: seer_loss(gate.scores(q, k), target, mask))(gate)
        nnx.update(gate, jax.tree.map(lambda w, g: w - 0.3 * g, nnx.state(gate, nnx.Param), gradients))
        return loss

    losses = [float(step(gate)) for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]
    chosen, _, _ = gate(q, k, base=Causal())
    np.testing.assert_array_equal(np.asarray(chosen.kinds()) > 0, np.broadcast_to(mask.kinds() > 0, (2, 2, 8, 8)))


def test_the_gate_keeps_forced_rows_and_counts_its_threshold_in_the_softmax():
    q, k = draw(1, 16, 2, 8), draw(1, 16, 2, 8, seed=1)
    options = {"block": 4, "gate_dim": 8, "rngs": nnx.Rngs(0)}
    gate = SeerGate(2, 2, 8, budget=Threshold(0.3), forced=Forced(last_rows=1), **options)
    mask, _, logits = gate(q, k, base=Causal())
    allowed = np.tri(4, dtype=bool)
    weights = np.where(allowed, np.exp(np.asarray(logits)), 0)
    weights /= weights.sum(-1, keepdims=True)
    expected = (weights > 0.3) & allowed
    expected[:, :, -1] = True
    np.testing.assert_array_equal(np.asarray(mask.kinds()) > 0, expected)
    with pytest.raises(ValueError, match="must be even"):
        SeerGate(2, 2, 8, gate_dim=7, budget=TopK(1), rngs=nnx.Rngs(0))
