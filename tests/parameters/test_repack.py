"""Room that follows the density: fewer slots after pruning, with nothing else changed."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax
from sparsejax.checkpoint import Checkpointer
from sparsejax.parameters import repack

STRUCTURE = sparsejax.Block((8, 8), groups=2)
X = jax.random.normal(jax.random.key(1), (16, 32))


def start(density=1.0):
    """Room for all blocks, of which some are there; moments are not zero."""
    optimizer = sparsejax.sparsify(optax.adamw(1e-2), sparsejax.gradual(0.9, begin=1, end=7, update_every=2))
    kernel = jax.random.normal(jax.random.key(0), (32, 64)) / 6
    masks = {"kernel": STRUCTURE.mask(kernel**2, 1 - density)}
    params = sparsejax.to_sparse({"kernel": kernel, "bias": jnp.zeros(64)}, masks, STRUCTURE, capacity=1.0)
    state = optimizer.init(params)
    moved = lambda leaf: leaf + 1 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf  # noqa: E731
    live = params["kernel"].live(params["kernel"].active)
    inner = jax.tree.map(lambda leaf: moved(leaf) * live if leaf.ndim == 4 else leaf, state.inner_state)
    return optimizer, params, state._replace(inner_state=inner)


def loss(params):
    return jnp.mean((jnp.tanh(X @ params["kernel"] + params["bias"]) - 1) ** 2)


def make_step(optimizer):
    @jax.jit
    def step(params, state):
        _, grads = sparsejax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return sparsejax.apply_updates(params, updates), state

    return step


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
def test_repacked_training_goes_on_as_it_would_have():
    optimizer, params, state = start()
    step = make_step(optimizer)
    plain = params, state
    packed = params, state
    before = nbytes(packed)
    for at in range(10):
        plain, packed = step(*plain), step(*packed)
        if at in (3, 8):
            packed = repack(*packed)
        held = packed[0]["kernel"]
        np.testing.assert_array_equal(held.mask(), plain[0]["kernel"].mask())
    assert held.capacity == 4  # three blocks in two groups
    chex.assert_trees_all_close(*(sparsejax.to_dense(run[0]) for run in (plain, packed)), atol=1e-6)
    sparsejax.check(*packed)
    assert nbytes(packed) < 0.25 * before
    assert nbytes(plain) == before
    assert step._cache_size() == 3  # once for each size


def test_nothing_but_the_room_changes():
    _, params, state = start(density=0.25)
    state = (state, {"average": params})
    small, smaller_state = repack(params, state)
    chex.assert_trees_all_equal(sparsejax.to_dense((small, smaller_state[1])), sparsejax.to_dense((params, state[1])))
    large, larger_state = repack(small, smaller_state, capacity={"kernel": 1.0})
    chex.assert_trees_all_equal_shapes((large, larger_state), (params, state))
    again, state_again = repack(large, larger_state)
    chex.assert_trees_all_equal((again, state_again), (small, smaller_state))
    sparsejax.check(large, larger_state[0])


def test_a_repacked_checkpoint_is_restored(tmp_path):
    packed = repack(*start(density=0.25)[1:])
    template = jax.eval_shape(functools.partial(repack, capacity=0.25), *start()[1:])
    with Checkpointer(tmp_path / "here") as checkpoints:
        checkpoints.save(9, packed)
        restored = checkpoints.restore(template)
    chex.assert_trees_all_equal(restored, packed)


def test_shards_stay_where_they_are():
    mesh = jax.make_mesh((2,), ("model",))
    params = {"kernel": start()[1]["kernel"]}
    place = lambda leaf: NamedSharding(mesh, P("model") if leaf.ndim == 4 else P())  # noqa: E731
    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, place(leaf)), params)
    packed, moments = repack(placed, optax.scale_by_adam().init({"kernel": placed["kernel"].values}), capacity=1.0)
    assert packed["kernel"].sharding.spec[0] == moments.mu["kernel"].sharding.spec[0] == "model"
    chex.assert_trees_all_equal(jax.device_get(packed), jax.device_get(params))


@pytest.mark.slow
def test_a_model_is_repacked_in_place():
    structure = sparsejax.Block((8, 8))
    model = sparsejax.nn.SparseLinear(32, 64, structure=structure, sparsity=0.0, rngs=nnx.Rngs(0))
    optimizer = sparsejax.nn.Optimizer(
        model, sparsejax.sparsify(optax.adam(1e-2), sparsejax.magnitude(0.75, step=1)), wrt=nnx.Param
    )
    step = nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(X) ** 2))(model)))
    for _ in range(2):
        step(model, optimizer)
    before, out = nbytes(nnx.state((model, optimizer))), model(X)
    optimizer.repack(model)
    np.testing.assert_allclose(model(X), out, atol=1e-6)
    assert model.kernel.weight.capacity == 8
    assert nbytes(nnx.state((model, optimizer))) < 0.4 * before
    step(model, optimizer)
    sparsejax.check(sparsejax.nn.split(model)[1], optimizer)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda params, state: repack({"bias": jnp.ones(3)}), "no leaf is stored in blocks"),
        (lambda params, state: repack(params, capacity=0.5), "kernel: a group holds 16 blocks, and capacity 0.5 has 8"),
        (lambda params, state: repack(params, capacity={"bias": 0.5}), "capacity names"),
        (lambda params, state: repack(params, capacity=1.5), "above 0 and up to 1"),
        (lambda params, state: jax.eval_shape(repack, params), "give a capacity"),
        (
            lambda params, state: repack(params, {"kernel": jnp.ones((1, 16, 1, 1))}, capacity=1.0),
            "initialise the optimizer anew",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*start()[1:])


def test_under_jit_what_does_not_fit_is_nan():
    _, params, _ = start()
    packed, _ = jax.jit(functools.partial(repack, capacity=0.5))(params)
    assert bool(jnp.isnan(packed["kernel"].values).all())
