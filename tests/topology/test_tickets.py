"""Lottery tickets: exact counts, nested masks, bit-exact rewinding, and the threshold against numpy."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.masks.channel import Channel
from sparsejax.masks.distributions import layerwise, uniform
from sparsejax.masks.nm import NM
from sparsejax.masks.paths import named_leaves
from sparsejax.topology.tickets import lottery_ticket, rewind
from tests.nets import linen_net, nnx_net, plain_net


def nnz(masks):
    return sum(int(mask.sum()) for mask in jax.tree.leaves(masks))


def drift(params, masks, number):
    """Stands for training: weights move, in a way that differs from round to round."""
    keys = iter(jax.random.split(jax.random.key(number), 16))
    return jax.tree.map(lambda p: p + jax.random.normal(next(keys), p.shape, p.dtype), params)


@pytest.fixture
def params():
    return {
        "a": {"kernel": jax.random.normal(jax.random.key(0), (40, 30)), "bias": jnp.arange(30.0)},
        "b": {"kernel": jax.random.normal(jax.random.key(1), (30, 25)), "bias": jnp.ones(25)},
    }


@settings(deadline=None, max_examples=6)
@given(rate=st.sampled_from([0.2, 0.5, 0.013]), seed=st.integers(0, 100))
def test_each_round_prunes_exactly_and_masks_are_nested(rate, seed):
    params = {"w": jax.random.normal(jax.random.key(seed), (9, 13)), "v": jnp.ones((7, 3))}
    tickets = list(lottery_ticket(drift, params, rounds=4, rate=rate))
    assert [ticket.round for ticket in tickets] == [0, 1, 2, 3, 4]
    assert nnz(tickets[0].masks) == 138
    for before, after in itertools.pairwise(tickets):
        assert nnz(after.masks) == nnz(before.masks) - math.ceil(round(rate * nnz(before.masks), 9))
        for old, new in zip(jax.tree.leaves(before.masks), jax.tree.leaves(after.masks), strict=True):
            assert not (new & ~old).any()


def test_densities_are_the_powers_of_four_fifths():
    params = {"w": jax.random.normal(jax.random.key(0), (1000, 100))}
    tickets = lottery_ticket(lambda params, masks, round: params, params, rounds=20)
    density = [nnz(ticket.masks) / 1e5 for ticket in tickets]
    for n, expected in {1: 0.8, 2: 0.64, 3: 0.512, 5: 0.3277, 10: 0.1074, 15: 0.0352, 20: 0.0115}.items():
        assert density[n] == pytest.approx(expected, abs=5.5e-5)


def test_one_threshold_over_the_trained_weights_that_remain(params):
    first, second, third = lottery_ticket(drift, params, rounds=2)
    kept = {name: np.ones(mask.shape, bool) for name, mask in named_leaves(first.masks)}
    for before, after in ((first, second), (second, third)):
        trained = dict(named_leaves(before.trained))
        magnitudes = {name: np.abs(np.asarray(trained[name])) for name in kept}
        remaining = np.sort(np.concatenate([magnitudes[name][kept[name]] for name in kept]))
        threshold = remaining[math.ceil(remaining.size / 5)]
        kept = {name: kept[name] & (magnitudes[name] >= threshold) for name in kept}
        for name, mask in named_leaves(after.masks):
            np.testing.assert_array_equal(mask, kept[name])


def test_every_round_starts_from_the_same_bits(params):
    started = []

    def train(params, masks, number):
        started.append(params)
        return drift(params, masks, number)

    tickets = list(lottery_ticket(train, params, rounds=2))
    for start, ticket in zip(started, tickets, strict=True):
        masks = dict(named_leaves(ticket.masks))
        for name, value in named_leaves(start):
            original = np.asarray(dict(named_leaves(params))[name])
            expected = np.where(np.asarray(masks[name]), original, np.float32(0)) if name in masks else original
            assert np.asarray(value).tobytes() == expected.tobytes()


def test_rewind_clears_what_is_not_finite_and_keeps_dtypes():
    params = {"w": jnp.array([[jnp.nan, -jnp.inf, -2.0]], jnp.bfloat16), "b": jnp.array([1.5])}
    rewound = rewind(params, {"w": jnp.array([[False, False, True]]), "b": optax.MaskedNode()})
    assert rewound["w"].dtype == jnp.bfloat16
    assert rewound["w"].astype(jnp.float32).tolist() == [[0.0, 0.0, -2.0]]
    assert not np.signbit(np.asarray(rewound["w"], np.float32))[0, :2].any()
    assert rewound["b"].tolist() == [1.5]
    with pytest.raises(ValueError, match="'other'"):
        rewind(params, {"other": jnp.ones((1, 3), bool)})


def test_rates_of_layers(params):
    tickets = list(lottery_ticket(drift, params, rounds=2, distribution=uniform))
    assert [int(mask.sum()) for mask in jax.tree.leaves(tickets[2].masks)] == [768, 480]
    rates = layerwise({"b/*": 0.1}, default=uniform)
    tickets = list(lottery_ticket(drift, params, rounds=2, distribution=rates))
    assert [int(mask.sum()) for mask in jax.tree.leaves(tickets[2].masks)] == [768, 607]


def test_channels_are_pruned_whole(params):
    *_, last = lottery_ticket(drift, params, rounds=2, rate=0.5, structure=Channel(), distribution=uniform)
    columns = np.asarray(last.masks["a"]["kernel"]).sum(axis=0)
    assert sorted(set(columns.tolist())) == [0, 40]
    assert (columns > 0).sum() == 7  # 30, 15, 7


def test_search_goes_on_from_given_masks(params):
    whole = list(lottery_ticket(lambda p, masks, round: p, params, rounds=3))
    rest = list(lottery_ticket(lambda p, masks, round: p, params, rounds=1, masks=whole[2].masks))
    for mask, expected in zip(jax.tree.leaves(rest[1].masks), jax.tree.leaves(whole[3].masks), strict=True):
        assert (mask == expected).all()


@pytest.mark.parametrize("make_net", [nnx_net, linen_net, plain_net])
def test_flax_and_plain_models(make_net):
    apply, params = make_net()
    x = jax.random.normal(jax.random.key(1), (8, 6))

    def train(params, masks, round):
        grads = jax.grad(lambda params: jnp.mean(apply(params, x) ** 2))(params)
        return rewind(jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), masks)

    *_, ticket = lottery_ticket(train, params, rounds=2)
    assert nnz(ticket.masks) == 45  # 72, 57, 45
    weights = dict(named_leaves(ticket.trained))
    for name, mask in named_leaves(ticket.masks):
        assert not np.asarray(weights[name])[~np.asarray(mask)].any()
    if make_net is nnx_net:
        assert isinstance(ticket.trained, nnx.State)


def test_bad_input(params):
    with pytest.raises(ValueError, match="rounds is 0"):
        lottery_ticket(drift, params, rounds=0)
    for rate in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError):
            lottery_ticket(drift, params, rounds=1, rate=rate)
    with pytest.raises(ValueError, match=r"a/kernel: NM.*fixes the sparsity"):
        lottery_ticket(drift, {"a": {"kernel": jnp.ones((4, 4))}}, rounds=1, structure=NM(2, 4))
    with pytest.raises(ValueError, match=r"a/kernel: a rule's sparsity 0\.5"):
        lottery_ticket(drift, params, rounds=1, rules={"a/kernel": 0.5})
    with pytest.raises(ValueError, match=r"a/kernel: train\(...\) has shape \(2, 2\)"):
        next(lottery_ticket(lambda *_: {"a": {"kernel": jnp.ones((2, 2))}}, params, rounds=1))
    with pytest.raises(ValueError, match="round 0: a/kernel is not finite"):
        next(lottery_ticket(lambda p, *_: jax.tree.map(lambda w: w * jnp.nan, p), params, rounds=1))
    with pytest.raises(ValueError, match="a/kernel: masks has no such leaf"):
        lottery_ticket(drift, params, rounds=1, masks={})
