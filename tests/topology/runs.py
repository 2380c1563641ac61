"""Running an optimizer step by step, and selection in plain numpy."""

import math

import jax
import numpy as np
import optax


def top(scores, count, candidates):
    """The `count` best candidates, ties to the lower flat index, NaN last."""
    order = sorted(
        np.flatnonzero(candidates), key=lambda i: (math.isnan(scores.flat[i]), -np.nan_to_num(scores.flat[i]), i)
    )
    mask = np.zeros(scores.size, bool)
    mask[order[:count]] = True
    return mask.reshape(scores.shape)


def run(tx, params, grads, steps):
    """Steps eagerly; yields `(t, params before, state before, updates, params after, state after)`."""
    state = tx.init(params)
    for t in range(steps):
        updates, after = tx.update(jax.tree.map(lambda g: g[t], grads), state, params)  # noqa: B023
        moved = optax.apply_updates(params, updates)
        yield t, params, state, updates, moved, after
        params, state = moved, after


def kernel(tree):
    """The 16 x 16 kernel of a tree like `tests.problems.mlp_params()`."""
    return np.asarray(tree["hidden"]["kernel"])
