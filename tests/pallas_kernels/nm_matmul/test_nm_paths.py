"""Every path that runs anywhere, against dense matrices; gradients, mapping, packing and refusals."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import nm_kernel_problems as problems
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import native as build
from pallas_kernels.nm_matmul import explain, from_dense, native, nm_matmul, pack_positions, to_dense, unpack_positions

COMPILER = any(map(shutil.which, ("g++", "clang++", "c++")))
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler; the refusal test ran")
PATHS = pytest.mark.parametrize("name", ["reference", "xla", pytest.param("native", marks=needs_compiler)])
OURS = pytest.mark.parametrize("name", ["xla", pytest.param("native", marks=needs_compiler)])
SHARED = problems.Problem(rows=37, inputs=96, outputs=64, share=32)


def computed(problem, name, dtype):
    """y, dx and dvalues of a path, under jit."""
    x, values, positions, dy = problem.draw()
    x, values, dy = (a.astype(dtype) for a in (x, values, dy))
    pattern = {"n": problem.n, "m": problem.m, "share": problem.share}

    @jax.jit
    def run(x, values, positions, dy):
        y, pull = jax.vjp(lambda x, v: nm_matmul(x, v, positions, **pattern, implementation=name), x, values)
        return y, *pull(dy)

    return run(x, values, positions, dy)


@PATHS
@settings(max_examples=4, deadline=None)
@given(
    rows=st.sampled_from([1, 13, 33, 70]),
    groups=st.integers(1, 9),
    pattern=st.sampled_from([(2, 4), (1, 4), (3, 7), (1, 1), (5, 16)]),
    columns=st.sampled_from([(1, 1), (3, 1), (2, 16), (3, 32), (1, 48), (2, 5)]),
)
def test_nm_equals_dense_in_float64(name, rows, groups, pattern, columns):
    (n, m), (count, share) = pattern, columns
    if name == "native":
        share = 16 * share if share % 16 else share
    with jax.enable_x64(True):
        problem = problems.Problem(rows, groups * m, count * share, n, m, share, "float64")
        got = computed(problem, name, jnp.float64)
        problems.assert_close(got, problems.expected(problem), 1e-12)


@PATHS
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_nm_low_precision(name, dtype, tolerance):
    problem = dataclasses.replace(SHARED, dtype=dtype)
    got = computed(problem, name, jnp.dtype(dtype))
    assert all(a.dtype == dtype for a in got)
    problems.assert_close(got, problems.expected(problem), tolerance)


@needs_compiler
def test_nm_native_sizes_and_bits():
    for problem in (
        problems.Problem(1100, 520, 192, 2, 4, 64),  # several tasks and slabs, lines that end within a cache line
        problems.Problem(3, 128, 640, 1, 4, 80),  # few rows: shares of columns
    ):
        first = computed(problem, "native", jnp.float32)
        problems.assert_close(first, problems.expected(problem), 5e-6)
        jax.tree.map(np.testing.assert_array_equal, computed(problem, None, jnp.float32), first)


@OURS
def test_nm_vmap_over_everything_and_scan(name):
    x, values, positions, dy = SHARED.draw()

    def grads(x, values, positions):
        call = lambda x, v: nm_matmul(x, v, positions, n=2, m=4, share=32, implementation=name)  # noqa: E731
        y, pull = jax.vjp(call, x, values)
        return y, *pull(dy)

    stack = [jnp.stack([a, a[::-1]]) for a in (x, values)] + [jnp.stack([positions, positions[:, ::-1]])]
    want = [jax.jit(grads)(x, values, positions), jax.jit(grads)(*(a[1] for a in stack))]
    got = jax.jit(jax.vmap(grads))(*stack)
    looped = jax.jit(lambda s: jax.lax.scan(lambda _, a: (None, grads(*a)), None, s)[1])(tuple(stack))
    only_x = jax.jit(jax.vmap(grads, in_axes=(0, None, None)))(jnp.stack([x, 2 * x]), values, positions)
    for i in range(3):
        for turn in range(2):
            np.testing.assert_allclose(got[i][turn], want[turn][i], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(looped[i][turn], want[turn][i], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(only_x[i][0], want[0][i], rtol=1e-5, atol=1e-5)


@OURS
def test_nm_sharded_over_columns_and_rows(name):
    x, values, positions, dy = problems.Problem(rows=8, inputs=64, outputs=128, share=32).draw()
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    P = jax.sharding.PartitionSpec

    def call(x, values, positions):
        return nm_matmul(x, values, positions, n=2, m=4, share=32, implementation=name)

    split = jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(P("data"), P(None, "model"), P(None, "model")),
        out_specs=P("data", "model"),
    )

    def grads(function):
        y, pull = jax.vjp(lambda x, v: function(x, v, positions), x, values)
        return y, *pull(dy)

    want = jax.jit(lambda: grads(call))()
    for a, b in zip(jax.jit(lambda: grads(split))(), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    explicit = jax.make_mesh((2, 4), ("data", "model"))
    with jax.set_mesh(explicit):
        specs = (P("data"), P(None, "model"), P(None, "model"), P("data", "model"))
        placed = [
            jax.device_put(a, jax.sharding.NamedSharding(explicit, spec))
            for a, spec in zip((x, values, positions, dy), specs, strict=True)
        ]

        @jax.jit
        def run(x, values, positions, dy):
            y, pull = jax.vjp(lambda x, v: call(x, v, positions), x, values)
            return y, *pull(dy)

        got = run(*placed)
    assert got[0].sharding.spec == P("data", "model")
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("m", "bits"), [(2, 1), (4, 2), (7, 4), (16, 4), (32, 8), (256, 8)])
def test_positions_packed_and_unpacked(m, bits):
    positions = np.random.default_rng(0).integers(0, m, (13, 5)).astype(np.uint8)
    packed = pack_positions(positions, m)
    assert packed.shape == (-(-13 * bits // 8), 5)
    for some in (packed, jnp.asarray(packed)):
        np.testing.assert_array_equal(unpack_positions(some, m, 13), positions)
    np.testing.assert_array_equal(pack_positions(jnp.asarray(positions), m), packed)


def test_nm_to_dense_and_from_dense_are_inverse():
    _, values, positions, _ = SHARED.draw()
    dense = to_dense(values, positions, n=2, m=4, share=32)
    np.testing.assert_array_equal(from_dense(dense, positions, n=2, m=4, share=32), values)
    assert ((np.asarray(dense).reshape(-1, 4, 64) != 0).sum(1) == 2).all()


def test_nm_choice_and_refusals(monkeypatch):
    x, values, positions, _ = SHARED.draw()
    call = lambda x=x, values=values, positions=positions, n=2, m=4, share=32, **options: nm_matmul(  # noqa: E731
        x, values, positions, n=n, m=m, share=share, **options
    )
    with pytest.raises(ValueError, match="need 96 inputs"):
        call(x=x[:, :5])
    with pytest.raises(ValueError, match="1 <= n <= m <= 256"):
        call(n=5)
    with pytest.raises(ValueError, match=r"must be a multiple of share=48"):
        call(share=48)
    with pytest.raises(ValueError, match=r"positions has shape \(48, 1\)"):
        call(positions=positions[:, :1])
    with pytest.raises(ValueError, match="positions has dtype float32"):
        call(positions=positions.astype(jnp.float32))
    with pytest.raises(ValueError, match="implementation='fast'; allowed"):
        call(implementation="fast")
    with pytest.raises(ValueError, match="share=1; with fewer, the dense product"):
        call(positions=jnp.repeat(positions, 32, axis=1), share=1, implementation="native")
    monkeypatch.setattr(build, "unavailable", lambda source, targets: "no C++ compiler was found")
    choice = explain(x, values, positions, n=2, m=4, share=32)
    assert str(choice) == "nm_matmul on cpu: xla\n  native refused: no C++ compiler was found"
    np.testing.assert_array_equal(call(), call(implementation="xla"))
    assert call(x=x[:0]).shape == (0, 64)


@needs_compiler
def test_nm_targets_are_the_symbols_of_the_source():
    text = native.SOURCE.read_text()
    assert all(f"XLA_FFI_DEFINE_HANDLER_SYMBOL({name}," in text for name in native.TARGETS)
