"""The TPU kernels for N:M: in the interpreter against dense computation, lowered and compiled for every shape."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from nm_kernel_problems import Problem, assert_close, expected

from pallas_kernels import aot, compat
from pallas_kernels.nm_matmul import programs, tpu
from pallas_kernels.nm_matmul.shapes import Sizes

PROBLEMS = {
    "2:4, ragged": Problem(),
    "3:8, a pattern for 32 columns": Problem(rows=5, inputs=640, outputs=128, n=3, m=8, share=32),
    "2:4, a pattern for 128 columns, bfloat16": Problem(rows=70, outputs=256, share=128, dtype="bfloat16"),
}
MORE_PROBLEMS = {
    "1:8, several steps": Problem(rows=7, inputs=2304, outputs=300, n=1, m=8),
    "2:4, a pattern for 256 columns": Problem(inputs=640, outputs=512, share=256),
    "3:8, several panels, bfloat16": Problem(rows=600, inputs=256, outputs=128, n=3, m=8, dtype="bfloat16"),
}


def computed(problem, interpret):
    """y, dx and dvalues of the kernels, under jit."""
    x, values, positions, dy = problem.draw()
    sizes = problem.sizes
    assert tpu.supports(x, values, positions, sizes) is None

    @jax.jit
    def run(x, values, positions, dy):
        y = tpu.forward(x, values, positions, sizes, interpret=interpret)
        return y, *tpu.backward(x, values, positions, sizes, dy, interpret=interpret)

    return run(x, values, positions, dy)


def check(problem):
    assert_close(computed(problem, True), expected(problem), 3e-6 if problem.dtype == "float32" else 1e-2)


@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_dense_computation(name):
    check(PROBLEMS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_PROBLEMS)
def test_equals_dense_computation_at_more_corners(name):
    check(MORE_PROBLEMS[name])


@pytest.mark.slow
@pytest.mark.parametrize("share", [1, 128])
def test_no_races(share):
    problem = Problem(rows=20, inputs=1100, outputs=256, share=share)
    got = computed(problem, pltpu.InterpretParams(detect_races=True))
    jax.block_until_ready(got)
    assert not compat.tpu_races_found()
    assert_close(got, expected(problem), 3e-6)


@pytest.mark.parametrize(
    ("dtype", "m", "reason"), [("float16", 4, "dtypes float16 and float16"), ("float32", 64, "groups of m=64")]
)
def test_refuses_with_the_reason(dtype, m, reason):
    x, values = (jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in ((8, 128), (4, 128)))
    positions = jax.ShapeDtypeStruct((4, 128), jnp.uint8)
    assert reason in tpu.supports(x, values, positions, Sizes(128, 128, 128 // m, m, 1))


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite"])
@pytest.mark.parametrize("name", programs.SHAPES)
def test_lowers_for_every_shape(name, kind):
    from jax import export

    for function, arguments in programs.programs(programs.SHAPES[name], "tpu", jax.ShapeDtypeStruct).values():
        with compat.target_context(kind, 1, "tpu"):
            text = export.export(jax.jit(function), platforms=["tpu"])(*arguments).mlir_module()
        assert "tpu_custom_call" in text


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("name", programs.SHAPES)
def test_compiles(target, name):
    lacking = aot.missing(target)
    if lacking:
        pytest.skip(lacking)
    shape = programs.SHAPES[name]
    (report,) = aot.compile_for(target, "nm_matmul", shape)
    # The compiler adds where a kernel was called from to its name.
    parts = {re.search("nm_matmul_(forward|dx|dvalues)", k.name)[1] for k in report.kernels}
    assert parts == ({"forward", "dx", "dvalues"} if shape.gradient else {"forward"})
    assert all(k.vmem_bytes < 2**26 for k in report.kernels)
