"""The GPU decode kernel for N:M: in the interpreter against dense computation, lowered and compiled for H200."""

import pytest
from nm_kernel_problems import Problem, assert_close, expected

from pallas_kernels import compat
from pallas_kernels.nm_matmul import gpu, programs
from tests.pallas_kernels.hopper import assert_compiles_without_spills, assert_lowers


@pytest.mark.skipif(compat.gpu_interpreter() is None, reason="this JAX has no interpreter for Mosaic GPU (0.12 has)")
@pytest.mark.parametrize(
    "problem",
    [
        Problem(rows=2, inputs=64, outputs=512, dtype="bfloat16"),
        Problem(rows=1, inputs=72, outputs=256, n=1, m=8, dtype="bfloat16"),
        Problem(rows=20, inputs=72, outputs=128, share=64, dtype="bfloat16"),
    ],
    ids=["2:4", "1:8", "2:4, 64 columns a pattern"],
)
def test_equals_dense_computation_without_races(problem):
    x, values, positions, _ = problem.draw()
    assert gpu.supports(x, values, positions, problem.sizes) is None
    y = gpu.forward(x, values, positions, problem.sizes, interpret=compat.gpu_interpreter())
    assert_close((y,), expected(problem)[:1], 1e-2)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Problem(rows=5, outputs=256), "5 rows; the GPU kernel decodes at most 4"),
        (Problem(rows=1, outputs=256, share=32), "a pattern shared by 32 columns"),
        (Problem(rows=1, outputs=256, share=64), "float32; the tensor cores"),
        (Problem(rows=1, outputs=200), "200 outputs"),
        (Problem(rows=1, outputs=256, m=16), "groups of m=16"),
    ],
)
def test_refuses_with_the_reason(problem, reason):
    x, values, positions, _ = problem.draw()
    assert reason in gpu.supports(x, values, positions, problem.sizes)


TAKEN = [name for name, shape in programs.SHAPES.items() if shape.rows <= gpu.MAX_ROWS or shape.share >= 64]


@pytest.mark.parametrize("name", TAKEN)
def test_lowers_for_every_shape(name):
    assert_lowers(programs, programs.SHAPES[name], 1)


@pytest.mark.aot
@pytest.mark.parametrize("name", TAKEN)
def test_compiles_for_h200_without_spills(name):
    assert_compiles_without_spills("nm_matmul", programs.SHAPES[name], {"forward"})
