"""Parameters, gradients, masks and states that do not belong together: what users can count on."""

import functools

import chex
import flax.core
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import sparsejax
from sparsejax.masks.distributions import uniform
from sparsejax.masks.paths import named_leaves
from tests.faults import off_mask, single, step
from tests.problems import PRESETS, exact_params, mlp_params


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


def test_two_leaves_of_one_name():
    params = {"a/b": jnp.ones((4, 4)), "a": {"b": jnp.ones((8, 8))}}
    with pytest.raises(ValueError, match="two leaves are named 'a/b'"):
        sparsejax.sparsify(optax.sgd(0.1), sparsejax.rigl(0.5)).init(params)


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


def test_a_score_of_another_tree():
    def broken(params, grads, masks, key, data):
        return {"elsewhere": params["layer"]["kernel"]}

    tx = sparsejax.sparsify(optax.sgd(0.1), sparsejax.static(0.5, score=broken))
    with pytest.raises(ValueError, match=r"the score .*broken.* gave no scores for 'layer/kernel'"):
        tx.init(single())


def test_starting_masks_of_which_there_are_none():
    tx = sparsejax.sparsify(optax.sgd(0.1), sparsejax.from_masks({"kernel": None}))
    with pytest.raises(ValueError, match="no leaf has a starting mask"):
        tx.init({"kernel": jnp.ones((4, 4))})
