"""Vertical-slash, FlexPrefill and SnapKV, against their definitions written as loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.attention import (
    Causal,
    Context,
    Coverage,
    FlexPrefill,
    Local,
    TopK,
    VerticalSlash,
    ada_snapkv,
    last_query_weights,
    slash_sums,
    snapkv,
    snapkv_scores,
    tokens_where,
)
from tests.attention.plain import dense, qkv

S = 40


def weights_by_loops(q, k, last):
    """Causal attention weights of the last queries: [B, H, last, S]."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64).repeat(q.shape[2] // k.shape[2], 2)
    out = np.zeros((q.shape[0], q.shape[2], last, k.shape[1]))
    for b, h, r in np.ndindex(out.shape[:3]):
        at = k.shape[1] - last + r
        logits = k[b, : at + 1, h] @ q[b, q.shape[1] - last + r, h] / np.sqrt(q.shape[-1])
        out[b, h, r, : at + 1] = np.exp(logits) / np.exp(logits).sum()
    return out


def diagonals_by_loops(weights):
    *lead, last, length = weights.shape
    out = np.zeros((*lead, length))
    for r in range(last):
        for key in range(length - last + r + 1):
            out[..., length - last + r - key] += weights[..., r, key]
    return out


def best(scores, count):
    return set(np.argsort(-scores, kind="stable")[:count].tolist())


def test_the_last_queries_weights_and_their_diagonals():
    q, k, _ = qkv(S, S)
    ours, loops = last_query_weights(q, k, 7), weights_by_loops(q, k, 7)
    np.testing.assert_allclose(ours, loops, atol=1e-6)
    np.testing.assert_allclose(slash_sums(ours), diagonals_by_loops(loops), atol=1e-5)
    with pytest.raises(ValueError, match="last=0 of 40 queries over 40 keys"):
        last_query_weights(q, k, 0)


@pytest.mark.parametrize(
    ("select", "count"),
    [
        (VerticalSlash(TopK(3), TopK(2), last=8, sinks=2, near=3, bq=8, bk=4), lambda free: (3, 2)),
        (
            VerticalSlash(Coverage(0.3, 4), Coverage(0.2), last=8, sinks=2, near=3, bq=4, bk=8),
            lambda free: (
                max(4, 1 + int(np.argmax(np.cumsum(-np.sort(-free[0])) >= 0.3 * free[0].sum()))),
                1 + int(np.argmax(np.cumsum(-np.sort(-free[1])) >= 0.2 * free[1].sum())),
            ),
        ),
    ],
    ids=["top", "mass"],
)
def test_vertical_slash_visits_the_chosen_keys_and_distances(select, count):
    q, k, v = qkv(S, S)
    weights = weights_by_loops(q, k, 8)
    mask, _, _ = jax.jit(lambda q, k: select(q, k, base=Local(30)))(q, k)
    exact, seen = np.zeros((2, 4, S, S), bool), np.zeros((2, 4, S, S), bool)
    row, column = np.arange(S)[:, None], np.arange(S)
    for b, h in np.ndindex(2, 4):
        scores = weights[b, h].mean(0), diagonals_by_loops(weights[b, h]) / 8
        numbers = count((scores[0][2:], scores[1][3:]))
        keys = {0, 1} | {2 + i for i in best(scores[0][2:], numbers[0])}
        distances = {0, 1, 2} | {3 + i for i in best(scores[1][3:], numbers[1])}
        slash = np.isin(row - column, list(distances))
        tiles = (slash | np.isin(column, list(keys))).reshape(S // select.bq, select.bq, S // select.bk, select.bk)
        slash = slash.reshape(tiles.shape).any((1, 3)).repeat(select.bq, 0).repeat(select.bk, 1)
        seen[b, h] = tiles.any((1, 3)).repeat(select.bq, 0).repeat(select.bk, 1) & (row - column <= 30)
        exact[b, h] = slash | np.isin(column, list(keys))
    causal = row >= column
    np.testing.assert_array_equal(mask.to_dense(2, 4), seen & causal)

    @jax.jit
    def both(q, k, v):
        def ours(q, k, v):
            o, lse = select.attend(q, k, v, return_lse=True, implementation="xla")
            return jnp.sum(jnp.cos(o)), (o, lse)

        def plain(q, k, v):
            o, lse = dense(q, k, v, exact & causal)
            return jnp.sum(jnp.cos(o)), (o, lse)

        return [jax.value_and_grad(f, (0, 1, 2), has_aux=True)(q, k, v) for f in (ours, plain)]

    for ours, plain in zip(*map(jax.tree.leaves, both(q, k, v)), strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-5, rtol=2e-5)


def test_flex_prefill_follows_the_authors_rule():
    q, k, _ = qkv(S, S)
    block, gamma, blocks = 8, 0.6, 5
    weights = weights_by_loops(q, k, block)
    q64, k64 = np.asarray(q, np.float64), np.asarray(k, np.float64).repeat(2, 2)
    pooled_q, pooled_k = (x.reshape(2, blocks, block, 4, 8).mean(2) for x in (q64, k64))
    roots, expected = np.zeros((2, 4)), np.zeros((2, 2, 4, blocks, blocks), bool)
    for b, h in np.ndindex(2, 4):
        shares = weights[b, h].mean(0), diagonals_by_loops(weights[b, h]) / block
        columns, diagonals = (share.reshape(blocks, block).sum(1) for share in shares)
        logits = pooled_k[b, :, h] @ pooled_q[b, -1, h] / np.sqrt(8)
        p = np.exp(logits) / np.exp(logits).sum()
        middle = (p + columns) / 2
        roots[b, h] = np.sqrt((p * np.log(p / middle) + columns * np.log(columns / middle)).sum() / 2)
        ranks = []
        for pooled in (columns, diagonals):
            ranks.append([0, *(1 + np.argsort(-pooled[1:], kind="stable"))])
        wanted = [(np.cumsum(-np.sort(-share)) <= gamma).sum() + 1 for share in shares]
        for by_tile in (0, 1):
            numbers = [1, 1] if by_tile else [min(blocks, max(1, n // block + 1)) for n in wanted]
            for i in range(blocks):
                for j in range(i + 1):
                    if j in ranks[0][: numbers[0]] or i - j in ranks[1][: numbers[1]]:
                        expected[by_tile, b, h, i, j] = True
        logits = pooled_q[b, :, h] @ pooled_k[b, :, h].T / np.sqrt(8)
        share = np.where(np.tri(blocks, dtype=bool), np.exp(logits), 0)
        share = (share / share.sum(1, keepdims=True)).ravel()
        order = np.argsort(-share, kind="stable")
        expected[1, b, h].ravel()[order[np.cumsum(share[order]) <= gamma * blocks]] = True
    expected[1] &= np.tri(blocks, dtype=bool)
    tau = float(np.median(roots))
    select = jax.jit(lambda gamma, tau: FlexPrefill(gamma, tau, block=block)(q, k)[::2])
    mask, divergence = select(gamma, tau)
    np.testing.assert_allclose(divergence, roots, atol=1e-5)
    by_tile = (roots < tau).astype(int)
    assert 0 < by_tile.sum() < by_tile.size
    for b, h in np.ndindex(2, 4):
        np.testing.assert_array_equal(np.asarray(mask.kinds())[b, h] > 0, expected[by_tile[b, h], b, h])
    everything, _ = select(1.0, 0.0)
    np.testing.assert_array_equal(everything.to_dense(2, 4), np.broadcast_to(np.tri(S, dtype=bool), (2, 4, S, S)))


def test_snapkv_keeps_the_window_the_sinks_and_the_best():
    q, k, v = qkv(12, S)
    window, kernel, sinks = 6, 3, 2
    weights = weights_by_loops(q, k, window).reshape(2, 2, 2, window, S)
    positions = np.array([S - 9, S - 3, S - 1])

    @jax.jit
    def compress(q, k, v):
        scores = snapkv_scores(q, k, window=window, kernel=kernel)
        tokens = snapkv(q, k, TopK(5), window=window, kernel=kernel, sinks=sinks)
        kept = tokens.gather(k), tokens.gather(v)
        options = {"q_positions": positions, "return_lse": True, "implementation": "xla"}
        return scores, tokens, tokens.attend(q[:, :3], *kept, Causal(), **options)

    scores, tokens, (out, aux) = compress(q, k, v)
    kept = np.zeros((2, 4, 1, S), bool)
    for b, h in np.ndindex(2, 2):
        total = np.pad(weights[b, h].mean(0).sum(0)[: S - window], 1)
        smooth = np.array([total[i : i + 3].mean() for i in range(S - window)])
        np.testing.assert_allclose(scores[b, h, : S - window], smooth, atol=1e-5)
        chosen = {0, 1, *range(S - window, S)} | {sinks + i for i in best(smooth[sinks:], 5)}
        assert tokens.idx[b, h].tolist() == sorted(chosen)
        kept[b, 2 * h : 2 * h + 2, 0, sorted(chosen)] = True
    assert int(tokens.overflow) == 0
    seen = kept & (np.arange(S) <= positions[:, None])
    plain, lse = dense(q[:, :3], k, v, seen)
    np.testing.assert_allclose(out, plain, atol=1e-5)
    np.testing.assert_allclose(aux.lse, lse, atol=1e-5)


def test_heads_share_what_ada_snapkv_keeps():
    q, k, _ = qkv(12, S)
    k = k.at[:, :, 0].multiply(4)
    window, keys = 4, 12
    tokens = jax.jit(lambda q, k: ada_snapkv(q, k, keys, window=window, kernel=1, sinks=1, floor=0.6))(q, k)
    assert tokens.count.sum(-1).tolist() == [2 * keys] * 2
    scores = weights_by_loops(q, k, window).reshape(2, 2, 2, window, S).max((2, 3))
    scores[..., S - window :] = scores[..., :1] = np.inf
    for b in range(2):
        own = [best(scores[b, h], 7) for h in range(2)]
        rest = [(-scores[b, h, i], h, i) for h in range(2) for i in range(S) if i not in own[h]]
        for _, h, i in sorted(rest)[: 2 * keys - 14]:
            own[h].add(i)
        for h in range(2):
            assert tokens.idx[b, h, : tokens.count[b, h]].tolist() == sorted(own[h])
    assert tokens.count[0, 0] != tokens.count[0, 1]


def test_errors_say_what_is_wrong():
    q, k, v = qkv(S, S)
    select = VerticalSlash(TopK(1), TopK(1))
    with pytest.raises(ValueError, match="as many queries as keys: 8 and 40"):
        select(q[:, :8], k)
    with pytest.raises(ValueError, match="leave positions out"):
        select(q, k, context=Context(q_positions=np.arange(S)))
    with pytest.raises(ValueError, match="positions left out"):
        FlexPrefill()(q[:, :8], k)
    with pytest.raises(ValueError, match="kernel must be an odd number"):
        snapkv_scores(q, k, kernel=4)
    with pytest.raises(ValueError, match="window=64 of 40 queries"):
        snapkv_scores(q, k)
    with pytest.raises(ValueError, match="keys=3 must be at least window"):
        ada_snapkv(q, k, 3, window=4)
    tokens = tokens_where(jnp.ones((2, 4, 5), bool), 5)
    with pytest.raises(ValueError, match="a set of 4 heads needs keys with as many, not 2"):
        tokens.attend(q, k[:, :5], v[:, :5])
