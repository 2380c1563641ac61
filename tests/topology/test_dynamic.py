"""Masks that drop and grow: every move of RigL, SET, GraNet and AC/DC against the same move in plain numpy."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.masks.distributions import global_, uniform
from sparsejax.masks.unstructured import Unstructured
from sparsejax.topology import scores
from sparsejax.topology.algorithm import UpdateSteps
from sparsejax.topology.dynamic import ac_dc, dynamic, from_masks, granet, rigl, set_, static
from sparsejax.topology.engine import move_masks, plan_leaves, start_masks
from sparsejax.topology.magnitude import cyclic, gradual
from sparsejax.transforms.sparsify import sparsify
from tests.problems import exact_grads, exact_params, mlp_params
from tests.topology.runs import kernel, run, top

SHAPE = 8, 6


def swap(mask, drop, grow, fraction):
    """Keeps all but floor(fraction * nnz) by `drop`, then fills up by `grow` among all that is not kept."""
    nnz = int(mask.sum())
    kept = top(drop, nnz - math.floor(round(fraction * 1e6) * nnz / 1e6), mask)
    return kept | top(grow, nnz - int(kept.sum()), ~kept), kept


def numbers(dtype, elements):
    return st.lists(elements, min_size=48, max_size=48).map(lambda xs: jnp.asarray(xs, dtype).reshape(SHAPE))


few = st.sampled_from([-3.0, -1.0, 0.0, 0.5, 1.0, 2.0])
with_nan = st.sampled_from([-3.0, 0.0, 1.0, float("nan"), float("inf"), float("-inf")])


@settings(deadline=None, max_examples=40)
@given(
    weights=numbers(jnp.float32, few),
    grads=st.one_of(numbers(jnp.bfloat16, st.floats(-4, 4, width=16)), numbers(jnp.float32, with_nan)),
    kept=st.integers(1, 48),
    fraction=st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0]),
    seed=st.integers(0, 5),
)
def test_a_move_of_rigl_is_the_papers(weights, grads, kept, fraction, seed):
    mask = np.random.default_rng(seed).permutation(48).reshape(SHAPE) < kept
    weights = jnp.where(mask, weights, 0)
    algorithm = rigl(0.5, drop_fraction=lambda step: jnp.float32(fraction), masks={"w": jnp.asarray(mask)})
    params = {"w": weights}
    moved = move_masks(algorithm, plan_leaves(params, algorithm), params, {"w": grads}, algorithm.masks, None, 1)["w"]
    expected, stayed = swap(mask, np.abs(np.asarray(weights)), np.abs(np.asarray(grads, np.float32)), fraction)
    np.testing.assert_array_equal(moved, expected)
    assert int(moved.sum()) == kept
    assert int((mask & ~np.asarray(moved)).sum()) <= math.floor(fraction * kept + 1e-9)
    assert bool(np.asarray(moved)[stayed].all())


def gradient(t):
    return jax.tree.map(lambda g: g[t], exact_grads())


def momentum(state):
    return kernel(optax.tree.get(state.inner_state, "trace"))


def test_the_swap_of_rigl_takes_the_place_of_the_step():
    params = exact_params()
    tx = sparsify(optax.sgd(0.25, momentum=0.5), rigl(0.75, update_every=3, distribution=uniform))
    seen = set()
    for t, before, old, updates, after, new in run(tx, params, exact_grads(), 10):
        mask, was = kernel(new.masks), kernel(old.masks)
        due = t in (3, 6, 9)
        seen.add(due)
        if not due:
            np.testing.assert_array_equal(mask, was)
            continue
        expected, kept = swap(was, np.abs(kernel(before)), np.abs(kernel(gradient(t))), 0.3)
        np.testing.assert_array_equal(mask, expected)
        assert not kernel(updates)[mask].any()
        assert all(not np.asarray(u).any() for u in (updates["hidden"]["bias"], updates["out"]["bias"]))
        np.testing.assert_array_equal(kernel(after)[mask & was], kernel(before)[mask & was])
        grown = mask & ~was
        assert grown.any()
        assert not kernel(after)[grown].any()
        assert not momentum(new)[~(mask & was)].any()
        # A dropped weight that returned at once kept value and moments: they only decayed, as those of all kept ones.
        returned = mask & was & ~kept
        assert returned.any()
        np.testing.assert_array_equal(momentum(new)[mask & was], 0.5 * momentum(old)[mask & was])
    assert seen == {True, False}


def test_nothing_moves_when_nothing_is_dropped():
    params = exact_params()
    tx = sparsify(optax.sgd(0.25, momentum=0.5), rigl(0.75, update_every=1, drop_fraction=0.0))
    first = tx.init(params).masks
    for *_, new in run(tx, params, exact_grads(), 4):
        chex.assert_trees_all_equal(new.masks, first)


def test_every_kept_connection_survives_huge_and_equal_scores():
    """The kept are never mixed with what grows, whatever the scale of gradients."""
    weights = jnp.arange(1.0, 49.0).reshape(SHAPE).astype(jnp.bfloat16) * 1e-20
    mask = jnp.arange(48).reshape(SHAPE) >= 24
    for huge in (jnp.full(SHAPE, 3e38, jnp.bfloat16), jnp.full(SHAPE, jnp.inf), jnp.zeros(SHAPE)):
        algorithm = rigl(0.5, masks={"w": mask}, drop_fraction=lambda step: jnp.float32(0.25))
        params = {"w": jnp.where(mask, weights, 0)}
        plan = plan_leaves(params, algorithm)
        moved = np.asarray(move_masks(algorithm, plan, params, {"w": huge}, algorithm.masks, None, 1)["w"]).ravel()
        assert moved.sum() == 24
        assert moved[30:].all()  # the 18 largest
        assert moved[:6].all()  # grown: the first of what is not kept
        assert not moved[6:30].any()


def test_the_drop_fraction_of_rigl_is_half_a_cosine():
    fraction = rigl(0.9, stop=75_000).drop_fraction
    values = [float(fraction(step)) for step in (0, 18_750, 37_500, 56_250, 75_000)]
    np.testing.assert_allclose(values, [0.3, 0.256066, 0.15, 0.043934, 0], atol=1e-6)


@pytest.mark.parametrize(("stop", "last"), [(1000, 900), (950, 900), (901, 900), (900, 800), (101, 100)])
def test_masks_move_before_stop_only(stop, last):
    steps = rigl(0.9, update_every=100, stop=stop).steps
    assert [t for t in range(1200) if steps.due(t)] == list(range(100, last + 1, 100))


def test_set_drops_the_smallest_and_grows_anywhere():
    params = exact_params()
    tx = sparsify(optax.sgd(0.25), set_(0.75, update_every=1, drop_fraction=0.25, distribution=uniform))
    often = np.zeros((16, 16))
    for t, before, old, _, after, new in run(tx, params, exact_grads(), 10):
        mask, was = kernel(new.masks), kernel(old.masks)
        if t == 0:
            np.testing.assert_array_equal(mask, was)
            continue
        kept = top(np.abs(kernel(before)), 48, was)
        assert mask[kept].all()
        assert mask.sum() == 64
        # The optimizer's step is taken too: grown weights move from zero at once.
        np.testing.assert_array_equal(
            kernel(after)[mask],
            (kernel(before) - 0.25 * kernel(gradient(t)))[mask],
        )
        often += mask & ~kept
    assert (often.sum(), often.max() < 9) == (9 * 16, True)
    assert np.count_nonzero(often) > 90  # of 144 growths; the same places would be 16


def test_random_growth_differs_between_steps_seeds_and_leaves():
    params = {name: jnp.ones((32, 32)) for name in ("a", "b")}
    masks = {name: jnp.zeros((32, 32), bool) for name in ("a", "b")}
    draw = lambda seed, step: scores.random(params, None, masks, jax.random.fold_in(jax.random.key(seed), step), None)  # noqa: E731
    assert bool((draw(0, 0)["a"] == draw(0, 0)["a"]).all())
    for other in (draw(0, 0)["b"], draw(0, 1)["a"], draw(1, 0)["a"]):
        assert float((draw(0, 0)["a"] == other).mean()) < 0.01


def test_static_masks_are_random_and_the_seed_decides():
    params = mlp_params()
    start = lambda **options: kernel(sparsify(optax.sgd(0.1), static(0.75, **options)).init(params).masks)  # noqa: E731
    np.testing.assert_array_equal(start(seed=3), start(seed=3))
    assert (start(seed=3) != start(seed=4)).any()
    largest = start(score=scores.magnitude, distribution=uniform)
    np.testing.assert_array_equal(largest, top(np.abs(kernel(params)), 64, np.ones((16, 16), bool)))


def test_given_masks_stay_and_may_cover_any_leaf():
    params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4), "third": jnp.ones((2, 2, 2))}
    masks = {
        "kernel": jnp.eye(4, dtype=bool),
        "bias": jnp.array([True, False, True, False]),
        "third": optax.MaskedNode(),
    }
    tx = sparsify(optax.adam(0.1), from_masks(masks))
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(state.masks, masks)
    np.testing.assert_array_equal(params["bias"] != 0, masks["bias"])
    np.testing.assert_array_equal(params["kernel"] != 0, masks["kernel"])


def test_starting_masks_of_rigl_keep_their_own_counts():
    params = exact_params()
    masks = {
        "hidden": {"kernel": jnp.arange(256).reshape(16, 16) < 20, "bias": None},
        "out": {"kernel": jnp.arange(128).reshape(16, 8) < 100, "bias": None},
    }
    tx = sparsify(optax.sgd(0.25), rigl(0.9, update_every=1, masks=masks))
    for t, *_, new in run(tx, params, exact_grads(), 4):
        assert int(new.masks["hidden"]["kernel"].sum()) == 20, t
        assert int(new.masks["out"]["kernel"].sum()) == 100


def test_granet_keeps_the_pruned_count_through_every_swap():
    """Each update is the global cubic pruning, then a swap in every layer of what pruning left."""
    params, grads = exact_params(), exact_grads()
    algorithm = granet(0.75, end=8, stop=10, update_every=2, drop_fraction=0.5)
    tx = sparsify(optax.sgd(0.25), algorithm)
    for t, before, old, *_, new in run(tx, params, grads, 11):
        if t % 2:
            chex.assert_trees_all_equal(new.masks, old.masks)
            continue
        names = "hidden", "out"
        weights = [np.abs(np.asarray(before[name]["kernel"])) for name in names]
        gradients = [np.abs(np.asarray(grads[name]["kernel"][t])) for name in names]
        masks = [np.asarray(old.masks[name]["kernel"]) for name in names]
        sparsity = 0.75 - 0.75 * (1 - min(t / 8, 1)) ** 3
        total = round((1 - round(sparsity, 6)) * 384)
        flat = top(np.concatenate([w.ravel() for w in weights]), total, np.concatenate([m.ravel() for m in masks]))
        pruned = [flat[:256].reshape(16, 16), flat[256:].reshape(16, 8)]
        fraction = 0.5 * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(t, 10) / 10)))
        for name, mask, w, g in zip(names, pruned, weights, gradients, strict=True):
            expected, _ = swap(mask, w, g, fraction)
            np.testing.assert_array_equal(new.masks[name]["kernel"], expected)
    assert sum(int(m.sum()) for m in jax.tree.leaves(new.masks)) == 96


def test_granet_without_swaps_is_global_gradual_pruning():
    params, grads = exact_params(), exact_grads()
    plain = sparsify(optax.sgd(0.25), gradual(0.75, begin=0, end=8, update_every=2, distribution=global_))
    swapless = sparsify(optax.sgd(0.25), granet(0.75, end=8, update_every=2, drop_fraction=0.0))
    for one, other in zip(run(plain, params, grads, 10), run(swapless, params, grads, 10), strict=True):
        chex.assert_trees_all_equal(one[-1].masks, other[-1].masks)
        chex.assert_trees_all_equal(one[-2], other[-2])


def test_the_drop_fraction_of_granet_ends_at_a_hundredth():
    fraction = granet(0.9, end=600, stop=1000).drop_fraction
    values = [float(fraction(step)) for step in (0, 250, 500, 750, 1000)]
    np.testing.assert_allclose(values, [0.5, 0.427509, 0.2525, 0.077491, 0.005], atol=1e-6)


def test_granet_starts_dense_or_sparse():
    params = exact_params()
    dense = sparsify(optax.sgd(0.25), granet(0.75, end=8)).init(params)
    assert all(bool(mask.all()) for mask in jax.tree.leaves(dense.masks))
    sparse = sparsify(optax.sgd(0.25), granet(0.75, end=8, initial=0.5)).init(params)
    assert [int(mask.sum()) for mask in jax.tree.leaves(sparse.masks)] == [110, 82]  # Erdős–Rényi, 192 in all


def test_a_weight_that_grows_at_once_grows_from_zero():
    """Also where training did not start with `mask_params`: weights off the first masks count as zero."""
    params = exact_params()
    tx = sparsify(optax.sgd(0.25), granet(0.75, end=8, update_every=2, initial=0.5))
    for t, _, old, _, after, new in run(tx, params, jax.tree.map(jnp.zeros_like, exact_grads()), 6):
        grown = kernel(new.masks) & ~kernel(old.masks)
        assert not kernel(after)[grown].any(), t


def test_phases_of_ac_dc():
    params, grads = exact_params(), exact_grads()
    tx = sparsify(optax.sgd(0.25, momentum=0.5), ac_dc(0.75, begin=2, phase=2, end=9))
    kept = []
    for t, before, old, updates, _, new in run(tx, params, grads, 12):
        kept.append(sum(int(mask.sum()) for mask in jax.tree.leaves(new.masks)))
        if t in (3, 7, 10, 11):  # within a compressed phase
            chex.assert_trees_all_equal(new.masks, old.masks)
        if t in (4, 8):  # decompression: zeros stay zeros until they are trained, momentum starts anew everywhere
            returned = ~kernel(old.masks)
            assert not kernel(before)[returned].any()
            step = jax.tree.map(lambda g: -0.25 * g, gradient(t))
            chex.assert_trees_all_equal(updates, step)
    assert kept == [384, 384, 96, 96, 384, 384, 96, 96, 384, 96, 96, 96]


def test_a_user_builds_a_method_from_pieces():
    """Ten lines: grow by the saliency, drop at random, keep a running mean of gradients for it."""
    params, grads = exact_params(), exact_grads()
    algorithm = dynamic(0.75, drop=scores.random, grow=scores.saliency, update_every=2, structure=Unstructured())
    states = [new for *_, new in run(sparsify(optax.sgd(0.25), algorithm), params, grads, 5)]
    assert all(int(s.masks["hidden"]["kernel"].sum()) == 55 for s in states)
    assert algorithm.steps == UpdateSteps(2, 2, None)


def test_first_masks_are_those_of_a_jitted_start():
    """Whether the sparsity is a number, an array or a schedule, and whether init is jitted."""
    params = mlp_params()
    for sparsity in (1 / 3, jnp.float32(1 / 3), lambda step: jnp.float32(0.123456)):
        for distribution in (uniform, None):
            options = {} if distribution is None else {"distribution": distribution}
            algorithm = rigl(sparsity, **options)
            start = functools.partial(start_masks, algorithm, plan_leaves(params, algorithm))
            chex.assert_trees_all_equal(start(params), jax.jit(start)(params))


@pytest.mark.parametrize("jit", [False, True])
def test_a_leaf_with_its_own_sparsity_follows_the_schedule_in_proportion(jit):
    """Dense where the others are dense, at its own sparsity where they are at theirs."""
    params = exact_params()
    rules = {"out/kernel": 0.5}
    kept = {}
    for name, algorithm in {
        "ac_dc": ac_dc(0.75, begin=1, phase=1, end=3),
        "gradual": gradual(0.75, begin=0, end=4, update_every=2),
        "cyclic": cyclic(0.75, period=4, cycles=1, update_every=1),
        "rigl": rigl(0.75, update_every=2, stop=4),
    }.items():
        tx = sparsify(optax.sgd(0.25), algorithm, rules=rules)
        update = jax.jit(tx.update) if jit else tx.update
        tx = optax.GradientTransformationExtraArgs(tx.init, update)
        kept[name] = [int(new.masks["out"]["kernel"].sum()) for *_, new in run(tx, params, exact_grads(), 5)]
    assert kept == {
        "ac_dc": [128, 64, 128, 64, 64],
        "gradual": [128, 128, 72, 72, 64],
        "cyclic": [128, 72, 64, 64, 64],
        "rigl": [64] * 5,
    }
