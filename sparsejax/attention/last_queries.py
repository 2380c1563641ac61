"""How the last queries attend, from which several selectors guess how the others do."""

import math

import jax
import jax.numpy as jnp


def last_query_weights(q: jax.Array, k: jax.Array, last: int) -> jax.Array:
    """Causal attention weights of the last queries, which are the last tokens of the sequence.

    Args:
        q: [B, Sq, H, D], Sq at most Sk; query i stands at position Sk - Sq + i.
        k: [B, Sk, Hk, D].
        last: how many of the queries; fewer where there are not so many.

    Returns:
        float32 [B, H, last, Sk], rows that sum to 1; no gradient passes.

    Raises:
        ValueError: `last` is below 1, or there are more queries than keys.

    Example:
        >>> last_query_weights(jnp.ones((1, 4, 1, 2)), jnp.ones((1, 4, 1, 2)), 3)[0, 0, ::2].tolist()
        [[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]
    """
    if last < 1 or q.shape[1] > k.shape[1]:
        raise ValueError(
            f"last={last} of {q.shape[1]} queries over {k.shape[1]} keys: last must be at least 1, and the queries are "
            "the last tokens of the sequence"
        )
    q, k = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (q[:, -last:], k))
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    logits = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, k) / math.sqrt(q.shape[-1])
    seen = jnp.arange(k.shape[1]) <= jnp.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
    return weights.reshape(q.shape[0], q.shape[2], *weights.shape[3:])


def slash_sums(weights: jax.Array) -> jax.Array:
    """Sums along diagonals: entry d is the weight that queries give to the key d tokens before them.

    Args:
        weights: [..., last, Sk], as `last_query_weights` returns them.

    Returns:
        [..., Sk].

    Example:
        >>> slash_sums(jnp.array([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]])).tolist()
        [7.0, 5.0, 3.0]
    """
    last, length = weights.shape[-2:]
    # Row after row with `last - 1` zeros between, cut anew into rows that are one shorter, each row moves one further.
    padded = jnp.pad(jnp.flip(weights, -2), [(0, 0)] * (weights.ndim - 1) + [(0, last)])
    flat = padded.reshape(*weights.shape[:-2], -1)[..., :-last]
    skewed = flat.reshape(*weights.shape[:-1], length + last - 1)
    return jnp.flip(jnp.sum(skewed, -2)[..., :length], -1)
