"""Every path that runs anywhere, against masked dense matrices."""

import bsmm_problems as problems
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings

QUICK = settings(max_examples=8, deadline=None)
CASE = problems.Case((11,), 40, 44, 16, 8, 3, 0.5, 2, 0)


@pytest.mark.parametrize("name", ["reference", "xla"])
@QUICK
@given(case=problems.cases())
def test_bsmm_equals_masked_dense_in_float64(name, case):
    with jax.enable_x64(True):
        problems.assert_equal_to_dense(case, name, jnp.float64, 1e-12)


@pytest.mark.parametrize("name", ["reference", "xla"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
def test_bsmm_low_precision(name, dtype, tolerance):
    with jax.enable_x64(True):
        problems.assert_equal_to_dense(CASE, name, dtype, tolerance)
