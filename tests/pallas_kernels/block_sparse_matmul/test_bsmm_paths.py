"""Every path that runs anywhere, against masked dense matrices; gradients, mapping, probes and refusals."""

import bsmm_problems as problems
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from pallas_kernels.block_sparse_matmul import (
    BlockLists,
    block_lists,
    block_sparse_matmul,
    explain,
    from_dense,
    to_dense,
)

QUICK = settings(max_examples=3, deadline=None)
CASE = problems.Case((11,), 40, 44, 16, 8, 3, 0.5, 2, 0)
NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(not problems.COMPILER, reason="no C++ compiler; its refusal is tested")
)
PATHS = pytest.mark.parametrize("name", ["reference", "xla", NATIVE])
OURS = pytest.mark.parametrize("name", ["xla", NATIVE])


@PATHS
@QUICK
@given(case=problems.cases())
def test_bsmm_equals_masked_dense_in_float64(name, case):
    with jax.enable_x64(True):
        problems.assert_equal_to_dense(case, name, jnp.float64, 1e-12)


@PATHS
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
def test_bsmm_low_precision(name, dtype, tolerance):
    with jax.enable_x64(True):
        problems.assert_equal_to_dense(CASE, name, dtype, tolerance)


@OURS
def test_bsmm_mixed_dtypes_take_the_wider_one(name):
    x, values, lists, _ = CASE.build()
    x, values = jnp.asarray(x, jnp.bfloat16), jnp.asarray(values, jnp.float32)
    loss = lambda x, v: block_sparse_matmul(x, v, lists, shape=CASE.shape, implementation=name).sum()  # noqa: E731
    dx, dvalues = jax.grad(loss, argnums=(0, 1))(x, values)
    assert loss(x, values).dtype == dvalues.dtype == jnp.float32
    assert dx.dtype == jnp.bfloat16


@OURS
def test_bsmm_vmap_over_x_values_and_lists(name):
    x, values, lists, dy = (jnp.asarray(a, jnp.float32) if hasattr(a, "shape") else a for a in CASE.build())
    other = block_lists(np.asarray(lists.rows)[:, ::-1], np.asarray(lists.cols)[:, ::-1], grid=(3, 6))

    def grads(x, values, lists, dy):
        y, pull = jax.vjp(
            lambda x, v: block_sparse_matmul(x, v, lists, shape=CASE.shape, implementation=name), x, values
        )
        return y, *pull(dy)

    lists, other = (jax.tree.map(jnp.asarray, a) for a in (lists, other))
    single = jax.jit(grads)
    xs, vs = jnp.stack([x, 2 * x, -x]), jnp.stack([values, values + 1, 3 * values])
    both = jax.tree.map(lambda a, b: jnp.stack([a, b, a]), lists, other)
    cases = [
        ((0, None, None, None), (xs, values, lists, dy)),
        ((None, 0, None, None), (x, vs, lists, dy)),
        ((0, 0, 0, None), (xs, vs, both, dy)),
    ]
    for axes, arguments in cases if name == "native" else cases[:1]:  # the rules are the same for all paths
        got = jax.jit(jax.vmap(grads, in_axes=axes))(*arguments)
        for i in range(3):
            each = [
                a if axis is None else jax.tree.map(lambda v, i=i: v[i], a)
                for a, axis in zip(arguments, axes, strict=True)
            ]
            for a, b in zip(got, single(*each), strict=True):
                np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-4)


@OURS
def test_bsmm_in_scan_and_remat_without_recompiling(name):
    x, values, lists, dy = CASE.build()
    x, values, dy = (jnp.asarray(a, jnp.float32) for a in (x, values, dy))
    traces = 0

    @jax.jit
    def run(x, values, lists, dy):
        nonlocal traces
        traces += 1

        @jax.checkpoint
        def step(carry, v):
            y = block_sparse_matmul(carry, v, lists, shape=CASE.shape, implementation=name)
            return carry + y[:, :40], (y * dy).sum()

        return jax.grad(lambda values: jax.lax.scan(step, x, values)[1].sum())(values)

    stack = jnp.stack([values, values / 2])
    got = run(x, stack, lists, dy)
    moved = block_lists(lists.cols % 3, lists.rows % 2, grid=(3, 6))
    run(x, stack, moved, dy)
    assert traces == 1

    def dense(stack):
        carry, total = x, 0.0
        for v in stack:
            y = carry @ to_dense(v, lists, CASE.shape)
            carry, total = carry + y[:, :40], total + (y * dy).sum()
        return total

    np.testing.assert_allclose(got, jax.grad(dense)(stack), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("name", "axis"), [("xla", "both"), *(("native", a) for a in ("groups", "batch", "both"))])
def test_bsmm_sharded_over_groups_and_batch(name, axis):
    if name == "native" and not problems.COMPILER:
        pytest.skip("no C++ compiler; its refusal is tested")
    x, values, lists, dy = problems.Case((8,), 40, 8 * 4 * 8, 16, 8, 8, 0.4, 1, 0).build()
    x, values, dy = (jnp.asarray(a, jnp.float32) for a in (x, values, dy))
    lists = jax.tree.map(jnp.asarray, lists)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = "data" if axis in ("batch", "both") else None
    groups = "model" if axis in ("groups", "both") else None
    share = 4 if groups else 1
    P = jax.sharding.PartitionSpec

    def local(x, values, lists):
        return block_sparse_matmul(x, values, lists, shape=(40, 256 // share), implementation=name)

    split = jax.shard_map(local, mesh=mesh, in_specs=(P(rows, None), P(groups), P(groups)), out_specs=P(rows, groups))

    def grads(function, x, values):
        y, pull = jax.vjp(lambda x, v: function(x, v, lists), x, values)
        return y, *pull(dy)

    whole = lambda x, v, lists: block_sparse_matmul(x, v, lists, shape=(40, 256), implementation=name)  # noqa: E731
    want = jax.jit(lambda x, v: grads(whole, x, v))(x, values)
    with jax.set_mesh(mesh):
        got = jax.jit(lambda x, v: grads(split, x, v))(x, values)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@OURS
def test_bsmm_and_probe_on_explicitly_sharded_arrays(name):
    x, values, lists, dy = problems.Case((4, 3), 40, 8 * 4 * 8, 16, 8, 8, 0.4, 1, 0).build()
    x, values, dy = (jnp.asarray(a, jnp.float32) for a in (x, values, dy))
    lists, probe = jax.tree.map(jnp.asarray, lists), jnp.zeros((3, 32))

    @jax.jit
    def grads(x, values, lists, probe, dy):
        def loss(x, values, probe):
            y = block_sparse_matmul(
                x, values, lists, shape=(40, 256), implementation=name, probe=probe, probe_when=probe[0, 0] == 0
            )
            return (y * dy).sum(), y

        found, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, values, probe)
        return y, *found

    want = grads(x, values, lists, probe, dy)
    mesh, P = jax.make_mesh((2, 4), ("data", "model")), jax.sharding.PartitionSpec
    with jax.set_mesh(mesh):
        place = lambda spec, *leaves: jax.device_put(leaves, jax.sharding.NamedSharding(mesh, spec))  # noqa: E731
        (x,), (values, *lists) = place(P("data"), x), place(P("model"), values, *lists)
        (dy,), (probe,) = place(P("data", None, "model"), dy), place(P(), probe)
        got = grads(x, values, BlockLists(*lists), probe, dy)
    assert got[0].sharding.spec == P("data", None, "model")
    assert got[2].sharding.spec[0] == "model"
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("pooling", ["l2", "mean", "max"])
def test_probe_is_the_size_of_every_block_of_the_dense_gradient(pooling):
    with jax.enable_x64(True):
        x, values, lists, dy = CASE.build()
        whole = problems.plain(CASE, x, values, lists, dy)[3]
        want = np.zeros((3, 6))
        for i, j in np.ndindex(3, 6):
            block = np.abs(whole[i * 16 : i * 16 + 16, j * 8 : j * 8 + 8])
            want[i, j] = {"l2": np.sqrt((block**2).sum()), "mean": block.mean(), "max": block.max()}[pooling]

        @jax.jit
        def sizes(when):
            def loss(probe, x):
                y = block_sparse_matmul(
                    x, values, lists, shape=CASE.shape, probe=probe, probe_when=when, probe_pooling=pooling
                )
                return (y * dy).sum()

            return jax.grad(loss, argnums=(0, 1))(jnp.zeros((3, 6), jnp.float32), jnp.asarray(x))

        grown, dx = sizes(True)
        assert grown.dtype == jnp.float32
        np.testing.assert_allclose(grown, want, rtol=1e-6)
        still, same = sizes(False)
        assert not still.any()
        np.testing.assert_array_equal(dx, same)


def test_probe_never_holds_the_dense_gradient():
    inputs, outputs = 512, 768
    lists = block_lists(np.array([[0]]), np.array([[0]]), grid=(16, 24))

    def loss(x, values, probe, when):
        y = block_sparse_matmul(
            x, values, lists, shape=(inputs, outputs), probe=probe, probe_when=when, implementation="xla"
        )
        return (y * y).sum()

    shapes = [(8, inputs), (1, 1, 32, 32), (16, 24)]
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes] + [jax.ShapeDtypeStruct((), jnp.bool_)]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < inputs * outputs * 4 / 2


def test_to_dense_and_from_dense_are_inverse():
    _, values, lists, _ = CASE.build()
    dense = to_dense(jnp.asarray(values, jnp.float32), lists, CASE.shape)
    np.testing.assert_array_equal(from_dense(dense, lists, (16, 8)), values.astype(np.float32))


def test_lists_in_numpy_and_traced_agree_and_own_every_slot():
    _, _, lists, _ = CASE.build()
    traced = jax.jit(lambda r, c: block_lists(r, c, grid=(3, 6)))(lists.rows, lists.cols)
    jax.tree.map(np.testing.assert_array_equal, traced, lists)
    for g in range(3):
        for j in range(2):
            owned = lists.out_slot[g, lists.out_ptr[g, j] : lists.out_ptr[g, j + 1]]
            assert set(owned) == set(np.flatnonzero(lists.cols[g] == j))
            assert (np.diff(lists.rows[g, owned]) > 0).all()
        for i in range(3):
            owned = lists.in_slot[g, lists.in_ptr[g, i] : lists.in_ptr[g, i + 1]]
            assert set(owned) == set(np.flatnonzero(lists.rows[g] == i))


def test_bsmm_refuses_what_does_not_fit():
    x, values, lists, _ = CASE.build()
    call = lambda x=x, values=values, lists=lists, shape=CASE.shape, **options: block_sparse_matmul(  # noqa: E731
        jnp.asarray(x, jnp.float32), jnp.asarray(values, jnp.float32), lists, shape=shape, **options
    )
    with pytest.raises(ValueError, match="last axis must have the 40 inputs"):
        call(x=x[:, :5])
    with pytest.raises(ValueError, match=r"must be \[groups, capacity, bk, bn\]"):
        call(values=values[0])
    with pytest.raises(ValueError, match="in_ptr has shape"):
        call(shape=(80, 44), x=np.zeros((1, 80)))
    with pytest.raises(ValueError, match="3 groups; their number must divide the 7 block columns"):
        call(shape=(40, 56))
    with pytest.raises(ValueError, match="rows has dtype float32"):
        call(lists=lists._replace(rows=lists.rows.astype(np.float32)))
    with pytest.raises(ValueError, match="implementation='fast'; allowed"):
        call(implementation="fast")
    with pytest.raises(ValueError, match=r"probe has shape \(1,\); it must be \(3, 6\)"):
        call(probe=jnp.zeros(1))
    with pytest.raises(ValueError, match="probe_when is given without probe"):
        call(probe_when=True)
    with pytest.raises(ValueError, match="probe_pooling='sum'; allowed"):
        call(probe=jnp.zeros((3, 6)), probe_pooling="sum")
    with pytest.raises(ValueError, match="one of them must be floating"):
        block_sparse_matmul(jnp.ones((1, 40), int), jnp.ones(values.shape, int), lists, shape=CASE.shape)
    with pytest.raises(ValueError, match="2 groups; their number must divide the 3 block columns"):
        block_lists(np.zeros((2, 1), int), np.zeros((2, 1), int), grid=(3, 3))


def test_bsmm_empty_batch():
    _, values, lists, _ = CASE.build()
    y = block_sparse_matmul(jnp.zeros((0, 40)), jnp.asarray(values, jnp.float32), lists, shape=CASE.shape)
    assert y.shape == (0, 44)


def test_explain_takes_abstract_arrays():
    x, values, lists, _ = CASE.build()
    x, values, lists = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.asarray(a).dtype), (x, values, lists))
    assert str(explain(x, values, lists, shape=CASE.shape, implementation="xla")) == "block_sparse_matmul on cpu: xla"
