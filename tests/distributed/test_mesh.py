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

ALGORITHMS = {
    "rigl": lambda: sparsejax.rigl(0.8, update_every=2),
    "blocks": lambda: sparsejax.rigl(0.5, structure=sparsejax.Block((8, 8)), update_every=2),
    "nm": lambda: sparsejax.sr_ste(2, 4),
}


def updated(algorithm, layout: Layout | None):
    """Parameters and state after five updates; masks move in three of them."""
    shapes = {"attention": {"query": {"kernel": (32, 4, 16)}}, "up": {"kernel": (32, 64)}, "down": {"kernel": (64, 32)}}

    def draw(key):
        paths, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
        keys = jax.random.split(key, len(paths))
        return tree.unflatten([jax.random.normal(k, shape) for k, shape in zip(keys, paths, strict=True)])

    optimizer = sparsejax.sparsify(optax.adam(1e-2), algorithm)
    params = draw(jax.random.key(0))
    grads = [draw(jax.random.key(step)) for step in range(1, 6)]
    init, update = optimizer.init, optimizer.update
    if layout is None:
        init, update = jax.jit(init), jax.jit(update)
    else:
        like, state = (params, jax.eval_shape(init, params))
        placed, of_state = layout.of_params(like), layout.of_state(state, like)
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
        pytest.param("blocks", "auto", marks=pytest.mark.slow),
        ("nm", "auto"),
        ("nm", "explicit"),
        pytest.param("rigl", "auto", marks=pytest.mark.slow),
        pytest.param("blocks", "explicit", marks=pytest.mark.slow),
    ],
)
def test_masks_are_those_of_one_device_given_the_same_gradients(name, axis_types):
    layout = Layout(make_mesh((2, 2, 2), axis_types))
    params, state = updated(ALGORITHMS[name](), None)
    with layout.context():
        params_there, state_there = updated(ALGORITHMS[name](), layout)
    for (path, here), (_, there) in zip(
        named_leaves(sparsejax.masks_of(state)), named_leaves(sparsejax.masks_of(state_there)), strict=True
    ):
        np.testing.assert_array_equal(there, here, err_msg=path)
        assert not there.is_fully_replicated
    for (path, here), (_, there) in zip(named_leaves(params), named_leaves(params_there), strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-6, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("axis_types", ["auto", "explicit"])
def test_the_trainer_on_a_mesh_trains_as_on_one_device(axis_types):
    ends = []
    config = tiny.config()
    task = EXPERIMENT.task(config)
    for layout in (None, Layout(make_mesh((2, 2, 2), axis_types))):
        variant = Variant(EXPERIMENT, config, "rigl", task, layout)
        state, data, losses = variant.first_state(0), iter(task.batches(0)), []
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


def test_a_batch_must_divide_over_the_mesh():
    config = tiny.config(batch_size=6)
    with pytest.raises(UsageError, match="batch_size is 6; the mesh's data x fsdp, 4, must divide it"):
        Variant(EXPERIMENT, config, "rigl", EXPERIMENT.task(config), Layout(make_mesh((2, 2, 2))))
