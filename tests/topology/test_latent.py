"""Methods that keep dense weights under the mask, step by step against plain numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax.masks.distributions import erdos_renyi_kernel, global_
from sparsejax.topology.latent import fade, mdgf, nm, sdgf, sr_ste, straight_through, top_kast
from sparsejax.topology.movement import movement
from sparsejax.transforms.access import finalize, masks_of
from sparsejax.transforms.sparsify import sparsify
from tests.problems import exact_grads, exact_params
from tests.topology.runs import kernel, run, top

DENSE = np.ones((16, 16), bool)
ALONE = {"out/kernel": None}  # with a second layer, rounding would look at both


def gradient(t):
    return kernel(jax.tree.map(lambda g: g[t], exact_grads()))


def top_nm(weights, n, m):
    """The n largest of every m consecutive rows of a column, ties to the lower row."""
    mask = np.zeros_like(weights, bool)
    for column in range(weights.shape[1]):
        for first in range(0, weights.shape[0], m):
            group = np.abs(weights[first : first + m, column])
            mask[first + np.argsort(-group, kind="stable")[:n], column] = True
    return mask


def latent_run(algorithm, steps=8, learning_rate=0.25):
    """As `run`, with the state's dense weights in place of the state: `(t, view, dense, masks, view, dense, masks)`."""
    tx = sparsify(optax.sgd(learning_rate), algorithm, rules=ALONE)
    for t, before, old, _, after, new in run(tx, exact_params(), exact_grads(), steps):
        yield t, kernel(before), kernel(old.latent), old, kernel(after), kernel(new.latent), new


def test_straight_through_trains_all_weights_and_shows_the_largest():
    for t, _, dense, _, view, trained, new in latent_run(straight_through(0.75)):
        np.testing.assert_array_equal(trained, dense - 0.25 * gradient(t))
        expected = top(np.abs(trained), 64, DENSE)
        np.testing.assert_array_equal(kernel(new.masks), expected)
        np.testing.assert_array_equal(view, np.where(expected, trained, 0))


def test_masks_stay_between_choices():
    flips = []
    for t, _, _, old, view, trained, new in latent_run(straight_through(0.75, update_every=3)):
        flips.append(int((kernel(old.masks) != kernel(new.masks)).sum()))
        np.testing.assert_array_equal(view, np.where(kernel(new.masks), trained, 0))
        if t + 1 in (3, 6):
            np.testing.assert_array_equal(kernel(new.masks), top(np.abs(trained), 64, DENSE))
    assert [f > 0 for f in flips] == [False, False, True, False, False, True, False, False]


@pytest.mark.parametrize("decay", [0.0, 0.25])
def test_sr_ste_adds_the_decay_of_pruned_weights_to_the_gradient(decay):
    for t, _, dense, old, view, trained, new in latent_run(sr_ste(2, 4, decay=decay), steps=5):
        felt = gradient(t) + decay * np.where(kernel(old.masks), 0, dense)
        np.testing.assert_array_equal(trained, dense - 0.25 * felt)
        np.testing.assert_array_equal(kernel(new.masks), top_nm(trained, 2, 4))
        np.testing.assert_array_equal(view, np.where(kernel(new.masks), trained, 0))


def test_the_decay_of_sr_ste_comes_before_momentum():
    tx = sparsify(optax.sgd(0.25, momentum=0.5), sr_ste(2, 4, decay=0.5), rules=ALONE)
    momentum = np.zeros((16, 16), np.float32)
    for t, _, old, _, _, new in run(tx, exact_params(), exact_grads(), 4):
        momentum = 0.5 * momentum + gradient(t) + 0.5 * np.where(kernel(old.masks), 0, kernel(old.latent))
        np.testing.assert_array_equal(kernel(new.latent), kernel(old.latent) - 0.25 * momentum)


def test_masks_flip_less_with_the_decay():
    def flips(decay):
        moves = latent_run(sr_ste(2, 4, decay=decay), steps=12, learning_rate=0.0625)
        return sum(int((kernel(old.masks) != kernel(new.masks)).sum()) for _, _, _, old, _, _, new in moves)

    assert flips(0.5) < flips(0.0)


def test_fading_has_its_closed_form():
    steps = 0, 1000, 2500, 5000, 10000
    linear, exponential = fade(begin=0, rate=2e-4), fade(begin=0, rate=2e-4, exponential=True, end=20000)
    np.testing.assert_allclose([linear(s) for s in steps], [1, 0.8, 0.5, 0, 0], atol=1e-6)
    np.testing.assert_allclose([exponential(s) for s in steps], [1, 0.8187, 0.6065, 0.3679, 0.1353], atol=5e-5)
    assert exponential(19999) > 0
    assert exponential(20000) == 0
    assert [float(fade(begin=5, rate=0.5)(s)) for s in (0, 5, 6, 7)] == [1, 1, 0.5, 0]
    with pytest.raises(ValueError, match="end="):
        fade(begin=0, rate=0.1, exponential=True)


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("exponential", [False, True])
def test_mdgf_fades_pruned_weights_out(exponential, unscaled):
    algorithm = mdgf(2, 4, begin=2, rate=0.25, exponential=exponential, end=6, straight_through_gradient=unscaled)
    factor = (lambda t: math.exp(-0.25 * t)) if exponential else (lambda t: max(0, 1 - 0.25 * t))
    close = {"rtol": 1e-6, "atol": 1e-6} if exponential else {"rtol": 0, "atol": 0}
    for t, view, dense, old, after, trained, new in latent_run(algorithm):
        shown = [0.0 if s >= 6 else factor(max(s - 2, 0)) for s in (t, t + 1)]
        mask, moved = kernel(old.masks), kernel(new.masks)
        if t:
            np.testing.assert_allclose(view, dense * np.where(mask, 1, shown[0]), **close)
        felt = gradient(t) * (1 if unscaled else np.where(mask, 1, shown[0]))
        np.testing.assert_allclose(trained, dense - 0.25 * felt, **close)
        np.testing.assert_array_equal(moved, top_nm(trained, 2, 4))
        np.testing.assert_allclose(after, trained * np.where(moved, 1, shown[1]), **close)
        if shown[1] == 0:
            assert not after[~moved].any()
    assert shown[1] == 0


def test_stages_of_sdgf():
    kept = [int(kernel(new.masks).sum()) for *_, new in latent_run(sdgf(1, 8, begin=2, every=2), steps=12)]
    assert kept == [256, 224, 224, 128, 128, 64, 64, 32, 32, 32, 32, 32]
    for t, _, _, _, view, trained, new in latent_run(sdgf(1, 8, begin=0, every=1), steps=5):
        n = (7, 4, 2, 1, 1, 1)[t + 1]
        np.testing.assert_array_equal(kernel(new.masks), top_nm(trained, n, 8))
        np.testing.assert_array_equal(view, np.where(kernel(new.masks), trained, 0))


def test_geometric_stages_keep_the_density_and_narrow_the_choice():
    for t, _, _, old, _, trained, new in latent_run(sdgf(1, 2, begin=0, every=2, geometric=True), steps=9):
        width = (8, 4, 2, 1)[min((t + 1) // 2, 3)]
        np.testing.assert_array_equal(kernel(new.masks), top_nm(trained, width, 2 * width))
        assert kernel(old.masks).sum() == 128


@pytest.mark.parametrize(
    ("n", "m", "stages"), [(1, 16, [15, 8, 4, 2, 1]), (2, 4, [3, 2]), (1, 2, [1]), (3, 24, [23, 12, 6, 3])]
)
def test_stepwise_stages(n, m, stages):
    sparsity = sdgf(n, m, every=10).sparsity
    assert [round(m * (1 - float(sparsity(10 * k)))) for k in range(len(stages))] == stages
    assert round(m * (1 - float(sparsity(10_000)))) == n


@pytest.mark.parametrize(("n", "m"), [(2, 6), (3, 8), (4, 4)])
def test_stages_need_a_power_of_two(n, m):
    with pytest.raises(ValueError, match=f"{n}:{m} has no stepwise stages: m / n must be a power of two"):
        sdgf(n, m, every=10)


@pytest.mark.parametrize("distribution", [None, erdos_renyi_kernel, global_])
def test_top_kast_trains_a_larger_set_than_it_shows(distribution):
    options = {} if distribution is None else {"distribution": distribution}
    algorithm = top_kast(0.75, backward_sparsity=0.5, regularization=0.125, **options)
    for t, _, dense, old, view, trained, new in latent_run(algorithm, steps=6):
        seen, learned = kernel(old.masks), kernel(old.data["trainable"])
        assert (learned | ~seen).all()
        np.testing.assert_array_equal(trained[~learned], dense[~learned])
        felt = gradient(t) + 0.125 * np.where(seen, dense, dense / 0.25)
        np.testing.assert_array_equal(trained, np.where(learned, dense - 0.25 * felt, dense))
        np.testing.assert_array_equal(kernel(new.masks), top(np.abs(trained), 64, DENSE))
        np.testing.assert_array_equal(kernel(new.data["trainable"]), top(np.abs(trained), 128, DENSE))
        np.testing.assert_array_equal(view, np.where(kernel(new.masks), trained, 0))


def test_outside_of_the_trained_set_nothing_moves_even_with_momentum_and_decay():
    tx = sparsify(optax.adamw(0.25, weight_decay=0.5), top_kast(0.75, backward_sparsity=0.5), rules=ALONE)
    for *_, old, _, _, new in run(tx, exact_params(), exact_grads(), 6):
        outside = ~kernel(old.data["trainable"])
        np.testing.assert_array_equal(kernel(new.latent)[outside], kernel(old.latent)[outside])


def test_without_exploration_top_kast_is_straight_through_on_a_fixed_topology():
    fixed = top_kast(0.75, backward_sparsity=0.75, regularization=0.0)
    first = None
    for *_, old, _, _, new in latent_run(fixed, steps=4, learning_rate=2**-10):
        first = kernel(old.masks) if first is None else first
        np.testing.assert_array_equal(kernel(new.data["trainable"]), kernel(new.masks))
    everything = top_kast(0.75, backward_sparsity=0.0, regularization=0.0)
    for one, other in zip(latent_run(everything, steps=4), latent_run(straight_through(0.75), steps=4), strict=True):
        np.testing.assert_array_equal(one[5], other[5])


def test_movement_scores_follow_minus_gradient_times_weight():
    algorithm = movement(0.75, begin=2, end=6, learning_rate=0.5)
    score = np.zeros((16, 16), np.float32)
    for t, _, dense, old, view, trained, new in latent_run(algorithm, steps=9):
        score = score - 0.5 * gradient(t) * dense
        np.testing.assert_array_equal(kernel(new.data["memory"]), score)
        np.testing.assert_array_equal(trained, np.where(kernel(old.masks), dense - 0.25 * gradient(t), dense))
        done = min(max((t + 1 - 2) / 4, 0), 1)
        count = round((1 - round(0.75 * (1 - (1 - done) ** 3), 6)) * 256)
        np.testing.assert_array_equal(kernel(new.masks), top(score, count, DENSE))
        np.testing.assert_array_equal(view, np.where(kernel(new.masks), trained, 0))
    assert kernel(new.masks).sum() == 64


def test_the_density_of_movement_has_its_closed_form():
    schedule = movement(0.9, begin=100, end=800, learning_rate=1.0).sparsity
    np.testing.assert_allclose([1 - schedule(s) for s in (0, 100, 450, 800, 1000)], [1, 1, 0.2125, 0.1, 0.1], atol=1e-6)


def test_movement_scores_are_not_lost_in_bfloat16():
    """Scores sum up small steps: they are kept in float32 at least, whatever the weights are."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), exact_params())
    state = sparsify(optax.sgd(0.25), movement(0.75, begin=2, end=6, learning_rate=0.5)).init(params)
    assert state.data["memory"]["hidden"]["kernel"].dtype == jnp.float32


def test_nm_prunes_once_and_shared_columns_agree():
    for share in (1, 4):
        tx = sparsify(optax.sgd(0.25), nm(2, 4, step=1, share=share), rules=ALONE)
        *_, (_, before, _, _, _, new) = run(tx, exact_params(), exact_grads(), 2)
        pooled = np.abs(kernel(before)).reshape(16, 16 // share, share).sum(-1)
        np.testing.assert_array_equal(kernel(new.masks), np.repeat(top_nm(pooled, 2, 4), share, axis=1))


@pytest.mark.parametrize(("n", "m"), [(5, 7), (2, 3), (1, 6), (3, 3), (3, 7)])
def test_odd_patterns_keep_exactly_n(n, m):
    params = {"kernel": jax.random.normal(jax.random.key(0), (6 * 7, 4))}
    for algorithm in (nm(n, m), sr_ste(n, m)):
        tx = sparsify(optax.sgd(0.1), algorithm)
        _, state = tx.update(params, tx.init(params), params)
        assert (np.asarray(masks_of(state)["kernel"]).reshape(-1, m, 4).sum(1) == n).all()


def test_a_view_that_is_still_fading_cannot_be_finished():
    tx = sparsify(optax.sgd(0.25), mdgf(2, 4, begin=1, rate=0.25))
    *_, (*_, after, new) = run(tx, exact_params(), exact_grads(), 3)
    with pytest.raises(ValueError, match=r"factor of 0\.5; train until the fading has reached 0"):
        finalize(after, new)
    *_, (*_, after, new) = run(tx, exact_params(), exact_grads(), 6)
    assert int(np.count_nonzero(kernel(finalize(after, new)))) <= 128
