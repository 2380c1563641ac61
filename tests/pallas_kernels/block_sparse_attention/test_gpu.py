"""The GPU kernels: in the interpreter against the dense reference with race detection, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_problems import Problem, assert_close, assert_shows_nan, expected

from pallas_kernels import compat
from pallas_kernels.block_sparse_attention import gpu, programs
from pallas_kernels.block_sparse_attention.options import Extras, Settings

PROBLEMS = {
    "plain": Problem(rule="none", heads=1, kv_heads=1, dtype="bfloat16"),
    "causal, ragged, a list a head, group": Problem(kv_heads=1, head_lists=2, kv_len=200, dtype="bfloat16"),
    "payload, soft cap, block bias, ALiBi": Problem(
        heads=1, kv_heads=1, rule="segments", soft_cap=4.0, extras=("block_bias", "alibi"), dtype="bfloat16"
    ),
    "lengths a batch": Problem(batch=2, heads=1, kv_heads=1, q_len=128, extras=("kv_lengths",), dtype="bfloat16"),
}


needs_interpreter = pytest.mark.skipif(
    compat.gpu_interpreter() is None, reason="this JAX has no interpreter for Mosaic GPU (0.12 has)"
)


def computed(problem):
    """Output, lse and gradients of the kernels."""
    q, k, v, lists, extras, settings, do, dlse = problem.draw()
    assert gpu.supports(q, k, v, lists, extras, settings) is None
    interpret = compat.gpu_interpreter()
    o, lse = gpu.forward(q, k, v, lists, extras, settings, interpret=interpret)
    dlse = jnp.where(lse != -jnp.inf, dlse, 0)
    *grads, _ = gpu.backward(q, k, v, lists, extras, settings, o, lse, do, dlse, interpret=interpret)
    return o, lse, grads


@needs_interpreter
@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_the_reference_without_races(name):
    o, lse, grads = computed(PROBLEMS[name])
    want_o, want_lse, want_grads = expected(PROBLEMS[name])
    assert_close((lse,), (want_lse,), 3e-6)
    assert_close((o, *grads), (want_o, *want_grads[:3]), 1e-2)


@needs_interpreter
@pytest.mark.parametrize("spoiled", ["q", "k"])
def test_shows_what_is_not_a_number(spoiled):
    problem = Problem(heads=1, kv_heads=1, spoiled=spoiled, dtype="bfloat16")
    assert_shows_nan(computed(problem), expected(problem))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "dtype float32"),
        ({"bq": 64}, "blocks of 64 x 128; on GPU both sides are multiples of 128"),
        ({"dim": 96}, "head dimensions 96 and 96"),
        ({"bias": True}, "element bias"),
        ({"paged": True}, "page_table"),
        ({"dropout": True}, "dropout"),
        ({"bits": True}, "bits"),
    ],
)
def test_refuses_with_the_reason(change, reason):
    sizes = {name: change[name] for name in ("dtype", "bq", "dim") if name in change}
    shape = programs.Shape(**{"bq": 128, "bk": 128, "q_len": 1024, **sizes})
    (_, (q, k, v, lists)) = programs.programs(shape, "gpu", jax.ShapeDtypeStruct)["forward and backward"]
    if "bits" in change:
        lists.payload["bits"] = jax.ShapeDtypeStruct((1, 1, 8, 1, 128, 16), jnp.uint8)
    extras = Extras(bias=np.zeros((1, 1, 1, 1)) if "bias" in change else None)
    settings = Settings(1.0, dropout=0.1 * ("dropout" in change), page_size=128 if "paged" in change else None)
    assert reason in gpu.supports(q, k, v, lists, extras, settings)


@pytest.mark.parametrize("name", programs.SHAPES)
def test_lowers_for_every_shape(name):
    from jax import export

    shape = programs.SHAPES[name]
    if shape.dtype == "float32":
        pytest.skip("the GPU kernels take 16-bit types only")
    for function, arguments in programs.programs(shape, "gpu", jax.ShapeDtypeStruct).values():
        with compat.target_context("NVIDIA H200", 132, "gpu"):
            text = export.export(jax.jit(function), platforms=["cuda"])(*arguments).mlir_module()
        assert "mosaic_gpu" in text
