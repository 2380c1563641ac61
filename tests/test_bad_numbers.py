"""Numbers that are not finite, tie, overflow or differ in width: what users can count on."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax
from sparsejax.masks.counts import keep_count, share
from sparsejax.topology import scores
from sparsejax.topology.plan import plan
from tests.faults import NAN, off_mask, single, step
from tests.problems import PRESETS, STEPS, exact_grads, exact_params


def test_nan_gradients_between_mask_updates():
    """`apply_if_finite` belongs outside: the step is skipped, nothing moves, and masks do not lose count."""
    params = single()
    tx = optax.apply_if_finite(sparsejax.sparsify(optax.adam(1e-2), sparsejax.rigl(0.75, update_every=2)), 5)
    state = tx.init(params)
    params, state = step(tx, params, state, params)
    for _ in range(3):
        skipped, after = step(tx, params, state, jax.tree.map(lambda p: p * NAN, params))
        chex.assert_trees_all_equal(skipped, params)
        chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    params, state = step(tx, params, state, params)
    assert sparsejax.check(params, state) == (2, 16, 0)


def test_nan_gradients_between_mask_updates_without_a_guard():
    """The optimizer is poisoned, as without sparsify; pruned weights stay exact zeros, and `check` names the leaf."""
    params = single()
    tx = sparsejax.sparsify(optax.adam(1e-2), sparsejax.rigl(0.75, update_every=5))
    state = tx.init(params)
    params, state = step(tx, params, state, jax.tree.map(lambda p: p * NAN, params))
    assert off_mask(params, state.masks) == 0
    with pytest.raises(ValueError, match=r"layer/kernel: 16 values are not finite.*apply_if_finite\(sparsify"):
        sparsejax.check(params, state)


@pytest.mark.parametrize("make", [sparsejax.rigl, functools.partial(sparsejax.granet, end=8)])
def test_nan_gradients_at_a_mask_update(make):
    """NaN never wins: it grows only where nothing else is left, and the count is exact."""
    params = single()
    tx = sparsejax.sparsify(optax.sgd(0.0), make(0.75, update_every=1, drop_fraction=0.5))
    state = tx.init(params)
    for t in range(6):
        bad = jax.random.bernoulli(jax.random.key(t), 0.3, (8, 8))
        before = state.masks["layer"]["kernel"]
        grads = {"layer": {"kernel": jnp.where(bad & ~before, NAN, 1.0)}}
        params, state = step(tx, params, state, grads)
        after = state.masks["layer"]["kernel"]
        assert not bool((after & ~before & bad).any()), "a weight was grown by a gradient of NaN"
    count = int(after.sum())
    assert count == (16 if make is sparsejax.rigl else 19)
    _, state = tx.update(jax.tree.map(lambda p: p * NAN, params), state, params)
    assert int(state.masks["layer"]["kernel"].sum()) == (16 if make is sparsejax.rigl else 17)


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_parameters_that_are_not_finite(value):
    """inf - inf is NaN: additive updates cannot mend it. It is counted and reported, also on dense leaves."""
    params = {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}
    tx = sparsejax.sparsify(optax.sgd(0.0), sparsejax.gradual(0.75, begin=0, end=4, update_every=2))
    state = tx.init(params)
    params, state = step(tx, params, state, params)
    params, state = step(tx, params, state, params)
    params, state = step(tx, params, state, params)
    sparsejax.check(params, state)
    hurt = {**params, "kernel": params["kernel"].at[7, 7].set(value)}
    assert not state.masks["kernel"][7, 7]
    with pytest.raises(ValueError, match=r"^kernel: 1 values are not finite.*restore an earlier checkpoint"):
        sparsejax.check(hurt, state)
    with pytest.raises(ValueError, match=r"^bias: 8 values are not finite"):
        sparsejax.check({**params, "bias": jnp.full(8, value)}, state)
    hurt, state = step(tx, hurt, state, params)
    hurt, state = step(tx, hurt, state, params)
    assert state.leaks == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8"])
def test_ties_in_narrow_dtypes(dtype):
    """A threshold would keep all that tie with it: here the count is exact, and the lower index wins."""
    values = jax.random.normal(jax.random.key(0), (64, 64)) * 4
    kept = sparsejax.select_top(jnp.abs(values).astype(dtype), 410)
    assert int(kept.sum()) == 410
    numbers = np.asarray(jnp.abs(values).astype(dtype).astype(jnp.float32)).ravel()
    assert np.count_nonzero(numbers >= np.sort(numbers)[-410]) > 410  # what a threshold would keep
    expected = np.zeros(4096, bool)
    expected[np.argsort(-numbers, kind="stable")[:410]] = True
    np.testing.assert_array_equal(np.asarray(kept).ravel(), expected)
    if dtype in ("bfloat16", "float16"):
        tx = sparsejax.sparsify(optax.sgd(0.1), sparsejax.magnitude(0.9))
        params = {"kernel": values.astype(dtype)}
        assert int(tx.update(params, tx.init(params), params)[1].masks["kernel"].sum()) == 410


def test_more_than_two_to_the_24_elements():
    """Counts are integers: no float32 product is ever rounded to one."""
    assert keep_count(30_000_001, 0.9) == 3_000_000
    assert share(2**31 - 1, 100_000) == 214_748_365
    assert int(share(2**31 - 1, jnp.int32(333_333))) == 715_827_167
    planned = plan({"kernel": jax.ShapeDtypeStruct((30_001, 1001), jnp.float32)}, sparsejax.magnitude(0.9))
    assert planned.nnz["kernel"] == round(30_001 * 1001 / 10)
    kept = jax.jit(lambda: sparsejax.select_top(jnp.ones(2**24 + 3, jnp.int8), 2**24 + 1))()
    assert int(kept.sum(dtype=jnp.int32)) == 2**24 + 1
    assert not bool(kept[-2:].any())


def test_more_elements_than_32_bits_count():
    with pytest.raises(ValueError, match="4294967296 scores are more than the 2147483647"):
        jax.eval_shape(lambda s: sparsejax.select_top(s, 5), jax.ShapeDtypeStruct((2**16, 2**16), jnp.int8))
    params = {
        "huge": jax.ShapeDtypeStruct((2**16, 2**15), jnp.bfloat16),
        "more": jax.ShapeDtypeStruct((2, 2), jnp.bfloat16),
    }
    tx = sparsejax.sparsify(optax.sgd(0.1), sparsejax.gradual(0.9, begin=0, end=1))
    with pytest.raises(ValueError, match=r"huge: .*2147483648"):
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)


def test_random_numbers_of_leaves_steps_and_seeds():
    """Each leaf, update and seed draws anew, from the leaf's name: never from host state, never twice the same."""
    params = {"a": {"kernel": jnp.ones((16, 16))}, "b": {"kernel": jnp.ones((16, 16))}}
    start = lambda seed, tree: sparsejax.sparsify(optax.sgd(0.1), sparsejax.static(0.5, seed=seed)).init(tree).masks  # noqa: E731
    first = start(0, params)
    chex.assert_trees_all_equal(first, start(0, params))
    assert bool((first["a"]["kernel"] != first["b"]["kernel"]).any())
    assert bool((first["a"]["kernel"] != start(1, params)["a"]["kernel"]).any())
    more = {**params, "aa": {"kernel": jnp.ones((16, 16))}}  # another leaf changes no other's numbers
    draw = lambda tree: scores.random(tree, None, None, jax.random.key(0), None)["b"]["kernel"]  # noqa: E731
    np.testing.assert_array_equal(draw(params), draw(more))
    with jax.enable_x64(True):
        chex.assert_trees_all_equal(start(0, params), first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16"])
def test_parameters_and_gradients_of_different_dtypes(dtype, grad_dtype):
    """-p is never cast to a narrower dtype: a float32 weight minus its bfloat16 rounding is not zero."""
    params = single(dtype=dtype)
    tx = sparsejax.sparsify(optax.sgd(0.1), sparsejax.magnitude(0.75))
    grads = jax.tree.map(lambda p: p.astype(grad_dtype), params)
    updates, state = tx.update(grads, tx.init(params), params)
    kernel = updates["layer"]["kernel"]
    assert jnp.promote_types(kernel.dtype, dtype) == kernel.dtype
    moved = optax.apply_updates(params, updates)
    assert moved["layer"]["kernel"].dtype == dtype
    assert off_mask(moved, state.masks) == 0
    assert int(jnp.count_nonzero(moved["layer"]["kernel"])) == 16


@pytest.mark.parametrize("name", ["rigl", "gradual", "static", "sr_ste", "ac_dc"])
def test_a_schedule_longer_than_the_counter(name):
    """The int32 counter stops at its end instead of turning negative; nothing moves that had come to rest."""
    params = exact_params()
    tx = sparsejax.sparsify(optax.sgd(0.25), PRESETS[name].make(params))
    state = tx.init(params)
    for t in range(STEPS):
        params, state = step(tx, params, state, jax.tree.map(lambda g: g[t], exact_grads()))  # noqa: B023
    rest = state.masks
    state = state._replace(mask_step=jnp.int32(2**31 - 2))
    for t in range(3):
        params, state = step(tx, params, state, jax.tree.map(lambda g: g[t], exact_grads()))  # noqa: B023
        assert state.mask_step == 2**31 - 1
        assert off_mask(params, state.masks) == 0
        if name != "sr_ste":  # chosen anew at every step, for ever
            chex.assert_trees_all_equal(state.masks, rest)
