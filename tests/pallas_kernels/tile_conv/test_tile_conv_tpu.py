"""The TPU kernels for tiles: in the interpreter against the reference, lowered and compiled for every shape."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.experimental.pallas import tpu as pltpu
from tile_conv_problems import Problem, assert_close, computed, expected

from pallas_kernels import aot, compat
from pallas_kernels.tile_conv import programs, tpu

PROBLEMS = {
    "2-D, stride 2": Problem(tile=(4, 16), stride=2, grid=(2, 3), capacity=5, active=4),
    "1-D, window 5, dilation 2, two tiles a step": Problem(
        grid=(9,), tile=(16,), window=5, dilation=2, capacity=7, active=5
    ),
}
MORE_PROBLEMS = {
    "2-D": Problem(),
    "several steps, few neighbours": Problem(grid=(5, 5), capacity=19, active=9),
    "bfloat16": Problem(grid=(2, 2), tile=(2, 16), capacity=3, active=3, dtype="bfloat16"),
    "3-D": Problem(grid=(2, 2, 2), tile=(2, 2, 8), capacity=6, active=5),
    "places of a tile in pieces": Problem(grid=(2, 2), tile=(12, 32), capacity=4, active=3),
    "window 1": Problem(window=1),
    "even window": Problem(window=2),
    "one tile": Problem(active=1),
}


@pytest.fixture(autouse=True)
def few_tiles_of_a_step(monkeypatch):
    """Copies take the interpreter long to compile."""
    monkeypatch.setattr(tpu, "TOGETHER", 2)


def check(problem, interpret):
    x, weights, neighbours, _, _ = problem.draw()
    assert tpu.supports(x, weights, neighbours, problem.geometry) is None
    got = computed(problem, functools.partial(tpu.convolve, interpret=interpret))
    assert_close(got, expected(problem), 3e-6 if problem.dtype == "float32" else 1e-2)


@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_the_reference(name, monkeypatch):
    if len(PROBLEMS[name].grid) > 1:
        monkeypatch.setattr(tpu, "TOGETHER", 1)
    check(PROBLEMS[name], True)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_PROBLEMS)
def test_equals_the_reference_at_more_corners(name):
    check(MORE_PROBLEMS[name], True)


@pytest.mark.slow
def test_no_races():
    check(Problem(grid=(5, 5), capacity=19, active=9), pltpu.InterpretParams(detect_races=True))
    assert not compat.tpu_races_found()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float16"}, "dtype float16"),
        ({"capacity": 0}, "there are no tiles"),
        ({"tile": 4}, "the last side over its stride is a multiple of 16"),
        ({"dims": 3, "tile": 16, "capacity": 9000}, "lists of 9000 tiles do not fit scalar memory"),
        ({"dims": 3, "tile": 64}, "do not fit vector memory"),
    ],
)
def test_refuses_with_the_reason(change, reason):
    shape = programs.Shape(**change)
    x, weights, neighbours, _ = programs.abstract_arguments(shape, jax.ShapeDtypeStruct)
    assert reason in tpu.supports(x, weights, neighbours, shape.geometry)


def test_feature_groups_are_refused():
    shape = programs.Shape()
    x, weights, neighbours, _ = programs.abstract_arguments(shape, jax.ShapeDtypeStruct)
    geometry = shape.geometry.__class__((16, 16), (3, 3), (1, 1), (1, 1), (1, 1), groups=4)
    assert "4 feature groups" in tpu.supports(x, weights, neighbours, geometry)


SHAPES = [
    name if at in (0, 5) else pytest.param(name, marks=pytest.mark.slow) for at, name in enumerate(programs.SHAPES)
]


@pytest.mark.parametrize("name", SHAPES)
def test_lowers_for_every_shape(name):
    for function, arguments in programs.programs(programs.SHAPES[name], "tpu", jax.ShapeDtypeStruct).values():
        with compat.target_context("TPU v5 lite", 1, "tpu"):
            text = export.export(jax.jit(function), platforms=["tpu"])(*arguments).mlir_module()
        assert text.count("tpu_custom_call") >= 3


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("name", programs.SHAPES)
def test_compiles(target, name):
    lacking = aot.missing(target)
    if lacking:
        pytest.skip(lacking)
    (report,) = aot.compile_for(target, "tile_conv", programs.SHAPES[name])
    assert len(report.kernels) == 3
    assert all(kernel.vmem_bytes < 2**26 and kernel.smem_bytes < 2**20 for kernel in report.kernels)


def test_steps_know_what_their_tiles_lack():
    plan = tpu._plan((2, 2, 8, 4), ((-1, 0), (0, 0)), 4, 4, False)
    rows, lost, live = tpu._lists(plan, jnp.array([[9] * 9, [9, 0, 9, 9, 1, 9, 9, 9, 9]]))
    assert (plan.together, plan.steps, plan.shares) == (2, 1, 1)
    assert [number for number, *_ in plan.parts] == [1, 4]
    assert (rows[9 + 1], rows[9 + 4], rows[1]) == (0, 1, 0)
    assert lost[:2].tolist() == [1 << 1 | 1 << 4, 0]
    assert live.tolist() == [2]
