"""What the tests of faults share."""

import jax
import jax.numpy as jnp
import optax

from sparsejax.masks.paths import named_leaves

NAN = float("nan")


def single(shape=(8, 8), dtype=jnp.float32):
    return {"layer": {"kernel": jax.random.normal(jax.random.key(0), shape).astype(dtype)}}


def step(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def off_mask(params, masks):
    leaves = dict(named_leaves(params))
    return sum(int(jnp.sum((leaves[path] != 0) & ~mask)) for path, mask in named_leaves(masks))
