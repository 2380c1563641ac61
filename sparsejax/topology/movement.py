"""Movement pruning: scores that are learned, not read off the weights."""

import jax
import jax.numpy as jnp

from sparsejax.masks.distributions import uniform
from sparsejax.masks.unstructured import Unstructured
from sparsejax.topology import scores
from sparsejax.topology.algorithm import Algorithm, Memory, UpdateSteps
from sparsejax.topology.magnitude import cubic_sparsity
from sparsejax.transforms.tree import map_sparse


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
    schedule from `begin` to `end`. Weights get the gradient of the masked network, that is none while they are pruned:
    then only momentum and weight decay of the optimizer change them until their score brings them back. Scores are
    float32 at least.

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

    Raises:
        ValueError: the learning rate is not a positive number.
    """
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate is {learning_rate}; scores learn at a positive, finite rate")

    def start(params):
        return jax.tree.map(lambda w: jnp.zeros_like(w, dtype=jnp.result_type(w, jnp.float32)), params)

    def learn(learned, params, grads, masks, step):
        def descend(_, s, g, w):
            return s - learning_rate * g.astype(s.dtype) * w.astype(s.dtype)

        return map_sparse(descend, masks, learned, grads, params)

    return Algorithm(
        sparsity=cubic_sparsity(sparsity, begin=begin, end=end),
        steps=UpdateSteps(update_every, update_every, None),
        structure=structure,
        distribution=distribution,
        drop=scores.memory,
        reselect=True,
        latent=True,
        memory=Memory(init=start, update=learn),
    )
