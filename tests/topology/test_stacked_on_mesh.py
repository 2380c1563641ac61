"""Layers that lie on different devices of an explicit mesh: their masks and weights are those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax

ALGORITHMS = {
    "static": lambda: sparsejax.static(0.8),
    "rigl": lambda: sparsejax.rigl(0.8, update_every=2),
    "set": lambda: sparsejax.set_(0.8, update_every=2),
    "magnitude": lambda: sparsejax.magnitude(0.8, step=1),
    "gradual": lambda: sparsejax.gradual(0.8, begin=1, end=4, update_every=1),
    "nm": lambda: sparsejax.nm(2, 4, step=1, share=4),
    "sr_ste": lambda: sparsejax.sr_ste(2, 4),
    "blocks": lambda: sparsejax.rigl(0.5, structure=sparsejax.Block((4, 4)), update_every=2),
}


def train(algorithm, kernel, grads):
    """Parameters and masks after some steps on given gradients."""
    roles = {"kernel": sparsejax.Roles((1,), (2,), (0,))}
    optimizer, params = sparsejax.sparsify(optax.sgd(0.1), algorithm, rules=roles), {"kernel": kernel}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for grad in grads:
        updates, state = update({"kernel": grad}, state, params)
        params = optax.apply_updates(params, updates)
    return params["kernel"], sparsejax.masks_of(state)["kernel"]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_layers_spread_over_an_explicit_mesh_train_as_on_one_device(name):
    mesh = jax.make_mesh((2, 4), ("stage", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
    sharding = NamedSharding(mesh, P("stage", None, "fsdp"))
    kernel, *grads = jax.random.normal(jax.random.key(0), (6, 4, 16, 32))
    here = train(ALGORITHMS[name](), kernel, grads)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, sharding) for x in (kernel, *grads)]
        there = train(ALGORITHMS[name](), placed[0], placed[1:])
    assert not jnp.all(here[1])
    for one, many in zip(here, there, strict=True):
        np.testing.assert_array_equal(many, one)
        assert many.sharding.is_equivalent_to(sharding, 3)
