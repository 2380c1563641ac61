"""The GPU kernels: in the interpreter against dense computation with race detection, lowered and compiled for H200."""

import jax
import pytest
from bsmm_kernel_problems import Problem, assert_close, expected

from pallas_kernels import compat
from pallas_kernels.block_sparse_matmul import explain, gpu, programs
from tests.pallas_kernels.hopper import assert_compiles_without_spills, assert_lowers

PROBLEMS = {
    "ragged, empty slots": Problem(rows=100, inputs=120, outputs=180, bk=64, bn=64, capacity=4, dtype="bfloat16"),
    "tall tiles, parts of blocks": Problem(
        rows=130, inputs=256, outputs=256, bk=128, bn=256, capacity=2, full=True, dtype="bfloat16"
    ),
    "groups": Problem(rows=64, inputs=128, outputs=256, bk=128, bn=64, groups=2, capacity=2, dtype="bfloat16"),
}


@pytest.mark.skipif(compat.gpu_interpreter() is None, reason="this JAX has no interpreter for Mosaic GPU (0.12 has)")
@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_dense_computation_without_races(name):
    x, values, lists, sizes, dy = PROBLEMS[name].draw()
    assert gpu.supports(x, values, lists, sizes) is None
    interpret = compat.gpu_interpreter()
    y = gpu.forward(x, values, lists, sizes, interpret=interpret)
    got = y, *gpu.backward(x, values, lists, sizes, dy, interpret=interpret)
    assert_close(got, expected(PROBLEMS[name]), 1e-2)


@pytest.mark.skipif(compat.gpu_interpreter() is None, reason="this JAX has no interpreter for Mosaic GPU (0.12 has)")
def test_programs_share_the_rows_of_a_block(monkeypatch):
    monkeypatch.setattr(gpu, "SPLIT_ROWS", 64)
    monkeypatch.setattr(gpu, "PROGRAMS", 6)
    problem = Problem(rows=200, inputs=64, outputs=128, bk=64, bn=64, capacity=2, full=True, dtype="bfloat16")
    x, _, lists, sizes, dy = problem.draw()
    got = gpu.dvalues(x, dy, lists, sizes, interpret=compat.gpu_interpreter())
    want = expected(problem)
    assert_close((*want[:2], got), want, 1e-2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "dtypes float32 and float32"),
        ({"bk": 32}, "blocks of 32 x 32; on GPU both sides are multiples of 64"),
    ],
)
def test_refuses_with_the_reason(change, reason):
    shape = programs.Shape(**change)
    x, values, lists = programs.abstract_arguments(shape, jax.ShapeDtypeStruct)
    choice = explain(x, values, lists, shape=(shape.inputs, shape.outputs), implementation="gpu")
    assert choice.name is None
    assert reason in choice.refused["gpu"]


TAKEN = [name for name, shape in programs.SHAPES.items() if shape.dtype != "float32"]


@pytest.mark.parametrize("name", TAKEN)
def test_lowers_for_every_shape(name):
    assert_lowers(programs, programs.SHAPES[name], 3)


@pytest.mark.aot
@pytest.mark.parametrize("name", TAKEN)
def test_compiles_for_h200_without_spills(name):
    assert_compiles_without_spills("block_sparse_matmul", programs.SHAPES[name], {"forward", "dx", "dvalues"})
