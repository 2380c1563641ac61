"""Sparse layers against dense ones under masks, and loops with moving blocks in NNX, linen and plain JAX."""

from typing import Any

import chex
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from sparsejax.masks.block import Block
from sparsejax.masks.paths import is_stored, named_leaves
from sparsejax.nn import Optimizer, SparseConv, SparseLinear, SparseMLP, merge, sparsify_model, split
from sparsejax.parameters import apply_updates, to_dense, to_sparse, value_and_grad
from sparsejax.topology.dynamic import rigl, static
from sparsejax.transforms.access import check, finalize, mask_params, masks_of, summary
from sparsejax.transforms.sparsify import sparsify

BLOCKS = Block((8, 8))


class Net(nnx.Module):
    """Attention, a convolution, an MLP in a list, and a norm."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.conv_point = nnx.Conv(16, 16, (1, 1), use_bias=False, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)])
        self.norm = nnx.LayerNorm(16, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv_point(nnx.relu(self.conv(x))))
        x = x.reshape(len(x), -1, 16)
        x = self.norm(x + self.attention(x))
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


def inputs(*shape, seed=5):
    return jax.random.normal(jax.random.key(seed), shape)


def test_a_model_keeps_its_outputs():
    graph, params, rest = split(Net(nnx.Rngs(0)))
    state = sparsify(optax.sgd(0.1), static(0.6, structure=BLOCKS)).init(params)
    params = mask_params(params, state)
    model = merge(graph, params, rest)
    sparse = sparsify_model(model, BLOCKS, masks_of(state))
    assert isinstance(sparse.conv, SparseConv)
    assert isinstance(sparse.attention.query, SparseLinear)
    assert isinstance(sparse.layers[1], SparseLinear)
    assert isinstance(model.conv, nnx.Conv)  # the model that was given stays as it is
    x = inputs(2, 8, 8, 8)
    np.testing.assert_allclose(*(nnx.jit(lambda m, x: m(x))(m, x) for m in (sparse, model)), atol=1e-5)
    chex.assert_trees_all_equal(to_dense(split(sparse)[1]), params)


@pytest.mark.parametrize("padding", ["SAME", 1])
def test_convolutions_are_dense_ones_under_the_mask(padding):
    layer = SparseConv(
        6, 10, (3, 2), (2, 1), padding=padding, kernel_dilation=(1, 2), structure=Block((4, 4)), rngs=nnx.Rngs(0)
    )
    x = inputs(2, 9, 8, 6)
    dense = nnx.Conv(6, 10, (3, 2), (2, 1), padding=padding, kernel_dilation=(1, 2), rngs=nnx.Rngs(1))
    dense.kernel[...] = layer.kernel.weight.to_dense()
    np.testing.assert_allclose(*(nnx.jit(lambda m, x: m(x))(m, x) for m in (layer, dense)), atol=1e-5)


def test_a_fixed_pattern_trains_in_an_ordinary_loop():
    model = SparseMLP((16, 32, 8), structure=BLOCKS, sparsity=0.5, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    before = split(model)[1]
    x, y = inputs(32, 16), inputs(32, 8, seed=6)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    for (_, old), (_, new) in zip(
        named_leaves(before, is_stored), named_leaves(split(model)[1], is_stored), strict=True
    ):
        if is_stored(old):
            chex.assert_trees_all_equal(old.lists, new.lists)
            assert not np.asarray(new.probe).any()


def test_moving_blocks_need_one_changed_line():
    """NNX with `sparsejax.nn.Optimizer`, plain JAX on the parts, and masks on dense weights: one and the same."""
    algorithm = rigl(0.5, structure=BLOCKS, update_every=3, stop=16, drop_fraction=lambda step: jnp.float32(0.5))
    tx = lambda: sparsify(optax.adam(1e-2), algorithm)  # noqa: E731
    model = SparseMLP((16, 32, 16), structure=BLOCKS, sparsity=0.5, rngs=nnx.Rngs(0))
    optimizer = Optimizer(model, tx(), wrt=nnx.Param)
    x, y = inputs(32, 16), inputs(32, 16, seed=6)
    graph, params, rest = split(model)
    assert hash(graph)
    state = tx().init(params)
    dense = to_dense(params)
    start = jax.tree.map(lambda leaf: leaf.to_dense() != 0 if is_stored(leaf) else None, params, is_leaf=is_stored)
    masked = sparsify(
        optax.adam(1e-2),
        rigl(0.5, structure=BLOCKS, update_every=3, stop=16, drop_fraction=lambda step: jnp.float32(0.5), masks=start),
    )
    dense_state = masked.init(dense)

    @nnx.jit
    def nnx_step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
        optimizer.update(model, grads)

    @jax.jit
    def step(params, state):
        _, grads = value_and_grad(lambda p: jnp.mean((merge(graph, p, rest)(x) - y) ** 2))(params)
        updates, state = tx().update(grads, state, params)
        return apply_updates(params, updates), state

    @jax.jit
    def dense_step(params, state):
        def loss(p):
            hidden = nnx.gelu(x @ p["layers"][0]["kernel"] + p["layers"][0]["bias"])
            return jnp.mean((hidden @ p["layers"][1]["kernel"] + p["layers"][1]["bias"] - y) ** 2)

        updates, state = masked.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    first = masks_of(state)
    for _ in range(12):
        nnx_step(model, optimizer)
        params, state = step(params, state)
        dense, dense_state = dense_step(dense, dense_state)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(masks_of(state)), strict=True))
    chex.assert_trees_all_close(split(model)[1], params, atol=1e-6)
    chex.assert_trees_all_equal(jax.tree.leaves(masks_of(optimizer)), jax.tree.leaves(masks_of(state)))
    chex.assert_trees_all_close(to_dense(params), dense, atol=1e-5)
    assert check(params, state).leaks == 0
    text = str(summary(params, state))
    assert "accelerated" in text
    assert "simulated" not in text
    chex.assert_trees_all_equal(finalize(params, state), params)


class LinenNet(flax.linen.Module):
    """A linen module over a stored weight."""

    start: Any

    @flax.linen.compact
    def __call__(self, x):
        return jnp.tanh(x @ self.param("kernel", lambda key: self.start)) @ jnp.ones((32, 4))


def test_linen_train_state_moves_blocks():
    x = inputs(32, 16)
    blocks = Block((4, 4))
    tx = sparsify(optax.adam(1e-2), rigl(0.5, structure=blocks, update_every=2, drop_fraction=0.5))
    dense = {"kernel": inputs(16, 32, seed=1) / 4}
    start = to_sparse(dense, masks_of(tx.init(dense)), blocks)["kernel"]
    module = LinenNet(start)
    params = module.init(jax.random.key(0), x)["params"]
    state = TrainState.create(apply_fn=module.apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        _, grads = value_and_grad(lambda p: jnp.mean(state.apply_fn({"params": p}, x) ** 2))(state.params)
        return state.apply_gradients(grads=grads)

    for _ in range(8):
        state = step(state)
    assert step._cache_size() <= 2  # TrainState counts from a Python number, from an array thereafter
    assert bool((state.params["kernel"].mask() != start.mask()).any())
    assert check(state.params, state.opt_state).nnz == 16 * 32 // 2
