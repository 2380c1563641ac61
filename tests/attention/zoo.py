"""Random masks with an oracle: each comes with a plain NumPy function of its own, written from the definition."""

import jax
import numpy as np
from hypothesis import strategies as st

from sparsejax import attention as sa

# Every random mask is for this many tokens, queries and keys alike, in two examples and two heads.
TOKENS, BATCH, HEADS = 24, 2, 2


def _segments(seed: int):
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(-1, 4, (BATCH, TOKENS)))
    if seed % 2:
        ids = rng.permuted(ids, axis=1)
    index = np.arange(TOKENS)

    def oracle(q, k):
        a, b = ids[:, index][:, None, :, None], ids[:, None, None, :]
        return ((a == b) & (a >= 0))[:, :, q[:, 0]][..., k[0]]

    return sa.Segment(ids), oracle


def _table(seed: int, block: int, heads: int):
    blocks = np.random.default_rng(seed).random((heads, -(-TOKENS // block), -(-TOKENS // block))) < 0.4
    return sa.BlockDense(blocks, block), lambda q, k: blocks[:, q // block, k // block]


def _bits(seed: int):
    matrix = np.random.default_rng(seed).random((TOKENS, TOKENS)) < 0.5
    return sa.Bits(matrix), lambda q, k: matrix[q, k]


def _tokens(seed: int):
    rng = np.random.default_rng(seed)
    a, b = rng.random((1, TOKENS)) < 0.3, rng.random((BATCH, TOKENS)) < 0.3
    return sa.Tokens(q=a[0], kv=b), lambda q, k: a[0][q] & b[:, None, None, :][..., k[0]]


def _prefix(lengths):
    p = np.asarray(lengths)
    return sa.Prefix(p), lambda q, k: (k <= q) | (k < p[:, None, None, None])


def _log_sparse():
    far = {0, *(2**i for i in range(6))}
    return sa.LogSparse(TOKENS), lambda q, k: np.vectorize(lambda d: d in far)(q - k)


small = st.integers(1, 9)
seeds = st.integers(0, 99)
leaves = st.one_of(
    st.just((sa.Full(), lambda q, k: (q >= 0) & (k >= 0))),
    st.just((sa.Empty(), lambda q, k: (q < 0) & (k < 0))),
    st.integers(-5, 5).map(lambda o: (sa.Causal(o), lambda q, k: k <= q + o)),
    st.tuples(st.integers(-4, 12), st.integers(-4, 12)).map(
        lambda lr: (sa.Local(*lr), lambda q, k: (q - k <= lr[0]) & (k - q <= lr[1]))
    ),
    small.map(lambda w: (sa.Local(w), lambda q, k: q - k <= w)),
    small.map(lambda c: (sa.Chunk(c), lambda q, k: q // c == k // c)),
    st.tuples(small, small).map(lambda r: (sa.KeyRange(*r), lambda q, k: (q >= 0) & (r[0] <= k) & (k < r[1]))),
    small.map(lambda n: (sa.QueryRange(n, None), lambda q, k: (q >= n) & (k >= 0))),
    small.map(lambda n: (sa.Sink(n), lambda q, k: (q >= 0) & (k < n))),
    small.map(lambda s: (sa.Strided(s), lambda q, k: (k <= q) & ((q - k < s) | ((q - k) % s == 0)))),
    st.tuples(st.integers(2, 9), st.integers(1, 2)).map(
        lambda f: (sa.Fixed(*f), lambda q, k: (q // f[0] == k // f[0]) | (k % f[0] >= f[0] - f[1]))
    ),
    st.tuples(small, small).map(
        lambda d: (sa.Dilated(*d), lambda q, k: ((q - k) % d[1] == 0) & (np.abs(q - k) < d[0] * d[1]))
    ),
    st.tuples(st.integers(2, 9), st.integers(1, 3)).map(
        lambda g: (
            sa.GridAxial(*g),
            lambda q, k: (
                ((q // g[0] == k // g[0]) & ((q % g[0] - k % g[0]) % g[1] == 0))
                | ((q % g[0] == k % g[0]) & ((q // g[0] - k // g[0]) % g[1] == 0))
            ),
        )
    ),
    st.builds(_log_sparse),
    seeds.map(_segments),
    seeds.map(_bits),
    seeds.map(_tokens),
    st.builds(_table, seeds, st.sampled_from([4, 5, 8]), st.sampled_from([1, HEADS])),
    st.lists(st.integers(0, TOKENS), min_size=BATCH, max_size=BATCH).map(_prefix),
)


def _invert(pair):
    return ~pair[0], lambda q, k: ~pair[1](q, k)


def _and(a, b):
    return a[0] & b[0], lambda q, k: a[1](q, k) & b[1](q, k)


def _or(a, b):
    return a[0] | b[0], lambda q, k: a[1](q, k) | b[1](q, k)


def _per_head(a, b):
    def oracle(q, k):
        parts = [np.broadcast_to(f(q, k), (BATCH, HEADS, *np.broadcast_shapes(q.shape, k.shape))) for _, f in (a, b)]
        return np.stack([part[:, h] for h, part in enumerate(parts)], 1)

    return sa.per_head([a[0], b[0]]), oracle


def _permute(pair, seed):
    order = np.random.default_rng(seed).permutation(TOKENS)

    def oracle(q, k):
        full = np.arange(TOKENS)
        return np.asarray(pair[1](full[:, None], full[None]))[..., order, :][..., order][..., q, k]

    return pair[0].permute(order), oracle


flat = st.recursive(
    leaves,
    lambda parts: st.one_of(
        parts.map(_invert),
        st.builds(_and, parts, parts),
        st.builds(_or, parts, parts),
        st.builds(_permute, parts, seeds),
    ),
    max_leaves=4,
)
masks = st.one_of(flat, st.builds(_per_head, flat, flat))


def oracle_dense(oracle, q_len: int = TOKENS, kv_len: int = TOKENS) -> np.ndarray:
    """The oracle's matrix, bool [BATCH, HEADS, q_len, kv_len]."""
    dense = oracle(np.arange(TOKENS)[:, None], np.arange(TOKENS)[None])
    return np.broadcast_to(dense, (BATCH, HEADS, TOKENS, TOKENS))[:, :, :q_len, :kv_len]


def oracle_kinds(dense: np.ndarray, bq: int, bk: int) -> np.ndarray:
    """The exact kind of every tile: 0 empty, 2 full, 1 else."""
    nq, nk = -(-dense.shape[2] // bq), -(-dense.shape[3] // bk)
    kinds = np.zeros((*dense.shape[:2], nq, nk), int)
    for i in range(nq):
        for j in range(nk):
            tile = dense[:, :, i * bq : (i + 1) * bq, j * bk : (j + 1) * bk]
            kinds[:, :, i, j] = np.where(tile.all((2, 3)), 2, np.where(tile.any((2, 3)), 1, 0))
    return kinds


def visited_kinds(compiled) -> np.ndarray:
    """The grid of tiles that the lists of a BlockMask spell out, int [Bm, Hm, nq, nk]."""
    lists = jax.tree.map(np.asarray, compiled.lists)
    kinds = np.zeros((*lists.n_tot.shape, lists.nk), int)
    for b, h, i in np.ndindex(lists.n_tot.shape):
        kinds[b, h, i, lists.idx[b, h, i, : lists.n_tot[b, h, i]]] = 2
        kinds[b, h, i, lists.idx[b, h, i, : lists.n_part[b, h, i]]] = 1
    return kinds


def visited(compiled) -> np.ndarray:
    """What attention sees under a BlockMask, tile by tile in NumPy: bool [BATCH, HEADS, q_len, kv_len]."""
    lists = jax.tree.map(np.asarray, compiled.lists)
    dense = np.zeros((BATCH, HEADS, lists.q_len, lists.kv_len), bool)
    values = {"q_pos": np.arange(lists.q_len)[None], "kv_pos": np.arange(lists.kv_len)[None], **lists.payload}
    for b, h, i in np.ndindex(BATCH, HEADS, lists.nq):
        bm, hm = b % lists.idx.shape[0], h % lists.idx.shape[1]
        for slot in range(lists.n_tot[bm, hm, i]):
            j = lists.idx[bm, hm, i, slot]
            rows = slice(i * lists.bq, min((i + 1) * lists.bq, lists.q_len))
            columns = slice(j * lists.bk, min((j + 1) * lists.bk, lists.kv_len))
            if slot >= lists.n_part[bm, hm, i]:
                dense[b, h, rows, columns] = True
                continue
            if lists.elem is None:
                bits = np.unpackbits(values["bits"][bm, hm, i, slot], axis=-1, bitorder="little").astype(bool)
                dense[b, h, rows, columns] = bits[: rows.stop - rows.start, : columns.stop - columns.start]
                continue
            own = {n: a if n.startswith("scalar_") else a[b % len(a)] for n, a in values.items() if n != "bits"}
            own |= {n: a[h] for n, a in values.items() if n.startswith("head_")}
            own |= {n: a[rows, None] for n, a in own.items() if n.startswith("q_")}
            own |= {n: a[None, columns] for n, a in own.items() if n.startswith("kv_")}
            dense[b, h, rows, columns] = lists.elem(own.pop("q_pos"), own.pop("kv_pos"), own)
    return dense
