"""Chain elements that add a penalty to the gradients of pruned weights, and read `masks=` from the extra arguments."""

import math

import jax.numpy as jnp
import optax

from sparsejax.masks.paths import map_with_names, named_leaves


def sr_ste_decay(decay: float = 2e-4) -> optax.GradientTransformationExtraArgs:
    r"""Pulls pruned weights to zero: the sparse-refined term of SR-STE.

    .. math:: u_i \leftarrow u_i + \lambda \, (1 - m_i) \, w_i

    where :math:`w` are the dense weights under the mask. It belongs in front of momentum or Adam, inside
    `sparsify(optax.chain(sr_ste_decay(), optax.sgd(0.1, momentum=0.9)), straight_through(...))`; the preset `sr_ste`
    has it built in. Pruned weights that are small then stay small and masks flip less often. With a decay of 0 it is
    the plain straight-through estimator.

    Args:
        decay: lambda, 2e-4 in the paper with SGD; applied to the weights, so not scaled by the gradients' size.

    Returns:
        An optax transformation without state; updates keep their shapes and dtypes. Its `update` needs `params` and
        `masks=`, which `sparsify` passes; leaves without a mask are left alone.

    Raises:
        ValueError: `decay` is negative or not finite; at `update`, `params` or `masks` is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> element = sr_ste_decay(0.5)
        >>> weights, grads = {"w": jnp.array([4.0, 2.0])}, {"w": jnp.array([1.0, 1.0])}
        >>> masks = {"w": jnp.array([True, False])}
        >>> updates, _ = element.update(grads, element.init(weights), weights, masks=masks)
        >>> updates["w"].tolist()
        [1.0, 2.0]

    References:
        Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, 2021
        (https://arxiv.org/abs/2102.04010)
    """
    check_strength("sr_ste_decay", "decay", decay)
    return _added_to_pruned("sr_ste_decay", lambda w: jnp.asarray(decay, w.dtype) * w)


def mask_sparsity_penalty(strength: float = 5e-4, masks=None) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks only what a given mask is going to prune: the pruning-aware L1 penalty of MaskSparsity.

    .. math:: u_i \leftarrow u_i + \lambda \, (1 - m_i) \, \mathrm{sign}(w_i)

    Kept weights feel nothing of it: their updates are the same bits with and without the element. The paper applies it
    to the scales of norms, one for each channel, whose mask comes from a first training with an L1 penalty on all: give
    that mask as `masks` and put the element in front of an ordinary optimizer; no `sparsify` is needed. Once the
    penalized weights are near 0, prune them.

    Args:
        strength: lambda, 5e-4 in the paper.
        masks: tree like the parameters, True for what will stay; `optax.MaskedNode()` at leaves that are left alone.
            None reads the extra argument `masks=`, which `sparsify` passes. Where `sparsify` keeps pruned weights at 0
            there is nothing to shrink: it acts on dense weights under a mask, as `straight_through` keeps them.

    Returns:
        An optax transformation without state; updates keep their shapes and dtypes. Its `update` needs `params`.

    Raises:
        ValueError: `strength` is negative or not finite; at `update`, `params` is missing, `masks` is missing in both
            places, or names a leaf that the updates lack.

    Example:
        >>> import jax.numpy as jnp
        >>> element = mask_sparsity_penalty(0.5, masks={"scale": jnp.array([True, False, False])})
        >>> params = {"scale": jnp.array([3.0, 2.0, -2.0])}
        >>> updates, _ = element.update({"scale": jnp.zeros(3)}, element.init(params), params)
        >>> updates["scale"].tolist()
        [0.0, 0.5, -0.5]

    References:
        Jiang et al., Pruning-aware Sparse Regularization for Network Pruning, 2022 (https://arxiv.org/abs/2201.06776)
    """
    check_strength("mask_sparsity_penalty", "strength", strength)
    return _added_to_pruned("mask_sparsity_penalty", lambda w: jnp.asarray(strength, w.dtype) * jnp.sign(w), masks)


def check_strength(name: str, argument: str, value) -> None:
    """Raises `ValueError` for a number that is negative or not finite; traced values pass."""
    if isinstance(value, (int, float)) and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: {argument} is {value}; allowed are finite numbers from 0 on")


def check_params(name: str, params) -> None:
    """Raises `ValueError` when an update was called without parameters."""
    if params is None:
        raise ValueError(f"{name} needs the current parameters: pass `params` when calling `update`")


def _added_to_pruned(name: str, term, fixed_masks=None) -> optax.GradientTransformationExtraArgs:
    def init(params):
        return optax.EmptyState()

    def update(updates, state, params=None, *, masks=None, **extra_args):
        check_params(name, params)
        masks = masks if fixed_masks is None else fixed_masks
        if masks is None:
            raise ValueError(
                f"{name} reads `masks=` from the extra arguments of `update`; sparsify passes them to the optimizer "
                f"inside it: sparsify(optax.chain({name}(...), optimizer), algorithm)"
            )
        kept = dict(named_leaves(masks))
        unknown = sorted(set(kept) - {path for path, _ in named_leaves(updates)})
        if unknown:
            raise ValueError(f"{name}: masks names leaves that the updates lack: {', '.join(unknown)}")

        def add(path, u, w):
            return jnp.where(kept[path], u, u + term(w).astype(u.dtype)) if path in kept else u

        return map_with_names(add, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)
