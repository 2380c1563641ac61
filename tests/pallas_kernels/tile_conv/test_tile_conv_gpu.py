"""The GPU kernels for tiles: in the interpreter against the reference without races, lowered and compiled for H200."""

import functools

import jax
import pytest
from tile_conv_problems import Problem, assert_close, computed, expected

from pallas_kernels import compat
from pallas_kernels.tile_conv import gpu, programs
from tests.pallas_kernels.hopper import assert_compiles_without_spills, assert_lowers

PROBLEMS = {
    "2-D": Problem(grid=(2, 2), tile=(2, 3), inputs=40, outputs=64, capacity=4, active=3, dtype="bfloat16"),
}
MORE_PROBLEMS = {
    "1-D, window 2": Problem(grid=(3,), tile=(5,), window=2, capacity=3, active=3, dtype="bfloat16"),
    "stride 2": Problem(grid=(1, 3), tile=(2, 4), stride=2, capacity=3, active=3, dtype="bfloat16"),
}
interpreted = pytest.mark.skipif(
    compat.gpu_interpreter() is None, reason="this JAX has no interpreter for Mosaic GPU (0.12 has)"
)


def check(problem):
    x, weights, neighbours, _, _ = problem.draw()
    assert gpu.supports(x, weights, neighbours, problem.geometry) is None
    got = computed(problem, functools.partial(gpu.convolve, interpret=compat.gpu_interpreter()))
    assert_close(got, expected(problem), 1e-2)


@interpreted
@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_the_reference_without_races(name):
    check(PROBLEMS[name])


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_PROBLEMS)
def test_equals_the_reference_at_more_corners(name):
    check(MORE_PROBLEMS[name])


@interpreted
@pytest.mark.slow
def test_programs_share_the_places_of_a_tap(monkeypatch):
    monkeypatch.setattr(gpu, "SPLIT_STEPS", 1)
    monkeypatch.setattr(gpu, "PROGRAMS", 4)
    check(Problem(grid=(3,), tile=(3,), window=2, capacity=3, active=3, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"dtype": "float32"}, "dtype float32"), ({"capacity": 0}, "there are no tiles")],
)
def test_refuses_with_the_reason(change, reason):
    shape = programs.Shape(**change)
    x, weights, neighbours, _ = programs.abstract_arguments(shape, jax.ShapeDtypeStruct)
    assert reason in gpu.supports(x, weights, neighbours, shape.geometry)


TAKEN = [name for name, shape in programs.SHAPES.items() if shape.dtype != "float32"]


@pytest.mark.parametrize(
    "name", [name if at in (0, 5) else pytest.param(name, marks=pytest.mark.slow) for at, name in enumerate(TAKEN)]
)
def test_lowers_for_every_shape(name):
    assert_lowers(programs, programs.SHAPES[name], 3)


@pytest.mark.aot
@pytest.mark.parametrize("name", TAKEN)
def test_compiles_for_h200_without_spills(name):
    assert_compiles_without_spills("tile_conv", programs.SHAPES[name], {"forward", "dx", "dweights"})
