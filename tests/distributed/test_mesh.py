"""Given the same gradients, masks and weights on a mesh are those of one device, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import sparsejax
from experiments.configs.bytes_lm import EXPERIMENT
from experiments.experiment import UsageError
from experiments.sharding import Layout, make_mesh
from experiments.variant import Variant
from sparsejax.masks.paths import named_leaves

BLOCKS = sparsejax.Block((8, 8), groups=2)
ALGORITHMS = {
    "rigl": lambda: sparsejax.rigl(0.8, update_every=2),
    "blocks": lambda: sparsejax.rigl(0.5, structure=BLOCKS, update_every=2),
    "stored": lambda: sparsejax.rigl(0.5, structure=BLOCKS, distribution=sparsejax.uniform, update_every=2),
    "nm": lambda: sparsejax.sr_ste(2, 4),
}
SHAPES = {"attention": {"query": {"kernel": (32, 4, 16)}}, "up": {"kernel": (32, 64)}, "down": {"kernel": (64, 32)}}


def draw(like, seed: int):
    """Random numbers in the place of floating leaves, zeros in that of integers."""
    leaves, tree = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    drawn = [
        jax.random.normal(k, leaf.shape) if f else jnp.zeros_like(leaf)
        for k, f, leaf in zip(keys, floating, leaves, strict=True)
    ]
    return tree.unflatten(drawn)


def updated(name: str, layout: Layout | None):
    """Parameters and state after five updates; masks move in three of them."""
    optimizer = sparsejax.sparsify(optax.adam(1e-2), ALGORITHMS[name]())
    shapes = jax.tree.map(lambda s: jnp.zeros(s), SHAPES, is_leaf=lambda s: isinstance(s, tuple))
    params = draw(shapes, 0)
    if name == "stored":
        state = optimizer.init(params)
        params = sparsejax.to_sparse(sparsejax.mask_params(params, state), sparsejax.masks_of(state), BLOCKS)
    grads = [draw(params, step) for step in range(1, 6)]
    init, update = optimizer.init, optimizer.update
    if layout is None:
        init, update = jax.jit(init), jax.jit(update)
    else:
        placed = layout.of_state(params, params)
        of_state = layout.of_state(jax.eval_shape(init, params), params)
        init, update = jax.jit(init, out_shardings=of_state), jax.jit(update, out_shardings=(placed, of_state))
        params, grads = jax.device_put(params, placed), [jax.device_put(g, placed) for g in grads]
    state = init(params)
    for each in grads:
        updates, state = update(each, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(
    ("name", "axis_types"),
    [
        ("rigl", "explicit"),
        ("stored", "explicit"),
        ("nm", "auto"),
        ("nm", "explicit"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("rigl", "auto"), ("stored", "auto"), ("blocks", "auto"), ("blocks", "explicit")]
        ),
    ],
)
def test_masks_are_those_of_one_device_given_the_same_gradients(name, axis_types):
    layout = Layout(make_mesh((2, 2, 2), axis_types))
    params, state = updated(name, None)
    with layout.context():
        params_there, state_there = updated(name, layout)
    for (path, here), (_, there) in zip(
        named_leaves(sparsejax.masks_of(state)), named_leaves(sparsejax.masks_of(state_there)), strict=True
    ):
        np.testing.assert_array_equal(there, here, err_msg=path)
        assert name == "stored" or not there.is_fully_replicated
    for (path, here), (_, there) in zip(named_leaves(params), named_leaves(params_there), strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-6, atol=1e-7, err_msg=path)
        assert not (path.endswith(("kernel", "values")) and there.is_fully_replicated), path


@pytest.mark.slow
@pytest.mark.parametrize("axis_types", ["auto", "explicit"])
@pytest.mark.parametrize("name", ["rigl", "stored"])
def test_the_trainer_on_a_mesh_trains_as_on_one_device(name, axis_types):
    ends = []
    for layout in (None, Layout(make_mesh((2, 2, 2), axis_types))):
        variant = tiny.variant(name, layout)
        state, data, losses = variant.first_state(0), iter(variant.task.batches(0)), []
        for _ in range(3):
            state, (loss, _) = variant.run_step(state, variant.place(next(data)), np.uint32(0))
            losses.append(float(loss))
        if layout is not None:
            for (path, leaf), sharding in zip(named_leaves(state), jax.tree.leaves(variant.placed), strict=True):
                assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), path
        ends.append((losses, variant.evaluate(state), variant.masks(state)))
    (losses, sums, masks), (losses_there, sums_there, masks_there) = ends
    np.testing.assert_allclose(losses_there, losses, rtol=1e-5)
    for name in sums:
        np.testing.assert_allclose(sums_there[name], sums[name], rtol=1e-5)
    for (path, here), (_, there) in zip(named_leaves(masks), named_leaves(masks_there), strict=True):
        assert int(jnp.sum(here)) == int(jnp.sum(there))
        assert np.mean(np.asarray(here) != np.asarray(there)) < 0.01, path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6}, "batch_size is 6; the mesh's data x fsdp, 4, must divide it"),
        (
            {"batch_size": 12, **tiny.STORED},
            "batch_size is 12; with --storage block all 8 devices of the mesh share it",
        ),
    ],
)
def test_a_batch_must_divide_over_the_mesh(changes, message):
    config = tiny.config(**changes)
    with pytest.raises(UsageError, match=message):
        Variant(EXPERIMENT, config, "rigl", EXPERIMENT.task(config), Layout(make_mesh((2, 2, 2))))
