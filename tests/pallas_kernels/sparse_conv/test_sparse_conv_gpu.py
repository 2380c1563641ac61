"""The GPU kernels for rows: in the interpreter against the reference without races, lowered and compiled for H200."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.sparse_conv import KernelMap, gpu, programs, reference
from tests.pallas_kernels.hopper import assert_compiles_without_spills, assert_lowers


def drawn(rows_in, rows_out, taps, inputs, outputs, *, empty=None):
    """x, weights, a map of random neighbours (none for the tap `empty`), and dy, in bfloat16."""
    rng = np.random.default_rng(2)
    fwd = np.full((taps, rows_out), rows_in, np.int32)
    bwd = np.full((taps, rows_in), rows_out, np.int32)
    for tap in range(taps):
        if tap != empty:
            pairs = min(rows_in, rows_out) // 2
            sources, targets = (np.sort(rng.permutation(n)[:pairs]) for n in (rows_in, rows_out))
            fwd[tap, targets], bwd[tap, sources] = sources, targets
    shapes = (rows_in, inputs), (taps, inputs, outputs), (rows_out, outputs)
    x, weights, dy = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    tables = jnp.asarray(fwd), jnp.asarray(bwd)
    return x, weights, KernelMap(*tables, jnp.int32(rows_in), jnp.int32(rows_out)), dy


interpreted = pytest.mark.skipif(
    compat.gpu_interpreter() is None, reason="this JAX has no interpreter for Mosaic GPU (0.12 has)"
)


def check(x, weights, kernel_map, dy, *, transposed=True):
    """Forward, the gradient of weights, and that of x: the forward pass of the transposed map."""
    assert gpu.supports(x, weights, kernel_map, 1) is None
    wide = [a.astype(jnp.float32) for a in (x, weights, dy)]
    y, pull = jax.vjp(lambda x, w: reference.forward(x, w, kernel_map, 1), *wide[:2])
    dx, dw = pull(wide[2])
    options = {"interpret": compat.gpu_interpreter()}
    found = [
        (gpu.forward(x, weights, kernel_map, 1, **options), y),
        (gpu.weight_gradient(x, dy, kernel_map, weights.shape, 1, **options), dw),
    ]
    if transposed:
        found.append((gpu.forward(dy, weights.swapaxes(1, 2), kernel_map.T, 1, **options), dx))
    for a, b in found:
        assert a.shape == b.shape
        assert a.dtype == jnp.float32
        assert np.abs(a - b).max() <= 1e-2 * np.abs(b).max()


@interpreted
def test_equals_the_reference_without_races():
    check(*drawn(20, 17, 2, 10, 40, empty=1), transposed=False)


@interpreted
@pytest.mark.slow
def test_several_tiles_and_chunks():
    check(*drawn(70, 130, 3, 70, 130))


@interpreted
@pytest.mark.slow
def test_programs_share_the_pairs_of_a_tap(monkeypatch):
    monkeypatch.setattr(gpu, "SPLIT_PAIRS", 64)
    check(*drawn(300, 300, 1, 64, 64))


def test_refuses_with_the_reason():
    x, weights, kernel_map, _ = drawn(20, 17, 2, 10, 70)
    assert "dtypes float32" in gpu.supports(x.astype(jnp.float32), weights, kernel_map, 1)
    assert "5 feature groups" in gpu.supports(x, weights, kernel_map, 5)


@pytest.mark.parametrize(
    "name", [name if at == 2 else pytest.param(name, marks=pytest.mark.slow) for at, name in enumerate(programs.SHAPES)]
)
def test_lowers_for_every_shape(name):
    assert_lowers(programs, programs.SHAPES[name], 3)


@pytest.mark.aot
@pytest.mark.parametrize("name", programs.SHAPES)
def test_compiles_for_h200_without_spills(name):
    assert_compiles_without_spills("sparse_conv", programs.SHAPES[name], {"forward", "dweights"})
