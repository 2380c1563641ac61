"""Attention over several sets of keys, joined into attention over all of them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def merge_states(states: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Joins partial results of one softmax: each over its own keys, none of which is in two of them.

    With it, keys split over devices or chunks, summaries beside plain tokens (Combiner, arXiv 2107.05768), or gathered
    columns beside tiles are one attention. Differentiable, also through the `lse`.

    Args:
        states: pairs of an output [B, S, H, D] and its `lse` [B, H, S], the log of the sum of the exponentials of the
            logits, -inf where a query saw no key.

    Returns:
        Output [B, S, H, D] in the dtype of the first, and `lse` [B, H, S]. A query that saw no key anywhere gets 0,
        -inf and gradients of 0.

    Raises:
        ValueError: there is nothing to merge, or the shapes do not fit.

    Example:
        >>> o = jnp.ones((1, 1, 1, 2))
        >>> lse = jnp.zeros((1, 1, 1))
        >>> merged, total = merge_states([(o, lse), (3 * o, lse), (9 * o, lse - jnp.inf)])
        >>> merged.ravel().tolist(), round(float(total[0, 0, 0]), 4)
        ([2.0, 2.0], 0.6931)
    """
    if not states:
        raise ValueError("merge_states needs at least one pair of output and lse")
    for o, lse in states:
        if o.ndim != 4 or lse.shape != (o.shape[0], o.shape[2], o.shape[1]) or o.shape != states[0][0].shape:
            raise ValueError(
                f"output {o.shape} and lse {lse.shape} must be [B, S, H, D] and [B, H, S], alike in all pairs"
            )
    dtype = states[0][0].dtype
    logs = jnp.stack([lse for _, lse in states])
    seen = logs != -jnp.inf
    top = jax.lax.stop_gradient(jnp.max(logs, axis=0))
    top = jnp.where(top != -jnp.inf, top, 0)
    # Both branches of every `where` are finite, so that gradients are, too.
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, logs, top) - top), 0)
    total = jnp.sum(weights, axis=0)
    any_seen = total != 0
    safe = jnp.where(any_seen, total, 1)
    shares = jnp.swapaxes(weights / safe, 2, 3)[..., None]
    outputs = jnp.stack([o for o, _ in states]).astype(jnp.promote_types(logs.dtype, dtype))
    return jnp.sum(shares * outputs, axis=0).astype(dtype), jnp.where(any_seen, jnp.log(safe) + top, -jnp.inf)
