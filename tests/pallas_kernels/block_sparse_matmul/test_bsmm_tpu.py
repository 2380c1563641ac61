"""The TPU kernels: in the interpreter against dense computation, for races, lowered and compiled for every shape."""

import dataclasses
import re

import jax
import pytest
from bsmm_kernel_problems import Problem, assert_close, expected
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import aot, compat
from pallas_kernels.block_sparse_matmul import explain, programs, tpu

PROBLEMS = {
    "ragged on every side": Problem(rows=37, inputs=300, outputs=450),
    "groups, tall blocks, bfloat16": Problem(rows=300, bk=256, groups=2, capacity=4, dtype="bfloat16"),
}
MORE_PROBLEMS = {
    "every slot in use, wide blocks": Problem(bn=256, capacity=6, full=True),
    "more slots than blocks": Problem(rows=16, inputs=256, outputs=256, capacity=9, full=True),
    "no block at all": Problem(rows=16, capacity=2, empty=True),
}


def computed(problem, interpret):
    """y, dx and dvalues of the kernels, under jit with the lists as arguments."""
    x, values, lists, sizes, dy = problem.draw()
    assert tpu.supports(x, values, lists, sizes) is None

    @jax.jit
    def run(x, values, lists, dy):
        y = tpu.forward(x, values, lists, sizes, interpret=interpret)
        return y, *tpu.backward(x, values, lists, sizes, dy, interpret=interpret)

    return run(x, values, lists, dy)


def check(problem):
    assert_close(computed(problem, True), expected(problem), 3e-6 if problem.dtype == "float32" else 1e-2)


@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_dense_computation(name):
    check(PROBLEMS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_PROBLEMS)
def test_equals_dense_computation_at_more_corners(name):
    check(MORE_PROBLEMS[name])


@pytest.mark.parametrize("panels", [(64,), ()], ids=["inputs that stay", "inputs that stream"])
def test_no_races_over_panels_and_shares(panels, monkeypatch):
    problem = Problem(rows=100, inputs=256, outputs=300, capacity=6, full=True)
    whole = tpu._gradient_plan
    monkeypatch.setattr(tpu, "PANELS", panels)
    # Gradients of four blocks are held at a time, so there is a second share.
    monkeypatch.setattr(tpu, "_gradient_plan", lambda *a: dataclasses.replace(whole(*a), held=4))
    plan = tpu._plan(problem.rows, problem.draw()[3], 4, False)
    assert plan.resident == bool(panels)
    got = computed(problem, pltpu.InterpretParams(detect_races=True))
    jax.block_until_ready(got)
    assert not compat.tpu_races_found()
    assert_close(got, expected(problem), 3e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float16"}, "dtypes float16 and float16"),
        ({"bk": 64}, "blocks of 64 x 64; on TPU both sides are multiples of 128"),
        ({"inputs": 2**17, "outputs": 2**17}, "KiB of scalar memory"),
        ({"inputs": 2**17, "outputs": 2**13, "percent": 1}, "shard the matrix"),
        ({"bk": 2048}, "blocks of 2048 x 2048 do not fit vector memory"),
    ],
)
def test_refuses_with_the_reason(change, reason):
    shape = programs.Shape(**change)
    x, values, lists = programs.abstract_arguments(shape, jax.ShapeDtypeStruct)
    choice = explain(x, values, lists, shape=(shape.inputs, shape.outputs), implementation="tpu")
    assert choice.name is None
    assert reason in choice.refused["tpu"]


TAKEN = [name for name, shape in programs.SHAPES.items() if shape.bk % tpu.LANES == 0]


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite"])
@pytest.mark.parametrize("name", TAKEN)
def test_lowers_for_every_shape(name, kind):
    from jax import export

    for function, arguments in programs.programs(programs.SHAPES[name], "tpu", jax.ShapeDtypeStruct).values():
        with compat.target_context(kind, 1, "tpu"):
            text = export.export(jax.jit(function), platforms=["tpu"])(*arguments).mlir_module()
        assert text.count("tpu_custom_call") >= 3


def compiled(target, shape):
    """The kernels of a shape by what they compute, or a skip that says what is not installed."""
    lacking = aot.missing(target)
    if lacking:
        pytest.skip(lacking)
    (report,) = aot.compile_for(target, "block_sparse_matmul", shape)
    # The compiler adds where a kernel was called from to its name.
    return {re.search("block_sparse_matmul_(forward|dx|dvalues)", k.name)[1]: k for k in report.kernels}


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("name", TAKEN)
def test_compiles_and_common_blocks_do_not_spill(target, name):
    kernels = compiled(target, programs.SHAPES[name])
    assert set(kernels) == {"forward", "dx", "dvalues"}
    assert all(k.smem_bytes < 2**20 and k.vmem_bytes < 2**26 for k in kernels.values())
    if programs.SHAPES[name].dtype == "bfloat16" and programs.SHAPES[name].bk <= 256:
        assert {part: k.spills for part, k in kernels.items()} == dict.fromkeys(kernels, 0)
