"""Masks implied by zeros."""

import jax.numpy as jnp
import optax

from sparsejax.masks.from_params import masks_from_params


def test_zeros_of_sparse_leaves_are_pruned():
    params = {"kernel": jnp.array([[0.0, -0.0, jnp.nan, 1e-40]]), "bias": jnp.zeros(4), "head": {"kernel": jnp.eye(2)}}
    masks = masks_from_params(params, {"head/*": None})
    # A subnormal is not 0, though a CPU that flushes it to 0 when it computes may say so.
    assert masks["kernel"].tolist()[0][:3] == [False, False, True]
    assert masks["bias"] == masks["head"]["kernel"] == optax.MaskedNode()
