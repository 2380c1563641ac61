"""The dense reference against a few lines of numpy, the XLA path against the reference, and how options are checked."""

import dataclasses
import shutil

import attention_zoo as zoo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from pallas_kernels.block_sparse_attention import (
    BlockLists,
    block_sparse_attention,
    causal,
    dense_mask,
    explain,
    from_tiles,
    xla,
)

COMPILER = any(map(shutil.which, ("g++", "clang++", "c++")))
QUICK = settings(max_examples=5, deadline=None)


def simple(q_len=24, kv_len=24, b=8, heads=2, kv_heads=1, batch=2, dim=16, tiles=None, elem=causal, seed=0):
    r = np.random.default_rng(seed)
    nq, nk = -(-q_len // b), -(-kv_len // b)
    if tiles is None:
        tiles = np.tril(np.full((nq, nk), 2)) - np.eye(nq, nk, dtype=int)
    lists = from_tiles(tiles, bq=b, bk=b, q_len=q_len, kv_len=kv_len, elem=elem)
    q, k, v = (jnp.asarray(r.normal(size=(batch, n, h, dim)), jnp.float32)
               for n, h in ((q_len, heads), (kv_len, kv_heads), (kv_len, kv_heads)))  # fmt: skip
    return lists, q, k, v


def softmax_by_hand(q, k, v, mask, scale):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                seen = np.nonzero(np.broadcast_to(mask, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))[b, h, i])[0]
                if seen.size:
                    s = k[b, seen, h // group] @ q[b, i, h] * scale
                    w = np.exp(s - s.max())
                    out[b, i, h] = w / w.sum() @ v[b, seen, h // group]
    return out


def test_reference_is_masked_softmax():
    lists, q, k, v = simple(q_len=20, kv_len=28)
    mask = np.asarray(dense_mask(lists, 2, 2, 1))
    np.testing.assert_array_equal(mask[0, 0], np.tril(np.ones((20, 28), bool)))
    got = block_sparse_attention(q, k, v, lists, implementation="reference")
    np.testing.assert_allclose(got, softmax_by_hand(q, k, v, mask, 0.25), atol=2e-6)


@QUICK
@given(zoo.cases())
def test_xla_equals_reference_in_float64(case):
    with jax.enable_x64(True):
        zoo.assert_trees_close(case.run("xla", jnp.float64), case.run("reference", jnp.float64), 1e-11, 1e-12)


@pytest.mark.parametrize(("scores", "chunks", "slots", "blocks"), [(2**8, 2, 1, 1), (2**12, 1, 4, 2)])
@pytest.mark.parametrize(("rule", "shared"), [("bits", True), ("segments", False)])
def test_xla_in_several_steps_equals_reference(scores, chunks, slots, blocks, rule, shared, monkeypatch):
    monkeypatch.setattr(xla, "_STEP_SCORES", scores)
    case = zoo.Case(
        batch=2, heads=4, kv_heads=2, q_len=40, kv_len=30, dim=8, v_dim=5, bq=8, bk=8,
        batch_lists=1 if shared else 2, head_lists=1 if shared else 4, rule=rule,
        options=frozenset({"alibi", "block_bias", "bias", "dropout"}), seed=0,
    )  # fmt: skip
    lists, (q, k, _), *_ = case.arrays(jnp.float32)
    layout = xla._Layout.of(q, k.shape[2], lists)
    assert (layout.chunks, layout.slots, layout.blocks) == (chunks, min(slots, lists.width), blocks)
    assert lists.width > 1  # 5 query blocks, so one is left over
    with jax.enable_x64(True):
        zoo.assert_trees_close(case.run("xla", jnp.float64), case.run("reference", jnp.float64), 1e-11, 1e-12)


def test_values_that_are_nan_stay_out_of_queries_without_keys():
    lists, q, k, v = simple(tiles=np.diag([2, 0, 2]), elem=None)

    def loss(q):
        o = block_sparse_attention(q, k, v.at[:, 0].set(jnp.nan), lists, implementation="xla")
        return o.sum(), o

    dq, o = jax.grad(loss, has_aux=True)(q)
    for x in (o, dq):
        np.testing.assert_array_equal(x[:, 8:16], 0)
        assert np.isnan(x[:, :8]).all()
        assert np.isfinite(x[:, 16:]).all()


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_the_batch_stays_open_in_exported_programs(name):
    lists, q, k, v = simple(batch=3, heads=4, kv_heads=2)

    @jax.jit
    def attend(q, k, v):
        return block_sparse_attention(q, k, v, lists, implementation=name)

    (batch,) = jax.export.symbolic_shape("batch")
    program = jax.export.export(attend)(*(jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in (q, k, v)))
    np.testing.assert_allclose(program.call(q, k, v), attend(q, k, v), atol=1e-6)


@pytest.mark.parametrize("q_len", [1, 24])
@pytest.mark.parametrize("name", ["reference", "xla", "native"])
def test_what_lies_behind_the_lengths_has_no_effect(name, q_len):
    if name == "native" and not COMPILER:
        pytest.skip("no C++ compiler; its refusal is tested")
    lists, q, k, v = simple(tiles=np.full((-(-q_len // 8), 3), 2), elem=None, q_len=q_len)
    lengths = jnp.full(len(q), 13, jnp.int32)

    def loss(q, k, v):
        return (block_sparse_attention(q, k, v, lists, kv_lengths=lengths, implementation=name) ** 2).sum()

    want = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
    got = jax.value_and_grad(loss, (0, 1, 2))(q, k.at[:, 13:].set(jnp.nan), v.at[:, 13:].set(jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
@settings(max_examples=3, deadline=None)
@given(zoo.cases())
def test_xla_error_in_low_precision_is_at_most_twice_the_plain_one(dtype, case):
    with jax.enable_x64(True):
        zoo.assert_as_exact_as_plain(case, "xla", dtype)


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_full_tiles_relabelled_as_partial_change_nothing(name):
    tiles = np.array([[1, 0, 0], [2, 1, 0], [2, 2, 1]])
    lists, q, k, v = simple(tiles=tiles)
    relabelled, *_ = simple(tiles=np.minimum(tiles, 1))
    got, want = (block_sparse_attention(q, k, v, x, implementation=name) for x in (relabelled, lists))
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_queries_without_keys_are_zero_and_finite(name):
    tiles = np.array([[0, 0, 0], [1, 0, 0], [0, 0, 1]])
    lists, q, k, v = simple(tiles=tiles, elem=lambda q_pos, kv_pos, payload: (kv_pos < 4) & (q_pos % 2 == 0))

    def loss(q, k, v):
        o, aux = block_sparse_attention(q, k, v, lists, return_lse=True, implementation=name)
        return (o**2).sum() + jnp.where(jnp.isfinite(aux.lse), aux.lse, 0).sum(), (o, aux.lse)

    grads, (o, lse) = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    seen = np.asarray(dense_mask(lists, 2, 2, 1)).any(-1)[0, 0]
    assert seen.sum() == 4
    np.testing.assert_array_equal(np.asarray(o)[:, ~seen], 0)
    np.testing.assert_array_equal(np.isneginf(np.asarray(lse)), np.broadcast_to(~seen, lse.shape))
    np.testing.assert_array_equal(np.asarray(grads[0])[:, ~seen], 0)
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_bits_of_no_tile(name):
    lists, q, k, v = simple(tiles=np.full((3, 3), 2), elem=None)
    bits = jnp.zeros((1, 1, 3, 0, 8, 1), jnp.uint8)
    got = block_sparse_attention(
        q, k, v, dataclasses.replace(lists, max_part=0, payload={"bits": bits}), implementation=name
    )
    np.testing.assert_allclose(got, block_sparse_attention(q, k, v, lists, implementation="reference"), atol=1e-6)


def test_new_traced_lists_do_not_recompile():
    traces = []

    @jax.jit
    def run(q, k, v, tiles):
        traces.append(1)
        lists = from_tiles(tiles, bq=8, bk=8, q_len=24, kv_len=24, width=2)
        return jax.grad(lambda q: block_sparse_attention(q, k, v, lists, implementation="xla").sum())(q)

    _, q, k, v = simple()
    for seed in range(3):
        run(q, k, v, jnp.asarray(np.random.default_rng(seed).integers(0, 3, (3, 3))))
    assert len(traces) == 1


def test_vmap_over_lists():
    _, q, k, v = simple()
    tiles = jnp.asarray(np.random.default_rng(0).integers(0, 3, (3, 3, 3)))

    def run(tiles):
        lists = from_tiles(tiles, bq=8, bk=8, q_len=24, kv_len=24, elem=causal)
        return block_sparse_attention(q, k, v, lists, implementation="xla")

    np.testing.assert_allclose(jax.vmap(run)(tiles), jnp.stack([run(t) for t in tiles]), atol=1e-6)


def test_dropout_is_unbiased_and_reproducible():
    lists, q, k, v = simple(heads=1)
    plain = block_sparse_attention(q, k, v, lists, implementation="xla")
    run = jax.jit(lambda key: block_sparse_attention(q, k, v, lists, dropout=(0.4, key), implementation="xla"))
    keys = jax.random.split(jax.random.key(0), 300)
    np.testing.assert_array_equal(run(keys[0]), run(keys[0]))
    mean = sum(run(key) for key in keys) / len(keys)
    assert float(jnp.abs(mean - plain).max()) < 0.35
    assert float(jnp.abs(mean - plain).mean()) < 0.05


def test_statistics_of_tiles_and_largest_logit():
    lists, q, k, v = simple(q_len=20, kv_len=22)
    for kind in ("max", "mean", "sum"):
        options = {"block_stats": kind, "return_max_logit": True, "sinks": jnp.zeros(2)}
        want, got = (block_sparse_attention(q, k, v, lists, **options, implementation=name)[1]
                     for name in ("reference", "xla"))  # fmt: skip
        zoo.assert_trees_close(got, want, 1e-5, 1e-6)
    total = block_sparse_attention(q, k, v, lists, block_stats="sum", implementation="xla")[1].block_stats
    np.testing.assert_allclose(total.sum((2, 3)), 20, rtol=1e-5)


def test_pages_equal_contiguous_keys():
    r = np.random.default_rng(0)
    tiles = np.array([[[2, 0, 1, 2]], [[0, 1, 0, 2]]])[:, None]
    lists = from_tiles(tiles, bq=2, bk=8, q_len=2, kv_len=32)
    q, k, v = (jnp.asarray(r.normal(size=(2, n, h, 16)), jnp.float32) for n, h in ((2, 4), (32, 2), (32, 2)))
    order = r.permutation(8)
    table = jnp.asarray(np.argsort(order).reshape(2, 4), jnp.int32)
    pools = [x.reshape(8, 8, 2, 16)[order] for x in (k, v)]
    lengths = jnp.asarray([27, 32])
    want = block_sparse_attention(q, k, v, lists, kv_lengths=lengths, implementation="reference")
    for name in ("reference", "xla"):
        got = block_sparse_attention(q, *pools, lists, page_table=table, kv_lengths=lengths, implementation=name)
        np.testing.assert_allclose(got, want, atol=1e-6)
    with pytest.raises(NotImplementedError, match="no gradient for paged"):
        jax.grad(lambda q: block_sparse_attention(q, *pools, lists, page_table=table, implementation="xla").sum())(q)


def test_second_derivatives_on_the_reference():
    lists, q, k, v = simple(batch=1)

    def once(q):
        return jax.grad(lambda q: (block_sparse_attention(q, k, v, lists, implementation="reference") ** 2).sum())(q)

    assert np.isfinite(jax.grad(lambda q: (once(q) ** 2).sum())(q)).all()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="for arrays on the CPU")
def test_a_named_path_of_another_machine_refuses():
    lists, q, k, v = simple(q_len=128, kv_len=128, b=128)
    with pytest.raises(ValueError, match="tpu refused: it runs on tpu, and the arrays are on cpu"):
        block_sparse_attention(q, k, v, lists, implementation="tpu")
    # A program that is traced here may be compiled for one.
    jax.eval_shape(lambda q: block_sparse_attention(q, k, v, lists, implementation="tpu"), q)


def test_explain_names_the_choice_and_the_reasons():
    lists, q, k, v = simple()
    assert explain(q, k, v, lists, implementation="reference").name == "reference"
    choice = explain(q, k, v, lists, bias=jnp.zeros((1, 1, 1, 24)))
    assert choice.name == "xla"
    assert "xla" in str(choice)
    with pytest.raises(ValueError, match="implementation='fast'; allowed: None or one of reference"):
        block_sparse_attention(q, k, v, lists, implementation="fast")
    with pytest.raises(TypeError, match="unknown options"):
        explain(q, k, v, lists, colour="red")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sinks": jnp.zeros(3)}, r"sinks has shape \(3,\); it must be \(2,\)"),
        ({"block_bias": jnp.zeros((1, 1, 3, 9))}, r"block_bias has shape .* it must be \(1, 1, 3, 3\)"),
        ({"bias": jnp.zeros((24, 24))}, "with four axes"),
        ({"soft_cap": 0.0}, "soft_cap=0.0; it must be positive"),
        ({"dropout": (1.0, None)}, "at least 0 and below 1"),
        ({"dropout": (0.5, None)}, "a jax.random key is needed"),
        ({"dropout": 0.5}, r"dropout=0.5; it must be \(rate, key\)"),
        ({"kv_lengths": jnp.zeros(3, jnp.int32)}, r"kv_lengths has shape \(3,\)"),
        ({"kv_lengths": jnp.zeros(2)}, "must be an integer array"),
        ({"block_stats": "median"}, "block_stats='median'"),
        ({"page_table": jnp.zeros((2, 3), jnp.int32)}, "pages of k hold 24 keys"),
    ],
)
def test_wrong_options_are_named(change, message):
    lists, q, k, v = simple()
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(q, k, v, lists, **change)


def test_wrong_shapes_are_named():
    lists, q, k, v = simple()
    with pytest.raises(ValueError, match="four axes"):
        block_sparse_attention(q[0], k, v, lists)
    with pytest.raises(ValueError, match="one floating dtype"):
        block_sparse_attention(q.astype(jnp.bfloat16), k, v, lists)
    with pytest.raises(ValueError, match="built for q_len=24"):
        block_sparse_attention(q[:, :20], k, v, lists)
    with pytest.raises(ValueError, match="built for kv_len=24"):
        block_sparse_attention(q, k[:, :20], v[:, :20], lists)
    with pytest.raises(ValueError, match="not a multiple"):
        block_sparse_attention(jnp.zeros((2, 24, 3, 16)), jnp.zeros((2, 24, 2, 16)), jnp.zeros((2, 24, 2, 16)), lists)
    with pytest.raises(ValueError, match="multiply q by one that is traced"):
        jax.jit(lambda scale: block_sparse_attention(q, k, v, lists, scale=scale))(0.5)
    bad: BlockLists = dataclasses.replace(lists, payload={"colour": jnp.zeros(3)})
    with pytest.raises(ValueError, match="payload 'colour'"):
        block_sparse_attention(q, k, v, bad)
    bad = dataclasses.replace(lists, payload={"q_segment": jnp.zeros((3, 24))})
    with pytest.raises(ValueError, match=r"payload 'q_segment' has shape \(3, 24\); allowed: \(1, 24\) or \(2, 24\)"):
        block_sparse_attention(q, k, v, bad)
