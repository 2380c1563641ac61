"""Pruning a dense network: which step prunes how much, and what it keeps, against plain numpy."""

import chex
import jax
import numpy as np
import optax
import pytest

from sparsejax.masks.channel import Channel
from sparsejax.masks.distributions import global_
from sparsejax.topology.magnitude import (
    cubic_sparsity,
    cyclic,
    global_magnitude,
    gradual,
    iterative,
    magnitude,
    random,
    saliency,
)
from sparsejax.transforms.sparsify import sparsify
from tests.problems import exact_grads, exact_params
from tests.topology.runs import kernel, run, top

DENSE = np.ones((16, 16), bool)
ALONE = {"out/kernel": None}  # with a second layer, rounding would look at both


def gradient(t):
    return jax.tree.map(lambda g: g[t], exact_grads())


def test_pruning_once_keeps_the_largest_of_the_step():
    params = exact_params()
    tx = sparsify(optax.sgd(0.25), magnitude(0.9, step=2), rules=ALONE)
    for t, before, _, _, after, new in run(tx, params, exact_grads(), 5):
        if t < 2:
            assert kernel(new.masks).all()
        if t == 2:
            expected = top(np.abs(kernel(before)), 26, DENSE)  # of 256, a tenth is 25.6
            np.testing.assert_array_equal(kernel(new.masks), expected)
            trained = kernel(before) - 0.25 * kernel(gradient(t))
            np.testing.assert_array_equal(kernel(after), np.where(expected, trained, 0))
        if t > 2:
            np.testing.assert_array_equal(kernel(new.masks), expected)


def test_one_threshold_over_all_layers():
    params = exact_params()
    tx = sparsify(optax.sgd(0.25), global_magnitude(0.9))
    *_, (_, before, _, _, _, new) = run(tx, params, exact_grads(), 1)
    scores = np.concatenate([np.abs(before[name]["kernel"]).ravel() for name in ("hidden", "out")])
    expected = top(scores, 38, np.ones(384, bool))
    found = np.concatenate([np.asarray(new.masks[name]["kernel"]).ravel() for name in ("hidden", "out")])
    np.testing.assert_array_equal(found, expected)


def test_saliency_is_weight_times_gradient():
    params = exact_params()
    *_, (_, before, _, _, _, new) = run(sparsify(optax.sgd(0.25), saliency(0.75, step=1)), params, exact_grads(), 2)
    expected = top(np.abs(kernel(before) * kernel(gradient(1))), 64, DENSE)
    np.testing.assert_array_equal(kernel(new.masks), expected)


def test_random_pruning_reads_no_weights():
    one, other = (
        sparsify(optax.sgd(0.25), random(0.75, seed=seed)).update(params, state, params)[1].masks
        for seed, params in ((1, exact_params()), (1, jax.tree.map(lambda p: p + 1, exact_params())))
        for state in [sparsify(optax.sgd(0.25), random(0.75, seed=seed)).init(params)]
    )
    chex.assert_trees_all_equal(one, other)


def test_whole_channels_go_by_their_mean():
    params = exact_params()
    *_, (_, before, _, _, _, new) = run(
        sparsify(optax.sgd(0.25), magnitude(0.75, structure=Channel())), params, exact_grads(), 1
    )
    best = top(np.abs(kernel(before)).mean(0), 4, np.ones(16, bool))
    np.testing.assert_array_equal(kernel(new.masks), np.broadcast_to(best, (16, 16)))


def test_the_cubic_schedule_has_its_closed_form():
    steps = np.array([0, 10, 25, 50, 75, 90, 100, 150])
    values = [float(cubic_sparsity(0.9, begin=0, end=100)(step)) for step in steps]
    np.testing.assert_allclose(values, [0, 0.2439, 0.520312, 0.7875, 0.885938, 0.8991, 0.9, 0.9], atol=1e-6)
    values = [float(cubic_sparsity(0.9, begin=0, end=100, initial=0.5)(step)) for step in steps[[0, 2, 3, 4, 6]]]
    np.testing.assert_allclose(values, [0.5, 0.73125, 0.85, 0.89375, 0.9], atol=1e-6)
    late = cubic_sparsity(0.9, begin=1000, end=1100)
    np.testing.assert_allclose([float(late(step)) for step in (0, 999, 1000, 1050)], [0, 0, 0, 0.7875], atol=1e-6)


@pytest.mark.parametrize(("begin", "end", "every"), [(0, 9, 4), (1, 8, 3), (2, 3, 5), (4, 4, 1), (0, 10, 5)])
def test_gradual_pruning_is_nested_and_hits_the_target_at_its_last_update(begin, end, every):
    params = exact_params()
    tx = sparsify(optax.sgd(0.25, momentum=0.5), gradual(0.9, begin=begin, end=end, update_every=every), rules=ALONE)
    due = sorted({*range(begin, end, every), end})
    for t, before, old, _, _, new in run(tx, params, exact_grads(), 12):
        mask, was = kernel(new.masks), kernel(old.masks)
        if t not in due:
            np.testing.assert_array_equal(mask, was)
            continue
        share = 1 if t >= end else 1 - (1 - (t - begin) / (end - begin)) ** 3
        expected = top(np.abs(kernel(before)), round((1 - round(0.9 * share, 6)) * 256), was)
        np.testing.assert_array_equal(mask, expected)
        assert not (mask & ~was).any()
    assert mask.sum() == 26


def test_pruned_weights_never_return_and_their_moments_are_zero():
    params = exact_params()
    tx = sparsify(optax.sgd(0.25, momentum=0.5), gradual(0.9, begin=0, end=8, update_every=2), rules=ALONE)
    gone = np.zeros((16, 16), bool)
    for *_, after, new in run(tx, params, exact_grads(), 12):
        gone |= ~kernel(new.masks)
        assert not kernel(after)[gone].any()
        assert not kernel(optax.tree.get(new.inner_state, "trace"))[gone].any()
    assert gone.sum() == 230


def test_rounds_prune_a_share_of_what_remains():
    tx = sparsify(optax.sgd(0.25), iterative(rate=0.2, rounds=4, every=2, begin=1, distribution=global_))
    kept = [
        sum(int(m.sum()) for m in jax.tree.leaves(new.masks)) for *_, new in run(tx, exact_params(), exact_grads(), 12)
    ]
    rounds = [round(384 * 0.8**r) for r in range(5)]
    assert kept == [rounds[0], *(r for r in rounds[1:] for _ in "ab"), *[rounds[4]] * 3]


def test_a_cycle_starts_dense_and_returning_weights_start_at_zero():
    tx = sparsify(optax.sgd(0.25, momentum=0.5), cyclic(0.75, period=4, cycles=2, begin=1, update_every=1))
    kept = []
    for t, before, old, updates, _, new in run(tx, exact_params(), exact_grads(), 12):
        kept.append(int(kernel(new.masks).sum()))
        if t == 5:
            returned = ~kernel(old.masks)
            assert not kernel(before)[returned].any()
            np.testing.assert_array_equal(kernel(updates)[returned], -0.25 * kernel(gradient(t))[returned])
    half = round(256 * (1 - 0.75 * (1 - 0.5**3)))
    assert kept == [256, 256, half, 64, 64, 256, half, 64, 64, 64, 64, 64]
    with pytest.raises(ValueError, match="update_every=2 does not divide half a period of 6"):
        cyclic(0.75, period=6, cycles=1, update_every=2)
