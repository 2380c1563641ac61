import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks.nm import NM
from tests.masks.oracles import nm_mask


@pytest.mark.parametrize(
    ("structure", "shape"),
    [
        (NM(2, 4), (16, 5)),
        (NM(1, 4), (8,) * 2),
        (NM(1, 16), (32, 3)),
        (NM(4, 32), (64, 2)),
        (NM(3, 3), (9, 4)),
        (NM(2, 4, axis=-1), (5, 16)),
        (NM(2, 4, axis=0), (8, 3)),
        (NM(2, 4), (3, 3, 8, 6)),
        (NM(2, 4, axis=1), (2, 8, 3)),
        (NM(2, 4, share=2), (8, 6)),
        (NM(1, 4, share=3), (2, 8, 6)),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_loops_over_groups(structure, shape, dtype):
    scores = jnp.asarray(np.random.default_rng(0).integers(0, 6, shape), dtype)
    mask = structure.mask(scores)
    np.testing.assert_array_equal(mask, nm_mask(scores, structure.n, structure.m, structure.axis, structure.share))


@hypothesis.given(
    scores=hnp.arrays(np.float32, (8, 3), elements=st.sampled_from([-1.0, -0.0, 0.0, 1.0, 2.0, np.nan, np.inf])),
    n=st.integers(1, 4),
)
@hypothesis.settings(deadline=None, max_examples=40)
def test_every_group_keeps_n_and_nan_comes_last(scores, n):
    mask = np.asarray(NM(n, 4).mask(scores))
    assert (mask.reshape(2, 4, 3).sum(1) == n).all()
    kept, pruned = mask & np.isnan(scores), ~mask & ~np.isnan(scores)
    assert not (kept.reshape(2, 4, 3).any(1) & pruned.reshape(2, 4, 3).any(1)).any()
    np.testing.assert_array_equal(mask, nm_mask(np.nan_to_num(scores, nan=-9.0, posinf=9.0), n, 4, -2))


def test_hand_checked_groups():
    assert NM(2, 4).mask(jnp.abs(jnp.array([[0.1], [-0.9], [0.5], [0.2]]))).ravel().tolist() == [0, 1, 1, 0]
    assert NM(2, 4).mask(jnp.ones((4, 1))).ravel().tolist() == [1, 1, 0, 0]
    assert NM(2, 4).mask(jnp.array([[0.0], [-0.0], [0.0], [-0.0]])).ravel().tolist() == [1, 1, 0, 0]


def test_choose_keeps_more_of_every_group_for_larger_counts():
    scores = jnp.asarray(np.random.default_rng(1).standard_normal((16, 4)), jnp.float32)
    structure, groups = NM(1, 4), 16
    for count, quota in [(16, 1), (17, 2), (32, 2), (48, 3), (64, 4), (0, 0)]:
        expected = nm_mask(scores, quota, 4, -2) if quota else np.zeros((16, 4), bool)
        np.testing.assert_array_equal(structure.choose(scores, count), expected)
        np.testing.assert_array_equal(jax.jit(structure.choose)(scores, jnp.int32(count)), expected)
    assert int(structure.choose(scores, groups).sum()) == groups


def test_choose_among_some():
    scores = jnp.array([[4.0, jnp.nan], [3.0, jnp.nan], [2.0, 1.0], [1.0, jnp.nan]])
    where = jnp.array([[False, False], [True, True], [True, False], [False, True]])
    assert NM(2, 4).choose(scores, 4, where=where).tolist() == [[0, 0], [1, 1], [1, 0], [0, 1]]
    assert NM(1, 4).choose(scores, 2, where=where).tolist() == [[0, 0], [1, 1], [0, 0], [0, 0]]


def test_refill_tops_up_every_group():
    rng = np.random.default_rng(2)
    scores = rng.standard_normal((8, 5)).astype(np.float32)
    kept = rng.random((8, 5)) < 0.3
    structure = NM(2, 4)
    filled = np.asarray(structure.refill(scores, kept, 20))
    held = kept.reshape(2, 4, 5).sum(1)
    assert (filled >= kept).all()
    np.testing.assert_array_equal(filled.reshape(2, 4, 5).sum(1), np.maximum(held, 2))
    boosted = np.where(kept, 100.0, scores)
    full = (held <= 2)[:, None].repeat(4, 1).reshape(8, 5)
    np.testing.assert_array_equal(filled[full], nm_mask(boosted, 2, 4, -2)[full])
    np.testing.assert_array_equal(filled[~full], kept[~full])
    blocked = np.asarray(structure.refill(scores, kept, 20, where=np.zeros_like(kept)))
    np.testing.assert_array_equal(blocked, kept)
    traced = jax.jit(structure.refill)(scores, kept, jnp.int32(20))
    np.testing.assert_array_equal(traced, filled)


def test_units_of_shared_columns():
    structure = NM(2, 4, share=2)
    scores = jnp.arange(24, dtype=jnp.bfloat16).reshape(4, 6)
    assert structure.grid((4, 6)) == (4, 3)
    pooled = structure.pool(scores)
    assert pooled.dtype == jnp.float32
    np.testing.assert_array_equal(pooled, np.arange(24).reshape(4, 3, 2).sum(-1))
    spread = np.asarray(structure.spread(structure.choose(pooled, 6), (4, 6)))
    np.testing.assert_array_equal(spread[:, ::2], spread[:, 1::2])
    assert NM(2, 4).grid((4, 6)) == (4, 6)


def test_vmap():
    scores = jnp.asarray(np.random.default_rng(3).standard_normal((3, 8, 4)), jnp.float32)
    np.testing.assert_array_equal(jax.vmap(NM(2, 4, share=2).mask)(scores), [NM(2, 4, share=2).mask(s) for s in scores])


@pytest.mark.parametrize(("structure", "sparsity"), [(NM(2, 4), 0.5), (NM(1, 3), 2 / 3), (NM(1, 16), 0.9375)])
def test_a_sparsity_that_agrees_is_welcome(structure, sparsity):
    assert structure.mask(jnp.ones((48, 2)), sparsity).mean() == pytest.approx(1 - sparsity)
    assert float(1 - structure.fixed_density) == pytest.approx(sparsity)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"NM\(2, 4\) has sparsity 1/2 = 0.5, not 0.9", lambda: NM(2, 4).mask(jnp.ones((4, 4)), 0.9)),
        ("not nan", lambda: NM(2, 4).mask(jnp.ones((4, 4)), float("nan"))),
        (r"fc: axis -2 of shape \(6, 4\) does not divide into groups of 4", lambda: NM(2, 4).check((6, 4), "fc")),
        (r"rules=\{'fc': None\}", lambda: NM(2, 4).check((6, 4), "fc")),
        (r"fc: the 6 columns of shape \(4, 6\)", lambda: NM(2, 4, share=4).check((4, 6), "fc")),
        (r"fc: shape \(8,\) has no axis -2", lambda: NM(2, 4).check((8,), "fc")),
        ("would share patterns along the groups", lambda: NM(2, 4, axis=1, share=2).check((8, 8))),
        ("does not divide", lambda: NM(2, 4).mask(jnp.ones((6, 4)))),
        ("1 <= n <= m, got n=5, m=4", lambda: NM(5, 4)),
        ("got n=0, m=4", lambda: NM(0, 4)),
        ("1 or more, got 0", lambda: NM(2, 4, share=0)),
        ("cannot share patterns", lambda: NM(2, 4, axis=-1, share=2)),
    ],
)
def test_errors(message, call):
    with pytest.raises(ValueError, match=message):
        call()
