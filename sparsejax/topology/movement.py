"""Movement pruning: scores that are learned, not read off the weights."""

import jax
import jax.numpy as jnp

from sparsejax.masks.distributions import uniform
from sparsejax.masks.unstructured import Unstructured
from sparsejax.topology import scores
from sparsejax.topology.algorithm import Algorithm, Memory, UpdateSteps
from sparsejax.topology.magnitude import cubic_sparsity


def movement(
    sparsity,
    *,
    begin,
    end,
    learning_rate,
    distribution=uniform,
    structure=Unstructured(),
    update_every=1,
) -> Algorithm:
    """Movement pruning: weights that move towards zero are pruned (Sanh et al. 2020, arXiv:2005.07683, eq. 5).

    Every weight has a score S, 0 at first, trained by gradient descent through the mask with the straight-through
    estimator: S <- S - learning_rate * (dL/dw) * w. The highest scores are seen; the sparsity rises on the cubic
    schedule from `begin` to `end`. Weights get the gradient of the masked network, that is none while they are pruned,
    and keep their value until their score brings them back.

    Args:
        sparsity: the final fraction of zeros.
        begin: step up to which the network is dense.
        end: step at which the target is reached.
        learning_rate: of the scores.
        distribution: the share of each layer; `global_` ranks all layers together.
        structure: what is kept together.
        update_every: steps between two choices of masks.

    Returns:
        The algorithm, for `sparsify`.
    """

    def learn(learned, params, grads, masks, step):
        return jax.tree.map(lambda s, g, w: s - learning_rate * (g * w).astype(s.dtype), learned, grads, params)

    return Algorithm(
        sparsity=cubic_sparsity(sparsity, begin=begin, end=end),
        steps=UpdateSteps(update_every, update_every, None),
        structure=structure,
        distribution=distribution,
        drop=scores.memory,
        reselect=True,
        latent=True,
        memory=Memory(init=lambda params: jax.tree.map(jnp.zeros_like, params), update=learn),
    )
