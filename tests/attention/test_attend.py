"""Attention under masks against dense attention with the mask written out; partial softmaxes; token sets and groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.attention import (
    Causal,
    Documents,
    Empty,
    Full,
    KeyRange,
    Local,
    Segment,
    Sink,
    TokenGroups,
    TokenSet,
    TopK,
    compile_mask,
    elbow,
    explain_attention,
    from_pages,
    from_scores,
    group_by_scores,
    merge_states,
    per_head,
    sparse_attention,
    tokens_where,
    top_tokens,
)
from tests.attention.plain import dense, qkv

IDS = np.array([[0] * 9 + [1] * 12, [0] * 15 + [-1] * 6])


@pytest.mark.parametrize(
    "mask",
    [
        None,
        Causal() & (Local(6) | Sink(2)),
        Causal() & Segment(IDS),
        per_head([Causal(), Empty(), Local(3, 3), KeyRange(2, 9)]),
    ],
    ids=str,
)
def test_values_and_gradients_are_those_of_dense_attention(mask):
    q, k, v = qkv(21, 21)
    written = (Full() if mask is None else mask).to_dense(21, 21)

    @jax.jit
    def both(q, k, v):
        weight = jnp.cos(jnp.arange(q.size)).reshape(q.shape)
        ours = jax.value_and_grad(
            lambda *x: jnp.sum(weight * sparse_attention(*x, mask, bq=8, bk=4, implementation="xla")), (0, 1, 2)
        )
        plain = jax.value_and_grad(lambda *x: jnp.sum(weight * dense(*x, written)[0]), (0, 1, 2))
        return ours(q, k, v), plain(q, k, v)

    for ours, plain in zip(*map(jax.tree.leaves, both(q, k, v)), strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-5, rtol=2e-5)


def test_a_masks_segments_may_be_traced():
    q, k, v = qkv(16, 16, batch=1)
    attend = jax.jit(lambda ids: sparse_attention(q, k, v, Causal() & Segment(ids), bq=4, bk=4, implementation="xla"))
    ids = np.repeat([0, 1], [6, 10])
    np.testing.assert_allclose(attend(ids), dense(q, k, v, (Causal() & Segment(ids)).to_dense(16, 16))[0], atol=1e-5)


def test_decoding_from_pages_of_a_pool():
    q, k, v = qkv(1, 16)
    table = np.array([[3, 0, 5, 6], [1, 2, 4, 7]])
    pools = [jnp.zeros((8, 4, *x.shape[2:])).at[table.ravel()].set(x.reshape(8, 4, *x.shape[2:])) for x in (k, v)]
    lengths = np.array([11, 14])
    mask = from_pages([[[2, 0]], [[3, 1]]], [[2], [1]], lengths, page_size=4, kv_len=16)
    seen = np.zeros((2, 1, 1, 16), bool)
    seen[0, ..., [0, 1, 2, 3, 8, 9, 10]] = seen[1, ..., 12:14] = True
    out = sparse_attention(q, *pools, mask, page_table=table, implementation="xla")
    np.testing.assert_allclose(out, dense(q, k, v, seen)[0], atol=1e-5)


def test_explains_its_choice_and_refuses_what_does_not_fit():
    q, k, v = qkv(16, 16)
    assert explain_attention(q, k, v, Causal(), implementation="xla").name == "xla"
    compiled = compile_mask(Causal(), 16, 16, bq=8, bk=8)
    assert explain_attention(q, k, v, compiled, implementation="reference").name == "reference"
    with pytest.raises(ValueError, match="bq, q_positions cannot be given with a compiled mask"):
        sparse_attention(q, k, v, compiled, bq=8, q_positions=np.arange(16))
    with pytest.raises(TypeError, match="must be a Mask, a BlockMask or None, not ndarray"):
        sparse_attention(q, k, v, np.ones((16, 16), bool))
    for side, message in ((0, "bq must be at least 1, not 0"), (8.0, "bq must be an int, not 8.0")):
        with pytest.raises(ValueError, match=message):
            sparse_attention(q, k, v, Causal(), bq=side)
    with pytest.raises(ValueError, match="q_pos has dtype float32; positions must be integers"):
        sparse_attention(q, k, v, Causal(), q_positions=np.arange(16, dtype=np.float32))
    with pytest.raises(ValueError, match="masks per head need one for every query head"):
        sparse_attention(q, k, v, per_head([Causal(), Local(3)]))


def test_merged_parts_are_the_whole():
    q, k, v = qkv(6, 12, heads=2, kv_heads=2)
    parts = [KeyRange(0, 5) & Causal(), KeyRange(5, None) & Causal(2), Empty()]
    written = [part.to_dense(6, 12) for part in parts]

    @jax.jit
    def both(q, k, v):
        def merged(*x):
            o, lse = merge_states([dense(*x, mask) for mask in written])
            return jnp.sum(jnp.cos(o)) + jnp.sum(jnp.where(lse > -jnp.inf, lse, 0)), (o, lse)

        def whole(*x):
            o, lse = dense(*x, functools.reduce(jnp.logical_or, written))
            return jnp.sum(jnp.cos(o)) + jnp.sum(jnp.where(lse > -jnp.inf, lse, 0)), (o, lse)

        return [jax.value_and_grad(f, (0, 1, 2), has_aux=True)(q, k, v) for f in (merged, whole)]

    for ours, plain in zip(*map(jax.tree.leaves, both(q, k, v)), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5, rtol=1e-5)


def test_merging_nothing_seen_is_zero_with_zero_gradients():
    o, lse = jnp.ones((1, 2, 1, 3)), jnp.full((1, 1, 2), -jnp.inf)
    (out, total), pull = jax.vjp(lambda *x: merge_states([x, x]), o, lse)
    assert (np.asarray(out) == 0).all()
    assert (np.asarray(total) == -np.inf).all()
    for gradient in pull((jnp.ones_like(out), jnp.zeros_like(total))):
        assert (np.asarray(gradient) == 0).all()
    with pytest.raises(ValueError, match="at least one"):
        merge_states([])


def test_merging_shows_what_is_not_a_number():
    o, lse = jnp.ones((1, 2, 1, 3)), jnp.zeros((1, 1, 2))
    out, total = merge_states([(o, lse), (o.at[0, 0].set(jnp.nan), lse.at[..., 0].set(jnp.nan))])
    for part in (out[0, 0], total[0, 0, 0]):
        assert np.isnan(part).all()
    for part in (out[0, 1], total[0, 0, 1]):
        assert np.isfinite(part).all()


def test_tokens_come_back_to_where_they_stood():
    kept = jnp.array([[True, False, True, True, False], [False] * 5])
    tokens = tokens_where(kept, 2)
    assert tokens.idx.tolist() == [[0, 2], [0, 0]]
    assert tokens.count.tolist() == [2, 0]
    assert int(tokens.overflow) == 1
    x = jnp.arange(10.0).reshape(2, 5)
    np.testing.assert_array_equal(tokens.scatter(-tokens.gather(x), x), [[0, 1, -2, 3, 4], [5, 6, 7, 8, 9]])
    assert tokens_where(kept, 7).idx.shape == (2, 7)


def test_top_tokens_with_forced_ones():
    scores = jnp.array([[[3.0, 1.0, 2.0, jnp.nan], [0.0, 0.0, 5.0, 1.0]]])
    forced = jnp.array([False, True, False, False])
    tokens = top_tokens(scores, TopK(1), forced=forced, capacity=2)
    assert tokens.idx.tolist() == [[[0, 1], [1, 2]]]
    assert tokens.gather(jnp.arange(8.0).reshape(1, 4, 2))[0].tolist() == [[0.0, 3.0], [2.0, 5.0]]


def test_attention_over_a_token_set_is_attention_over_those_keys():
    q, k, v = qkv(8, 8)
    kept = np.array([[1, 0, 1, 1, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0]], bool)
    tokens = tokens_where(jnp.asarray(kept), 5)
    out = sparse_attention(
        q,
        tokens.gather(k),
        tokens.gather(v),
        Causal() & tokens.mask(),
        kv_positions=tokens.idx,
        bq=4,
        bk=4,
        implementation="xla",
    )
    written = np.asarray(Causal().to_dense(8, 8)) & kept[:, None, None]
    np.testing.assert_allclose(out, dense(q, k, v, written)[0], atol=1e-5)
    with pytest.raises(ValueError, match="differs by head"):
        TokenSet(jnp.zeros((1, 2, 3), int), jnp.zeros((1, 2), int), jnp.zeros((1, 2), int)).scatter(k, k)


def test_elbow_does_not_depend_on_scale():
    scores = jnp.asarray(np.random.default_rng(0).random(40)).at[:5].add(10)
    np.testing.assert_array_equal(np.flatnonzero(elbow(scores)), np.arange(5))
    np.testing.assert_array_equal(elbow(scores), elbow(7 * scores))
    assert elbow(jnp.ones(4)).all()


def test_one_group_of_all_tokens_is_full_attention():
    q, k, v = qkv(6, 6, heads=2, kv_heads=2)
    everything = TokenGroups(jnp.broadcast_to(jnp.arange(6), (2, 2, 1, 6)))
    np.testing.assert_allclose(everything.attend(q, k, v), dense(q, k, v, Causal().to_dense(6, 6))[0], atol=1e-5)


def test_overlapping_groups_average_and_tokens_in_none_are_zero():
    q, k, v = qkv(5, 5, heads=1, kv_heads=1, batch=1)
    groups = TokenGroups(jnp.array([[[[0, 2], [2, 3]]]]))
    out = np.asarray(groups.attend(q, k, v, causal=False))
    parts = []
    for members in ([0, 2], [2, 3]):
        written = np.zeros((1, 1, 5, 5), bool)
        written[0, 0][np.ix_(members, members)] = True
        parts.append(np.asarray(dense(q, k, v, written)[0]))
    np.testing.assert_allclose(out[0, 2], (parts[0][0, 2] + parts[1][0, 2]) / 2, atol=1e-5)
    np.testing.assert_allclose(out[0, 0], parts[0][0, 0], atol=1e-5)
    assert (out[0, [1, 4]] == 0).all()
    assert groups.memberships(5).tolist() == [[[1, 0, 2, 1, 0]]]
    scores = jnp.asarray(np.random.default_rng(0).random((1, 1, 5, 2)))
    best = np.sort(np.argsort(-np.asarray(scores), axis=2)[:, :, :3].swapaxes(2, 3), axis=-1)
    np.testing.assert_array_equal(group_by_scores(scores, 3).idx, best)


def test_gates_train_through_block_bias():
    q, k, v = qkv(16, 16, heads=2, kv_heads=2, batch=1)
    mask = from_scores(jnp.zeros((1, 2, 4, 4)), TopK(3), Causal() & Documents([16]), q_len=16, kv_len=16, bq=4, bk=4)

    def loss(gate):
        return jnp.sum(sparse_attention(q, k, v, mask, block_bias=gate, implementation="xla") ** 2)

    gradient = jax.grad(loss)(jnp.zeros(mask.lists.idx.shape))
    step = 1e-2
    at = (0, 1, 3, 1)
    bumps = [float(loss(jnp.zeros(mask.lists.idx.shape).at[at].set(s))) for s in (step, -step)]
    np.testing.assert_allclose(gradient[at], (bumps[0] - bumps[1]) / (2 * step), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("spec", [(), ("data",)], ids=["whole", "split"])
def test_masks_with_arrays_on_an_explicit_mesh(spec):
    """Segments of each sequence, which lie whole or split over the batch."""
    r = np.random.default_rng(0)
    q, k, v = (jnp.asarray(r.normal(size=(4, 32, 4, 8)), jnp.float32) for _ in range(3))
    segments = jnp.asarray(np.sort(r.integers(0, 3, (4, 32)), axis=1))

    @jax.jit
    def attend(q, k, v, segments):
        return sparse_attention(q, k, v, Causal() & Segment(segments), bq=8, bk=8, implementation="xla")

    want, mesh = attend(q, k, v, segments), jax.make_mesh((2, 4), ("data", "tensor"))
    with jax.set_mesh(mesh):
        placed = jax.device_put((q, k, v), jax.NamedSharding(mesh, jax.P("data", None, "tensor")))
        got = attend(*placed, jax.device_put(segments, jax.NamedSharding(mesh, jax.P(*spec))))
    assert got.sharding.spec[:3] == ("data", None, "tensor")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
