"""Masks read off parameters that are already sparse."""

import jax.numpy as jnp
import optax

from sparsejax.masks.paths import map_with_names
from sparsejax.masks.rules import resolve
from sparsejax.masks.unstructured import Unstructured


def masks_from_params(params, rules=None):
    """Marks the parameters that are not zero, for methods and checkpoints that keep no masks of their own.

    Right for finalized models, and for penalties and proximal steps, whose mask is implied by the zeros they make. A
    weight that is kept but happens to be 0, such as one just grown, is taken for pruned: where a run still has its
    masks, use `masks_of`.

    Args:
        params: the parameter tree.
        rules: which leaves are sparse, as in `sparsify`.

    Returns:
        A tree like `params` of bool arrays `p != 0`, `optax.MaskedNode()` where the rules leave a leaf dense.

    Raises:
        ValueError: as `resolve`.

    Example:
        >>> import jax.numpy as jnp
        >>> masks_from_params({"kernel": jnp.array([[0.0, 2.0]]), "bias": jnp.zeros(2)})
        {'bias': MaskedNode(), 'kernel': Array([[False,  True]], dtype=bool)}
    """
    sparse = {leaf.path for leaf in resolve(params, rules, Unstructured()) if leaf.structure is not None}
    return map_with_names(lambda path, p: jnp.not_equal(p, 0) if path in sparse else optax.MaskedNode(), params)
