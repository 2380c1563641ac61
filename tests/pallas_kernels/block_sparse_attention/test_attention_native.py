"""The C++ path against the reference. It is not skipped: without a compiler its refusal is what is checked."""

import dataclasses
import shutil

import attention_zoo as zoo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings

from pallas_kernels import native as build
from pallas_kernels.block_sparse_attention import block_sparse_attention, causal, explain, from_tiles, native

QUICK = settings(max_examples=4, deadline=None)
OPTIONS = ("alibi", "block_bias", "sinks", "soft_cap", "dropout", "kv_lengths", "scale")
COMPILER = any(map(shutil.which, ("g++", "clang++", "c++")))
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler; test_attention_choice_without_compiler ran")


def problem(seed=0, q_len=40, kv_len=56, heads=4, kv_heads=2, b=16, dtype=jnp.float32):
    r = np.random.default_rng(seed)
    tiles = r.integers(0, 3, (1, heads, -(-q_len // b), -(-kv_len // b)))
    lists = from_tiles(tiles, bq=b, bk=b, q_len=q_len, kv_len=kv_len, elem=causal)
    shapes = ((q_len, heads), (kv_len, kv_heads), (kv_len, kv_heads))
    return lists, *(jnp.asarray(r.normal(size=(2, n, h, 24)), dtype) for n, h in shapes)


def test_attention_choice_without_compiler(monkeypatch):
    monkeypatch.setattr(build, "unavailable", lambda source, targets: "no C++ compiler was found")
    lists, q, k, v = problem()
    choice = explain(q, k, v, lists)
    assert choice.name == "xla"
    assert "native refused: no C++ compiler was found" in str(choice)
    with pytest.raises(ValueError, match="no C\\+\\+ compiler was found"):
        block_sparse_attention(q, k, v, lists, implementation="native")
    want = block_sparse_attention(q, k, v, lists, implementation="xla")
    np.testing.assert_array_equal(block_sparse_attention(q, k, v, lists), want)


@needs_compiler
@QUICK
@given(zoo.cases(options=OPTIONS))
def test_error_is_at_most_twice_the_plain_one(case):
    with jax.enable_x64(True):
        zoo.assert_as_exact_as_plain(case, "native", jnp.float32)


@needs_compiler
@settings(max_examples=3, deadline=None)
@given(zoo.cases(options=OPTIONS, blocks=(16, 40, 64)))
def test_error_in_bfloat16_is_at_most_twice_the_plain_one(case):
    assume(case.q_len > case.bq)
    with jax.enable_x64(True):
        zoo.assert_as_exact_as_plain(case, "native", jnp.bfloat16)


@needs_compiler
@pytest.mark.parametrize(
    "options",
    [("dropout", "kv_lengths"), ("alibi", "block_bias", "soft_cap", "kv_lengths")],
    ids=lambda options: ", ".join(options),
)
def test_tiles_larger_than_the_pieces_they_are_cut_into(options):
    sizes = {"q_len": 430, "kv_len": 450, "dim": 24, "v_dim": 40, "bq": 150, "bk": 200}
    case = zoo.Case(2, 4, 2, **sizes, batch_lists=2, head_lists=4, rule="bits", options=frozenset(options), seed=3)
    with jax.enable_x64(True):
        zoo.assert_as_exact_as_plain(case, "native", jnp.float32)


@needs_compiler
def test_is_the_choice_on_cpu_and_says_what_it_does_not_take():
    lists, q, k, v = problem()
    assert explain(q, k, v, lists).name == "native"
    assert "no dense bias" in explain(q, k, v, lists, bias=jnp.zeros((1, 1, 1, 56))).refused["native"]
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in (q, k, v)]
        assert "float64" in explain(*wide, lists).refused["native"]
    long = jax.ShapeDtypeStruct((1, 2**17, 1, 64), jnp.float32)
    grid = jax.ShapeDtypeStruct((1, 1, 1024, 1024), jnp.int32)
    counts = jax.ShapeDtypeStruct((1, 1, 1024), jnp.int32)
    wide_lists = dataclasses.replace(
        lists, idx=grid, n_part=counts, n_tot=counts, bq=128, bk=128, q_len=2**17, kv_len=2**17, max_part=None
    )
    assert "give lists.max_part" in explain(long, long, long, wide_lists).refused["native"]
    assert explain(long, long, long, dataclasses.replace(wide_lists, max_part=1)).name == "native"


@needs_compiler
def test_same_bits_in_every_run_and_under_vmap():
    lists, q, k, v = problem(q_len=100, kv_len=120)

    @jax.jit
    def run(q, k, v):
        loss = lambda q, k, v: (block_sparse_attention(q, k, v, lists, implementation="native") ** 2).sum()  # noqa: E731
        return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

    first = run(q, k, v)
    for _ in range(5):
        jax.tree.map(np.testing.assert_array_equal, run(q, k, v), first)
    stacked = jax.vmap(lambda q: block_sparse_attention(q, k, v, lists, implementation="native"))(jnp.stack([q, 2 * q]))
    np.testing.assert_array_equal(stacked[0], block_sparse_attention(q, k, v, lists, implementation="native"))


@needs_compiler
def test_relabelling_full_as_partial_and_block_size_change_nothing():
    r = np.random.default_rng(0)
    grid = np.tril(np.full((4, 4), 2)) - np.eye(4, dtype=int)
    q, k, v = (jnp.asarray(r.normal(size=(1, 100, 2, 16)), jnp.float32) for _ in range(3))

    def run(b, tiles):
        lists = from_tiles(tiles, bq=b, bk=b, q_len=100, kv_len=100, elem=causal)
        return block_sparse_attention(q, k, v, lists, implementation="native")

    want = run(32, grid)
    np.testing.assert_allclose(run(32, np.minimum(grid, 1)), want, atol=1e-6)
    np.testing.assert_allclose(run(100, np.ones((1, 1), int)), want, atol=1e-6)
    np.testing.assert_allclose(run(7, np.tril(np.ones((15, 15), int))), want, atol=1e-6)


@needs_compiler
def test_queries_without_keys_are_zero_with_zero_gradients():
    lists, q, k, v = problem()
    lists = dataclasses.replace(lists, n_tot=np.zeros_like(lists.n_tot), n_part=np.zeros_like(lists.n_part))

    def loss(q, k, v):
        o, aux = block_sparse_attention(q, k, v, lists, return_lse=True, implementation="native")
        return (o**2).sum() + jnp.where(jnp.isfinite(aux.lse), aux.lse, 0).sum(), (o, aux.lse)

    grads, (o, lse) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    assert not o.any()
    assert np.isneginf(lse).all()
    assert not any(g.any() for g in grads)


@needs_compiler
@pytest.mark.parametrize("q_len", [40, 1])  # as in training, and as in decoding
def test_what_is_not_a_number_is_shown_to_queries_that_see_it(q_len):
    _, q, k, v = problem(q_len=q_len)
    b = min(q_len, 16)
    lists = from_tiles(np.ones((1, 4, -(-q_len // b), 4)), bq=b, bk=16, q_len=q_len, kv_len=56, elem=causal)

    def run(q, k, implementation):
        o, aux = block_sparse_attention(q, k, v, lists, return_lse=True, implementation=implementation)
        return o.sum(), (o, aux.lse)

    for spoiled in (
        (q.at[1, :, 2].set(jnp.nan), k),
        (q, k.at[0, 0, 1, 5].set(jnp.nan)),
        (q, k.at[:, :, 0].set(jnp.nan)),
    ):
        grads, got = jax.grad(run, argnums=(0, 1), has_aux=True)(*spoiled, "native")
        want_grads, want = jax.grad(run, argnums=(0, 1), has_aux=True)(*spoiled, "reference")
        for ours, plain in zip((*got, grads[0]), (*want, want_grads[0]), strict=True):
            assert np.isnan(plain).any()
            np.testing.assert_array_equal(np.isnan(ours), np.isnan(plain))


def cached(q_len, heads, kv_heads, dim, v_dim, page, pages, head_lists):
    """Pools of pages, the cache that they stand for, and lists of some of it."""
    r = np.random.default_rng(0)
    batch, length = 2, page * pages
    tiles = r.integers(0, 3, (batch, head_lists, 1, pages))
    payload = {"q_pos": (length - q_len - 3 + np.arange(q_len))[None]}
    lists = from_tiles(tiles, bq=q_len, bk=page, q_len=q_len, kv_len=length, elem=causal, payload=payload)
    table = jnp.asarray(r.permutation(batch * pages + 3)[: batch * pages].reshape(batch, pages), jnp.int32)
    q = jnp.asarray(r.normal(size=(batch, q_len, heads, dim)), jnp.float32)
    pools = [jnp.asarray(r.normal(size=(batch * pages + 3, page, kv_heads, d)), jnp.float32) for d in (dim, v_dim)]
    options = {
        "kv_lengths": jnp.asarray(r.integers(length // 2, length, batch), jnp.int32),
        "alibi": jnp.asarray(r.random(heads) * 0.01, jnp.float32),
        "soft_cap": 5.0,
        "block_bias": jnp.asarray(r.normal(size=lists.idx.shape), jnp.float32),
        "return_lse": True,
    }
    return lists, q, pools, [x[table].reshape(batch, length, kv_heads, -1) for x in pools], table, options


@needs_compiler
@pytest.mark.parametrize(
    "shape", [(1, 4, 2, 24, 24, 8, 6, 2), (3, 8, 2, 64, 32, 16, 40, 8), (1, 4, 4, 64, 64, 16, 200, 1)]
)
def test_few_queries_against_a_contiguous_and_a_paged_cache(shape):
    lists, q, pools, cache, table, options = cached(*shape)
    want = block_sparse_attention(q, *cache, lists, implementation="reference", **options)
    for got in (
        block_sparse_attention(q, *cache, lists, implementation="native", **options),
        block_sparse_attention(q, *pools, lists, implementation="native", page_table=table, **options),
    ):
        np.testing.assert_allclose(got[0], want[0], atol=2e-6)
        np.testing.assert_allclose(got[1].lse, want[1].lse, atol=2e-6)


@needs_compiler
def test_pages_that_are_not_listed_are_not_read():
    lists, q, pools, _, table, options = cached(1, 4, 2, 16, 16, 8, 6, 2)
    listed = np.zeros(pools[0].shape[0], bool)
    for b, h in np.ndindex(2, 2):
        listed[np.asarray(table)[b, lists.idx[b, h, 0, : lists.n_tot[b, h, 0]]]] = True
    spoiled = [jnp.where(listed[:, None, None, None], x, jnp.nan) for x in pools]
    for name in ("native", "xla"):
        o, _ = block_sparse_attention(q, *spoiled, lists, implementation=name, page_table=table, **options)
        assert np.isfinite(o).all()
    low = [x.astype(jnp.bfloat16) for x in (q, *pools)]
    choice = explain(*low, lists, page_table=table)
    assert choice.name == "xla"
    assert "whole cache" in choice.refused["native"]


@needs_compiler
def test_targets_are_the_symbols_of_the_source():
    text = native.SOURCE.read_text()
    assert all(f"XLA_FFI_DEFINE_HANDLER_SYMBOL({name}," in text for name in native.TARGETS)
