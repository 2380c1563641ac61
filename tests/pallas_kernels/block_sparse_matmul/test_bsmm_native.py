"""What only the C++ path does. It is not skipped: without a compiler its refusal is what is checked."""

import bsmm_problems as problems
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native as build
from pallas_kernels.block_sparse_matmul import block_lists, block_sparse_matmul, explain, native

needs_compiler = pytest.mark.skipif(not problems.COMPILER, reason="no C++ compiler; the refusal test ran")
CASE = problems.Case((11,), 40, 44, 16, 8, 3, 0.5, 2, 0)


def test_bsmm_choice_without_compiler(monkeypatch):
    monkeypatch.setattr(build, "unavailable", lambda source, targets: "no C++ compiler was found")
    x, values, lists, _ = CASE.build()
    x, values = jnp.asarray(x, jnp.float32), jnp.asarray(values, jnp.float32)
    choice = explain(x, values, lists, shape=CASE.shape)
    assert choice.name == "xla"
    assert "native refused: no C++ compiler was found" in str(choice)
    with pytest.raises(ValueError, match="no C\\+\\+ compiler was found"):
        block_sparse_matmul(x, values, lists, shape=CASE.shape, implementation="native")
    want = block_sparse_matmul(x, values, lists, shape=CASE.shape, implementation="xla")
    np.testing.assert_array_equal(block_sparse_matmul(x, values, lists, shape=CASE.shape), want)


@needs_compiler
@pytest.mark.parametrize(
    "case",
    [
        problems.Case((1500,), 1000, 1030, 64, 48, 2, 0.2, 3, 0),  # several slabs, tasks and panels
        problems.Case((1,), 700, 900, 32, 32, 1, 0.1, 0, 1),  # one row: shares of columns
        problems.Case((25,), 64, 2000, 128, 128, 4, 0.5, 1, 2),
        problems.Case((200,), 9000, 40, 40, 40, 1, 0.3, 1, 3),  # long rows
    ],
)
def test_bsmm_native_sizes(case):
    with jax.enable_x64(True):
        problems.assert_equal_to_dense(case, "native", jnp.float64, 1e-12)
        problems.assert_equal_to_dense(case, "native", jnp.float32, 2e-5)


@needs_compiler
def test_bsmm_native_is_the_choice_and_gives_the_same_bits_for_any_rows_and_slots():
    case = problems.Case((300,), 200, 256, 16, 32, 2, 0.4, 5, 0)
    x, values, lists, dy = case.build()
    x, values, dy = (jnp.asarray(a, jnp.float32) for a in (x, values, dy))
    assert explain(x, values, lists, shape=case.shape).name == "native"
    first = problems.computed(case, x, values, lists, dy, None, jnp.float32)
    for _ in range(5):
        again = problems.computed(case, x, values, lists, dy, None, jnp.float32)
        jax.tree.map(np.testing.assert_array_equal, again, first)
    # Rows do not know of each other, and slots only of their places.
    few = problems.computed(case, x[:7], values, lists, dy[:7], None, jnp.float32)
    np.testing.assert_array_equal(few[0], first[0][:7])
    np.testing.assert_array_equal(few[1], first[1][:7])
    turned = block_lists(lists.rows[:, ::-1], lists.cols[:, ::-1], grid=(13, 8))
    moved = problems.computed(case, x, values[:, ::-1], turned, dy, None, jnp.float32)
    np.testing.assert_array_equal(moved[0], first[0])
    np.testing.assert_array_equal(moved[2][:, ::-1], first[2])


@needs_compiler
def test_bsmm_native_ignores_what_lies_in_empty_slots():
    x, values, lists, _ = CASE.build()
    empty = (lists.rows == 3)[..., None, None]
    assert empty.any()
    x, values = jnp.asarray(x, jnp.float32), jnp.asarray(values, jnp.float32)
    for name in ("native", "xla"):
        want = block_sparse_matmul(x, values, lists, shape=CASE.shape, implementation=name)
        spoiled = jnp.where(empty, jnp.nan, values)
        got = block_sparse_matmul(x, spoiled, lists, shape=CASE.shape, implementation=name)
        np.testing.assert_array_equal(got, want)


@needs_compiler
def test_bsmm_targets_are_the_symbols_of_the_source():
    text = native.SOURCE.read_text()
    assert all(f"XLA_FFI_DEFINE_HANDLER_SYMBOL({name}," in text for name in native.TARGETS)
