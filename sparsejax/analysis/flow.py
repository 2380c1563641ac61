"""How much gradient reaches the weights that are there."""

from typing import NamedTuple

import jax.numpy as jnp

from sparsejax.analysis.overlap import check_masks
from sparsejax.masks.paths import named_leaves


class GradientFlow(NamedTuple):
    """Gradient flow of a network; a pytree of float scalars, so that it passes through `jit` and `scan`.

    Attributes:
        layers: `{path: sum of squares of the leaf's masked gradient}`.
        total: their sum, the first-order decrease of the loss per unit of learning rate under gradient descent.
        effective: mean over the leaves of the l2 norm, which keeps one large layer from hiding the others.
    """

    layers: dict
    total: object
    effective: object


def gradient_flow(grads, masks=None) -> GradientFlow:
    """Sums the squares of the gradients of active weights: ||g * m||^2 for each leaf and in total.

    Args:
        grads: the gradients, any pytree of floating arrays. Sums run in float32 at least.
        masks: bool masks of the same structure with `optax.MaskedNode()` at dense leaves, whose whole gradient counts;
            `None` counts every gradient. With `masks=None` on the gradients of a masked network the result is the
            *dense* flow, which growth by gradient (RigL) looks at.

    Returns:
        A `GradientFlow`.

    Raises:
        ValueError: when a mask names no gradient or has another shape, or there is no gradient at all.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> grads = {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([1.0])}
        >>> flow = gradient_flow(grads, {"kernel": jnp.array([False, True]), "bias": optax.MaskedNode()})
        >>> float(flow.total), float(flow.effective), float(flow.layers["kernel"])
        (17.0, 2.5, 16.0)

    References:
        Evci et al., Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win, AAAI 2022 (the total);
        Tessera, Hooker, Rosman, Keep the Gradients Flowing, 2021 (masked, averaged over layers).
    """
    gradients = dict(named_leaves(grads))
    known = {} if masks is None else check_masks(masks, "masks")
    if not gradients:
        raise ValueError("grads: there is no gradient to measure")
    for path, mask in known.items():
        if path not in gradients:
            raise ValueError(f"masks: {path} has a mask but no gradient; the gradients are {list(gradients)}")
        if mask.shape != gradients[path].shape:
            raise ValueError(f"{path}: the mask has shape {mask.shape}, the gradient {gradients[path].shape}")
    layers = {path: _sum_of_squares(gradient, known.get(path)) for path, gradient in gradients.items()}
    squares = jnp.stack([square.astype(jnp.result_type(*layers.values())) for square in layers.values()])
    return GradientFlow(layers, jnp.sum(squares), jnp.mean(jnp.sqrt(squares)))


def _sum_of_squares(gradient, mask):
    magnitude = jnp.abs(gradient)
    magnitude = magnitude.astype(jnp.promote_types(magnitude.dtype, jnp.float32))
    # where, not a product: a NaN in the gradient of a pruned weight must not count.
    return jnp.sum(jnp.square(magnitude if mask is None else jnp.where(mask, magnitude, 0)))
