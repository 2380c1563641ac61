"""Arguments that make no sense are refused with what is wrong and what to do."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsejax
from sparsejax.masks.counts import keep_count
from sparsejax.masks.distributions import erdos_renyi_kernel, uniform
from sparsejax.masks.paths import named_leaves
from sparsejax.topology import scores
from sparsejax.topology.plan import plan
from tests.faults import NAN, single

MAKERS = {
    "magnitude": sparsejax.magnitude,
    "global_magnitude": sparsejax.global_magnitude,
    "random": sparsejax.random,
    "saliency": sparsejax.saliency,
    "static": sparsejax.static,
    "set_": sparsejax.set_,
    "rigl": sparsejax.rigl,
    "gradual": functools.partial(sparsejax.gradual, begin=0, end=10),
    "gradual_initial": lambda s: sparsejax.gradual(0.9, begin=0, end=10, initial=s),
    "granet": functools.partial(sparsejax.granet, end=10),
    "granet_initial": lambda s: sparsejax.granet(0.9, end=10, initial=s),
    "ac_dc": functools.partial(sparsejax.ac_dc, begin=0, phase=2, end=10),
    "cyclic": functools.partial(sparsejax.cyclic, period=4, cycles=2, update_every=1),
    "straight_through": sparsejax.straight_through,
    "top_kast": lambda s: sparsejax.top_kast(s, backward_sparsity=0.0),
    "top_kast_backward": lambda s: sparsejax.top_kast(0.9, backward_sparsity=s),
    "movement": functools.partial(sparsejax.movement, begin=0, end=10, learning_rate=1.0),
    "rule": lambda s: sparsejax.sparsify(optax.sgd(0.1), sparsejax.rigl(0.5), rules={"*": s}).init(single()),
    "structure": lambda s: sparsejax.Unstructured().mask(jnp.ones(4), s),
    "layerwise": lambda s: sparsejax.layerwise({"*": s}),
    "cubic_sparsity": functools.partial(sparsejax.cubic_sparsity, begin=0, end=10),
}


@pytest.mark.parametrize("value", [1.0, 1.5, 90, -0.1, NAN, math.inf, np.float32(1.5), np.float64(NAN)])
@pytest.mark.parametrize("name", MAKERS)
def test_a_sparsity_outside_of_its_range(name, value):
    """Every preset checks numbers at once, and the message has the value and the range."""
    with pytest.raises(ValueError, match=r"(at least 0 and below 1|exceeds sparsity)") as error:
        MAKERS[name](value)
    assert str(value) in str(error.value)


@pytest.mark.parametrize("value", ["0.9", None, True])
@pytest.mark.parametrize("name", ["rigl", "gradual", "magnitude", "straight_through", "ac_dc"])
def test_a_sparsity_that_is_no_number(name, value):
    with pytest.raises(TypeError, match="sparsity must be a number") as error:
        MAKERS[name](value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(("value", "kept"), [(-0.5, 64), (1.0, 1), (7.0, 1), (NAN, 64), (math.inf, 1)])
@pytest.mark.parametrize("distribution", [uniform, erdos_renyi_kernel])
def test_a_schedule_that_leaves_the_range(distribution, value, kept):
    """Traced values cannot raise: they are clipped to [0, 1], NaN prunes nothing, and a layer keeps one weight."""
    algorithm = sparsejax.Algorithm(
        sparsity=lambda step: jnp.float32(value), steps=sparsejax.UpdateSteps(0, 1, None), distribution=distribution
    )
    params = single()
    tx = sparsejax.sparsify(optax.sgd(0.1), algorithm)
    for update in (tx.update, jax.jit(tx.update)):
        _, state = update(params, tx.init(params), params)
        assert int(state.masks["layer"]["kernel"].sum()) == kept


def test_a_layer_too_small():
    """At least one weight of a layer is kept; structures that do not fit are errors with path, shape and remedy."""
    params = {"big": {"kernel": jnp.ones((32, 32))}, "tiny": {"kernel": jnp.ones((2, 2))}}
    for distribution in (uniform, erdos_renyi_kernel):
        state = sparsejax.sparsify(optax.sgd(0.1), sparsejax.static(0.99, distribution=distribution)).init(params)
        assert int(state.masks["tiny"]["kernel"].sum()) >= 1
        assert state.targets.sum() == keep_count(1028, 0.99)
    structures = {
        sparsejax.NM(2, 4): r"tiny/kernel: axis -2 of shape \(2, 2\) does not divide into groups of 4",
        sparsejax.NM(1, 2, share=4): r"tiny/kernel: the 2 columns of shape \(2, 2\) do not divide into shares of 4",
        sparsejax.Block((4, 4)): r"tiny/kernel: a block of \(4, 4\) is larger than .* shape \(2, 2\)",
    }
    for structure, message in structures.items():
        sparsity = 0.5
        with pytest.raises(ValueError, match=message) as error:
            sparsejax.sparsify(optax.sgd(0.1), sparsejax.static(sparsity, structure=structure)).init(params)
        assert "rules={'tiny/kernel': None}" in str(error.value)
        sparse = sparsejax.sparsify(optax.sgd(0.1), sparsejax.static(0.5, structure=structure), rules={"tiny/*": None})
        assert int(sparse.init(params).masks["big"]["kernel"].sum()) == 512


def test_groups_never_run_across_the_window_of_a_convolution():
    params = {"conv": {"kernel": jnp.ones((2, 2, 2, 8))}}  # 8 rows, but 2 inputs
    with pytest.raises(ValueError, match=r"conv/kernel: .*does not divide into groups of 4"):
        sparsejax.sparsify(optax.sgd(0.1), sparsejax.nm(2, 4)).init(params)


def test_a_structure_and_a_sparsity_that_contradict_each_other():
    params = single()
    for sparsity in (0.3, 0.9):
        with pytest.raises(ValueError, match=rf"sparsity {sparsity}.*NM\(n=2, m=4.*0\.5"):
            sparsejax.sparsify(optax.sgd(0.1), sparsejax.rigl(sparsity, structure=sparsejax.NM(2, 4))).init(params)
    with pytest.raises(ValueError, match=r"layer/kernel: a rule asks for sparsity 0\.9, but NM"):
        sparsejax.sparsify(optax.sgd(0.1), sparsejax.nm(2, 4), rules={"layer/kernel": 0.9}).init(params)
    state = sparsejax.sparsify(optax.sgd(0.1), sparsejax.rigl(0.3), rules={"layer/kernel": sparsejax.NM(2, 4)}).init(
        params
    )
    assert int(state.masks["layer"]["kernel"].sum()) == 32


def test_a_rule_that_matches_nothing():
    tx = sparsejax.sparsify(optax.sgd(0.1), sparsejax.rigl(0.5), rules={"layers/*": 0.5})
    with pytest.raises(ValueError, match=r"rules\['layers/\*'\] matches no leaf; mend .* The leaves are: layer/kernel"):
        tx.init(single())


def test_everything_dense():
    message = r"no leaf is sparse under these rules.*layer/kernel is dense: rule '\*'"
    with pytest.raises(ValueError, match=message):
        sparsejax.sparsify(optax.sgd(0.1), sparsejax.rigl(0.5), rules={"*": None}).init(single())
    with pytest.raises(ValueError, match="gain is dense: fewer than two axes"):
        sparsejax.sparsify(optax.sgd(0.1), sparsejax.rigl(0.5)).init({"gain": jnp.ones(4)})


def test_a_leaf_whose_axes_have_no_roles():
    with pytest.raises(ValueError, match=r"^strange: a leaf of 3 axes, shape \(2, 4, 4\).*rules=\{'strange'"):
        sparsejax.sparsify(optax.sgd(0.1), sparsejax.rigl(0.5)).init({"strange": jnp.ones((2, 4, 4))})


def test_a_schedule_that_never_fires():
    with pytest.raises(ValueError, match="masks would never move: they first move at step 100 and stop at 50"):
        sparsejax.rigl(0.5, update_every=100, stop=50)
    with pytest.raises(ValueError, match="masks would never move"):
        sparsejax.gradual(0.5, begin=10, end=5)
    with pytest.raises(ValueError, match="first move at step 100, but training ends after 80 steps"):
        plan(single(), sparsejax.rigl(0.5), steps=80)
    planned = plan(single(), sparsejax.gradual(0.75, begin=5, end=40, update_every=10), steps=60)
    assert (planned.first, planned.last, planned.nnz) == (5, 40, {"layer/kernel": 16})
    assert "16" in str(planned)


@settings(deadline=None, max_examples=30)
@given(
    widths=st.lists(st.integers(1, 40), min_size=3, max_size=6),
    percent=st.integers(1, 99),
)
def test_the_capacity_of_erdos_renyi_kernel(widths, percent):
    """No density above 1, and the counts add up to the sparsity that was asked for, exactly."""
    params = {f"layer{k}": {"kernel": np.ones(pair)} for k, pair in enumerate(itertools.pairwise(widths))}
    total, layers = sum(leaf.size for leaf in jax.tree.leaves(params)), len(params)
    planned = plan(params, sparsejax.static(percent / 100))
    assert all(1 <= planned.nnz[path] <= leaf.size for path, leaf in named_leaves(params))
    assert sum(planned.nnz.values()) == max(keep_count(total, percent / 100), layers)


BAD_OPTIONS = {
    "update_every": (lambda: sparsejax.rigl(0.5, update_every=0), "update_every is 0"),
    "drop_fraction": (
        lambda: sparsejax.rigl(0.5, drop_fraction=1.5),
        r"drop_fraction is 1\.5; it is a share in \[0, 1\]",
    ),
    "drop_fraction_stop": (
        lambda: sparsejax.rigl(0.5, drop_fraction=-1.0, stop=500),
        r"drop_fraction is -1\.0; it is a share in \[0, 1\]",
    ),
    "granet": (
        lambda: sparsejax.granet(0.5, end=10, drop_fraction=2.0),
        r"drop_fraction is 2\.0; it is a share in \[0, 1\]",
    ),
    "begin": (lambda: sparsejax.set_(0.5, begin=0), "begin is 0; masks that start sparse move for the first time"),
    "magnitude": (lambda: sparsejax.magnitude(0.5, step=-1), "begin is -1; steps count from 0"),
    "granet_stop": (lambda: sparsejax.granet(0.5, end=10, stop=5), "stop=5 is before end=10"),
    "phase": (lambda: sparsejax.ac_dc(0.5, begin=0, phase=0, end=10), "phase is 0"),
    "rounds": (lambda: sparsejax.iterative(rate=0.5, rounds=0, every=1), "rate is 0.5 and rounds 0"),
    "top_kast": (lambda: sparsejax.top_kast(0.5, backward_sparsity=0.9), "backward_sparsity=0.9 exceeds sparsity=0.5"),
    "latent": (
        lambda: dataclasses.replace(sparsejax.rigl(0.5), backward_sparsity=0.5),
        "backward_sparsity needs dense weights under the mask: latent=True",
    ),
    "nm": (lambda: sparsejax.nm(5, 4), "NM keeps n of m elements with 1 <= n <= m, got n=5, m=4"),
    "nm_zero": (lambda: sparsejax.sr_ste(0, 4), "NM keeps n of m elements with 1 <= n <= m, got n=0, m=4"),
    "fade": (lambda: sparsejax.mdgf(2, 4, rate=-1.0), r"rate is -1\.0"),
    "sdgf": (lambda: sparsejax.sdgf(1, 8, every=0), "every is 0"),
    "cycles": (lambda: sparsejax.cyclic(0.5, period=4, cycles=0, update_every=1), "cycles is 0"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_that_make_no_sense(name):
    make, message = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("score", [scores.gradient, scores.saliency])
def test_a_start_that_needs_gradients(score):
    tx = sparsejax.sparsify(optax.sgd(0.1), sparsejax.static(0.5, score=score))
    with pytest.raises(ValueError, match=r"there are no gradients before training.*snip"):
        tx.init(single())


def test_messages_have_no_line_breaks():
    """Messages are one line, so that logs keep them together."""
    for make, _ in BAD_OPTIONS.values():
        with pytest.raises(ValueError) as error:
            make()
        assert not re.search(r"\n", str(error.value))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sparsejax.rigl(0.9, update_evry=3), TypeError, r"rigl\(\).*update_evry.*did you mean update_every="),
        (lambda: sparsejax.set_(0.9, decay=3), TypeError, r"set_\(\) does not take decay=; it takes drop, grow"),
        (lambda: sparsejax.NM(2.0, 4), TypeError, r"NM\(n=2.0\): give a whole number"),
        (lambda: sparsejax.gradual(0.3, initial=0.9, begin=0, end=6), ValueError, "0.9 is above the final one, 0.3"),
        (lambda: sparsejax.granet(0.5, initial=0.9, end=6), ValueError, "0.9 is above the final one, 0.5"),
        (lambda: sparsejax.iterative(rounds=2.5, every=3), TypeError, "rounds is 2.5"),
        (lambda: sparsejax.movement(0.9, begin=0, end=9, learning_rate=np.nan), ValueError, "learning_rate is nan"),
    ],
)
def test_wrong_arguments_of_presets(make, error, message):
    with pytest.raises(error, match=message):
        make()
