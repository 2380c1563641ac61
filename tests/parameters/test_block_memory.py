"""Stored blocks save the memory of what is absent: of weights, gradients and moments, also while blocks move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax.masks.block import Block
from sparsejax.masks.distributions import uniform
from sparsejax.parameters import apply_updates, to_sparse, value_and_grad
from sparsejax.topology.dynamic import rigl, set_
from sparsejax.transforms.access import masks_of
from sparsejax.transforms.sparsify import sparsify

SIZE, BATCH = 1024, 16
STRUCTURE = Block((64, 64))


def stored_params(sparsity):
    grid = jax.random.permutation(jax.random.key(0), (SIZE // 64) ** 2) < round((1 - sparsity) * (SIZE // 64) ** 2)
    masks = {"kernel": grid.reshape(SIZE // 64, SIZE // 64)}
    return to_sparse({"kernel": jnp.ones((SIZE, SIZE)) / 32}, masks, STRUCTURE)


def loss(params, x):
    return jnp.mean((x @ params["kernel"]) ** 2)


def make_step(tx):
    def step(params, state, x):
        _, grads = value_and_grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates), state

    return step


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_a_tenth_of_the_weights_takes_less_than_a_seventh_of_the_memory():
    params = stored_params(0.9)
    tx = sparsify(optax.adamw(1e-3), rigl(0.9, distribution=uniform))
    x = jax.ShapeDtypeStruct((BATCH, SIZE), jnp.float32)
    grads = jax.eval_shape(lambda p, x: value_and_grad(loss)(p, x)[1], params, x)
    dense = 4 * SIZE * SIZE * 4  # weights, gradients and two moments in float32
    assert nbytes((params, grads, tx.init(params))) < 0.15 * dense


def shapes(jaxpr):
    """Sizes of all arrays that a program makes, inner programs included."""
    for equation in jaxpr.eqns:
        for out in equation.outvars:
            yield int(np.prod(getattr(out.aval, "shape", ()))), out.aval, equation.primitive.name
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes(inner)


@pytest.mark.parametrize("make", [rigl, set_])
def test_no_array_has_the_size_of_the_dense_weight(make):
    params = stored_params(0.9)
    tx = sparsify(optax.adamw(1e-3), make(0.9, update_every=2, stop=100, distribution=uniform))
    state = tx.init(params)
    x = jax.random.normal(jax.random.key(1), (BATCH, SIZE))
    step = jax.jit(make_step(tx), donate_argnums=(0, 1))
    traced = step.trace(params, state, x)
    size, aval, primitive = max(shapes(traced.jaxpr.jaxpr), key=lambda found: found[0])
    assert size < SIZE * SIZE / 4, (aval, primitive)
    compiled = traced.lower().compile()
    # Both branches of the condition are part of the program, so that this is the peak at steps that move blocks, too.
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * 4 * SIZE * SIZE
    first = np.asarray(masks_of(state)["kernel"])
    for _ in range(3):
        params, state = compiled(params, state, x)
    assert (np.asarray(masks_of(state)["kernel"]) != first).any()
