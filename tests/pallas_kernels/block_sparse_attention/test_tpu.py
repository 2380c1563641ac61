"""The TPU kernels: in the interpreter against the dense reference, for races, lowered for every shape of a list."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from kernel_problems import Problem, assert_close, assert_shows_nan, expected

from pallas_kernels import compat
from pallas_kernels.block_sparse_attention import programs, tpu
from pallas_kernels.block_sparse_attention.options import Extras, Settings

PROBLEMS = {
    "plain": Problem(rule="none"),
    "causal, a list a head, groups": Problem(heads=4, head_lists=4, kv_len=384, q_len=384),
    "ragged, lists a batch and key head": Problem(
        batch=2, heads=4, batch_lists=2, head_lists=2, q_len=300, kv_len=450, v_dim=32
    ),
    "one key head, wide keys, block bias": Problem(
        heads=4, kv_heads=1, q_len=300, kv_len=450, bk=256, dim=128, v_dim=128, extras=("block_bias",)
    ),
    "payload, soft cap, block bias, ALiBi": Problem(
        batch=2, heads=4, head_lists=4, rule="segments", soft_cap=4.0, extras=("block_bias", "alibi")
    ),
    "dropout and lengths": Problem(batch=2, kv_len=450, dropout=0.3, extras=("kv_lengths",)),
    "one block a step": Problem(q_len=512, kv_len=700, bq=512, bk=512, heads=1, kv_heads=1),
}


def computed(problem, interpret, fused=False):
    """Output, lse and gradients of the kernels, under jit with the lists as arguments."""
    q, k, v, lists, extras, settings, do, dlse = problem.draw()

    @jax.jit
    def run(q, k, v, lists, extras, do, dlse):
        o, lse = tpu.forward(q, k, v, lists, extras, settings, interpret=interpret)
        dlse = jnp.where(lse != -jnp.inf, dlse, 0)
        *grads, rest = tpu.backward(
            q, k, v, lists, extras, settings, o, lse, do, dlse, interpret=interpret, fused=fused
        )
        if rest.block_bias is not None:
            grads.append(rest.block_bias)
        return o, lse, tuple(grads)

    assert tpu.supports(q, k, v, lists, extras, settings) is None
    return run(q, k, v, lists.transposed(), extras, do, dlse)


@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_the_reference(name):
    assert_close(computed(PROBLEMS[name], True), expected(PROBLEMS[name]), 2e-5)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(rule="none", heads=2, kv_heads=1, q_len=384),
        Problem(heads=4, head_lists=4, q_len=200, soft_cap=4.0),
    ],
    ids=["shared lists", "a list a head"],
)
def test_fused_backward_equals_the_reference(problem):
    assert_close(computed(problem, True, fused=True), expected(problem), 2e-5)


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize(
    "problem", [Problem(spoiled="q", kv_heads=1), Problem(spoiled="k", rule="none")], ids=["query", "key"]
)
def test_shows_what_is_not_a_number(problem, fused):
    assert_shows_nan(computed(problem, True, fused), expected(problem))


def test_fuses_while_dq_fits_into_vector_memory():
    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    assert tpu._fuses(array(1, 8, 4096, 128), array(1, 2, 4096, 128), Extras())
    assert not tpu._fuses(array(1, 8, 4096, 128), array(1, 2, 4096, 128), Extras(block_bias=np.zeros(1)))
    assert not tpu._fuses(array(1, 8, 65536, 128), array(1, 8, 65536, 128), Extras())


def test_bfloat16_is_as_close_as_its_precision_allows():
    problem = Problem(heads=2, kv_heads=1, dtype="bfloat16")
    assert_close(computed(problem, True), expected(problem), 2e-2)


@pytest.mark.parametrize(
    ("problem", "fused"),
    [
        (Problem(heads=1, kv_heads=1, kv_len=200), False),
        pytest.param(
            Problem(kv_heads=1, bk=256, rule="segments", extras=("block_bias",)), False, marks=pytest.mark.slow
        ),
        (Problem(kv_heads=1, rule="none"), True),
    ],
    ids=["causal", "group with block bias", "fused backward"],
)
def test_no_races(problem, fused):
    got = computed(problem, pltpu.InterpretParams(detect_races=True), fused)
    jax.block_until_ready(got)
    assert not compat.tpu_races_found()
    assert_close(got, expected(problem), 2e-5)


@pytest.mark.slow
def test_lists_too_large_for_scalar_memory_go_in_shares(monkeypatch):
    problem = Problem(batch=2, heads=4, batch_lists=2, head_lists=4, rule="none", extras=("block_bias",))
    lists = problem.draw()[3]
    one = max(tpu._list_bytes(lists, 2, by_key) for by_key in (False, True))
    assert len(tpu._shares(2, 2, 2, 4, one)) == 1
    monkeypatch.setattr(tpu, "SCALAR_BYTES", 2 * one)
    assert len(tpu._shares(2, 2, 2, 4, one)) == 4
    assert_close(computed(problem, True), expected(problem), 2e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float16"}, "dtype float16"),
        ({"bq": 64}, "blocks of 64 x 128; on TPU both sides are multiples of 128"),
        ({"bias": True}, "element bias"),
        ({"paged": True}, "page_table"),
        ({"bits": True}, "bits"),
        ({"payload": True}, "payload 'q_x' of dtype bool"),
        ({"long": True}, "KiB of scalar memory"),
    ],
)
def test_refuses_with_the_reason(change, reason):
    shape = programs.Shape(dtype=change.get("dtype", "float32"), bq=change.get("bq", 128), bk=128, q_len=1024)
    if "long" in change:
        shape = programs.Shape(bq=128, bk=128, q_len=2**20, width=64)
    (_, (q, k, v, lists)) = programs.programs(shape, "tpu", jax.ShapeDtypeStruct)["forward and backward"]
    if "bits" in change:
        lists.payload["bits"] = jax.ShapeDtypeStruct((1, 1, 8, 1, 128, 16), jnp.uint8)
    if "payload" in change:
        lists.payload["q_x"] = jax.ShapeDtypeStruct((1, 1024), jnp.bool_)
    extras = Extras(bias=np.zeros((1, 1, 1, 1)) if "bias" in change else None)
    settings = Settings(scale=1.0, page_size=128 if "paged" in change else None)
    assert reason in tpu.supports(q, k, v, lists, extras, settings)


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite"])
@pytest.mark.parametrize("name", programs.SHAPES)
def test_lowers_for_every_shape(name, kind):
    from jax import export

    for function, arguments in programs.programs(programs.SHAPES[name], "tpu", jax.ShapeDtypeStruct).values():
        with compat.target_context(kind, 1, "tpu"):
            text = export.export(jax.jit(function), platforms=["tpu"])(*arguments).mlir_module()
        assert text.count("tpu_custom_call") >= 1
