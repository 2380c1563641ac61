"""Bad input and what goes wrong in practice: one test for each class, with the behaviour that users can count on.

Faults of checkpoints have their own file, `test_checkpoint.py`; meshes are in `transforms/test_loops.py`.
"""

import dataclasses
import functools
import itertools
import math
import re

import chex
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsejax
from sparsejax.masks.counts import keep_count, share
from sparsejax.masks.distributions import erdos_renyi_kernel, uniform
from sparsejax.masks.paths import named_leaves
from sparsejax.topology import scores
from sparsejax.topology.plan import plan
from tests.problems import PRESETS, STEPS, exact_grads, exact_params, mlp_params

NAN = float("nan")


def single(shape=(8, 8), dtype=jnp.float32):
    return {"layer": {"kernel": jax.random.normal(jax.random.key(0), shape).astype(dtype)}}


def step(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def off_mask(params, masks):
    leaves = dict(named_leaves(params))
    return sum(int(jnp.sum((leaves[path] != 0) & ~mask)) for path, mask in named_leaves(masks))


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


@pytest.mark.parametrize("after", [optax.scale(0.5), optax.add_decayed_weights(0.1), optax.clip_by_global_norm(0.01)])
def test_a_transform_that_changes_values_after_sparsify(after):
    """Silent un-pruning becomes a number in the state and an error of `check` that names leaf, count and remedy."""
    params = single()
    tx = optax.chain(sparsejax.sparsify(optax.adam(1e-2), sparsejax.rigl(0.75, update_every=2)), after)
    state = tx.init(params)
    params, state = step(tx, params, state, params)
    with pytest.raises(ValueError, match=r"layer/kernel: \d+ of 48 pruned weights are not zero; .*Put it inside"):
        sparsejax.check(params, state)
    assert state[0].leaks == 0  # counted when masks move, and never for the dense weights of the first step
    params, state = step(tx, params, state, params)
    params, state = step(tx, params, state, params)
    assert state[0].leaks > 0
    with pytest.raises(ValueError, match=r"non-zero pruned weights were seen when masks moved.*sparsify\(optax.chain"):
        sparsejax.check(sparsejax.mask_params(params, state), state)
    with pytest.raises(ValueError, match="pruned weights"):
        sparsejax.finalize(params, state)


def test_no_parameters():
    tx = sparsejax.sparsify(optax.adam(1e-2), sparsejax.rigl(0.75))
    params = single()
    with pytest.raises(ValueError, match=r"sparsify needs the current parameters.*update\(updates, state, params\)"):
        tx.update(params, tx.init(params))


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


def test_two_leaves_of_one_name():
    params = {"a/b": jnp.ones((4, 4)), "a": {"b": jnp.ones((8, 8))}}
    with pytest.raises(ValueError, match="two leaves are named 'a/b'"):
        sparsejax.sparsify(optax.sgd(0.1), sparsejax.rigl(0.5)).init(params)


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


WRONG = {
    "missing": (lambda p: {"hidden": p["hidden"]}, r"no gradients for the sparse leaves \['out/kernel'\]"),
    "extra": (lambda p: {**p, "third": jnp.ones(3)}, r"the gradients have leaves .* lack: \['third'\]"),
    "renamed": (lambda p: {"hidden": p["hidden"], "outer": p["out"]}, r"lack: \['outer/bias', 'outer/kernel'\]"),
    "transposed": (
        lambda p: {**p, "out": {**p["out"], "kernel": p["out"]["kernel"].T}},
        r"out/kernel: the gradients have shape \(8, 16\), the parameter has \(16, 8\)",
    ),
    "none": (
        lambda p: {**p, "out": {**p["out"], "kernel": None}},
        r"no gradients for the sparse leaves \['out/kernel'\].*rules=",
    ),
    "dense leaf missing": (
        lambda p: {**p, "out": {"kernel": p["out"]["kernel"]}},
        r"parameters without a gradient: \['out/bias'\]",
    ),
    "frozen": (
        lambda p: flax.core.freeze(p),
        r"the gradients and the parameters are trees of different kinds, .*FrozenDict",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("algorithm", ["rigl", "sr_ste"])
def test_gradients_of_another_tree(name, algorithm):
    params = mlp_params()
    tx = sparsejax.sparsify(optax.adam(1e-2), PRESETS[algorithm].make(params))
    state = tx.init(params)
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        tx.update(change(params), state, params)


def test_a_state_of_another_model():
    params = mlp_params()
    tx = sparsejax.sparsify(optax.adam(1e-2), sparsejax.rigl(0.5))
    state = tx.init(params)
    other = {"first": params["hidden"]}
    with pytest.raises(ValueError, match=r"masks in the optimizer state have leaves .* lack: \['hidden/kernel'"):
        tx.update(other, state, other)
    wider = {**params, "out": {"kernel": jnp.ones((16, 4)), "bias": jnp.ones(4)}}
    with pytest.raises(ValueError, match=r"out/kernel: the masks in the optimizer state have shape \(16, 8\)"):
        tx.update(wider, state, wider)
    with pytest.raises(ValueError, match=r"parameters lack the masked leaves \['hidden/kernel', 'out/kernel'\]"):
        sparsejax.mask_params(other, state)
    with pytest.raises(ValueError, match=r"parameters lack the masked leaves \['hidden/kernel', 'out/kernel'\]"):
        sparsejax.check(other, state)
    with pytest.raises(ValueError, match=r"no sparsify in it: make the optimizer with\s+sparsejax\.sparsify"):
        sparsejax.masks_of(optax.adam(1e-2).init(params))


def test_trees_of_every_kind():
    """FrozenDict, NNX states, None, MaskedNode, integers: initialised, updated, read, without a special case."""
    plain = exact_params()
    module = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    trees = [
        flax.core.freeze(plain),
        nnx.state(module, nnx.Param),
        {"a": {"kernel": jnp.ones((4, 4))}, "none": None, "masked": optax.MaskedNode(), "steps": jnp.arange(3)},
        (jnp.ones((4, 4)), [jnp.ones((8, 4))]),
    ]
    for tree in trees:
        tx = sparsejax.sparsify(optax.sgd(0.25), sparsejax.magnitude(0.5))
        updates, state = tx.update(tree, tx.init(tree), tree)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        moved = optax.apply_updates(tree, updates)
        assert sparsejax.check(moved, state).nnz * 2 == sum(mask.size for _, mask in named_leaves(state.masks))


def test_starting_masks_of_another_model():
    params = single((4, 4))
    for masks, message in {
        ("layers",): r"masks has a leaf 'layers' that the parameters lack; they have \['layer/kernel'\]",
        ("shape",): r"layer/kernel: the starting mask is bool\(4,\); it must be bool\(4, 4\)",
        ("dtype",): r"layer/kernel: the starting mask is float32\(4, 4\); it must be bool\(4, 4\)",
    }.items():
        given_masks = {
            "layers": {"layers": jnp.ones((4, 4), bool)},
            "shape": {"layer": {"kernel": jnp.ones(4, bool)}},
            "dtype": {"layer": {"kernel": jnp.ones((4, 4))}},
        }[masks[0]]
        with pytest.raises(ValueError, match=message):
            sparsejax.sparsify(optax.sgd(0.1), sparsejax.from_masks(given_masks)).init(params)
    with pytest.raises(TypeError, match=r"sparsify needs an algorithm such as sparsejax.rigl\(0.9\), not 0.9"):
        sparsejax.sparsify(optax.sgd(0.1), 0.9)


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


def test_donated_and_aliased_buffers():
    """One array given twice, and masks that the user keeps: the state has buffers of its own."""
    kernel = jnp.ones((8, 8))
    masks = {"kernel": jnp.eye(8, dtype=bool)}
    for algorithm in (sparsejax.rigl(0.5, masks=masks), sparsejax.from_masks(masks), sparsejax.sr_ste(2, 4)):
        params = {"kernel": jnp.array(kernel)}
        tx = sparsejax.sparsify(optax.adam(1e-2), algorithm)
        state = tx.init(params)
        donating = jax.jit(lambda p, s: step(tx, p, s, p), donate_argnums=(0, 1))  # noqa: B023
        for _ in range(2):
            params, state = donating(params, state)
    assert int(masks["kernel"].sum()) == 8  # still there


@pytest.mark.parametrize("inside", [False, True])
def test_gradient_accumulation(inside):
    """Steps are real updates when `MultiSteps` is outside, micro-steps when it is inside; zeros are exact both ways."""
    algorithm = sparsejax.magnitude(0.75, step=1)
    tx = (
        sparsejax.sparsify(optax.MultiSteps(optax.adam(1e-2), 3).gradient_transformation(), algorithm)
        if inside
        else optax.MultiSteps(sparsejax.sparsify(optax.adam(1e-2), algorithm), 3).gradient_transformation()
    )
    params = single()
    state = tx.init(params)
    pruned = []
    for _ in range(7):
        params, state = step(tx, params, state, params)
        masks = sparsejax.masks_of(state)
        pruned.append(int(masks["layer"]["kernel"].sum()) == 16)
        assert off_mask(params, masks) == 0
    assert pruned.index(True) == (1 if inside else 5)


def test_an_ensemble_under_vmap():
    """A batched step counter turns the condition into a selection: slower, but the same bits."""
    tx = sparsejax.sparsify(optax.sgd(0.25), sparsejax.rigl(0.75, update_every=2, distribution=uniform))
    many = jax.tree.map(lambda p: jnp.stack([p, -p, p + 1]), single())
    train = lambda p: functools.reduce(lambda carry, _: step(tx, *carry, carry[0]), range(4), (p, tx.init(p)))  # noqa: E731
    together = jax.jit(jax.vmap(train))(many)
    for k in range(3):
        alone = jax.jit(train)(jax.tree.map(lambda p: p[k], many))  # noqa: B023
        chex.assert_trees_all_equal(alone[1].masks, jax.tree.map(lambda leaf: leaf[k], together[1].masks))  # noqa: B023


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


def test_masks_that_change_at_run_time():
    """Masks are arrays: one compilation serves every mask, also those put into the state by hand."""
    params = single()
    tx = sparsejax.sparsify(optax.sgd(0.25), sparsejax.from_masks({"layer": {"kernel": jnp.ones((8, 8), bool)}}))
    state = tx.init(params)
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(lambda p, s: step(tx, p, s, p), n=1))
    for seed in range(3):
        mask = jax.random.bernoulli(jax.random.key(seed), 0.5, (8, 8))
        params, state = update(params, state._replace(masks={"layer": {"kernel": mask}}))
        assert off_mask(params, state.masks) == 0


def test_a_damaged_mask():
    """A mask whose count is not the one it was given is reported, with the leaf's name and both counts."""
    params = single()
    tx = sparsejax.sparsify(optax.sgd(0.1), sparsejax.rigl(0.75))
    params, state = step(tx, params, tx.init(params), params)
    damaged = state._replace(masks={"layer": {"kernel": state.masks["layer"]["kernel"].at[0].set(True)}})
    with pytest.raises(ValueError, match=r"layer/kernel: the mask keeps \d+ elements, but was given 16"):
        sparsejax.check(params, damaged)


def test_check_inside_jit():
    params = single()
    tx = sparsejax.sparsify(optax.sgd(0.1), sparsejax.rigl(0.75))
    with pytest.raises(ValueError, match="check looks at values; call it outside of jit"):
        jax.jit(lambda p: sparsejax.check(p, tx.init(p)).nnz)(params)


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


def test_a_score_of_another_tree():
    def broken(params, grads, masks, key, data):
        return {"elsewhere": params["layer"]["kernel"]}

    tx = sparsejax.sparsify(optax.sgd(0.1), sparsejax.static(0.5, score=broken))
    with pytest.raises(ValueError, match=r"the score .*broken.* gave no scores for 'layer/kernel'"):
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


def test_starting_masks_of_which_there_are_none():
    tx = sparsejax.sparsify(optax.sgd(0.1), sparsejax.from_masks({"kernel": None}))
    with pytest.raises(ValueError, match="no leaf has a starting mask"):
        tx.init({"kernel": jnp.ones((4, 4))})
