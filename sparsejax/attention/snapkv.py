"""Which keys of a cache to keep, by how the last queries look at them.

SnapKV: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469. The shared budget:
Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation", arXiv 2407.11550.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparsejax.attention.budgets import Budget
from sparsejax.attention.last_queries import last_query_weights
from sparsejax.attention.token_sets import TokenSet, tokens_where, top_tokens


def snapkv_scores(
    q: jax.Array,
    k: jax.Array,
    *,
    window: int = 64,
    kernel: int = 5,
    group_reduce: Callable = jnp.mean,
    query_reduce: Callable = jnp.sum,
) -> jax.Array:
    """How much the last queries look at each key before them, smoothed along the keys.

    Args:
        q: [B, Sq, H, D], at least the last `window` queries of the sequence.
        k: [B, Sk, Hk, D].
        window: how many of the last queries are asked; their own keys get no score.
        kernel: odd number of keys over which a mean is taken (zeros beyond the ends), so that neighbours stay together.
        group_reduce: joins the query heads of one key head (the paper: mean; Ada-KV: max).
        query_reduce: joins the queries (the paper: sum; Ada-KV: max).

    Returns:
        float32 [B, Hk, Sk]; -inf for the last `window` keys.

    Raises:
        ValueError: `kernel` is even or not positive, or the window does not fit.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be an odd number of keys, not {kernel}")
    if not 0 < window <= min(q.shape[1], k.shape[1]):
        raise ValueError(f"window={window} of {q.shape[1]} queries and {k.shape[1]} keys")
    weights = last_query_weights(q, k, window)
    grouped = weights.reshape(weights.shape[0], k.shape[2], -1, *weights.shape[2:])
    scores = query_reduce(group_reduce(grouped, axis=2), axis=2)
    before = scores[..., : k.shape[1] - window]
    sums = jnp.cumsum(jnp.pad(before, ((0, 0), (0, 0), (kernel // 2 + 1, kernel // 2))), axis=-1)
    smooth = (sums[..., kernel:] - sums[..., :-kernel]) / kernel
    return jnp.pad(smooth, ((0, 0), (0, 0), (0, window)), constant_values=-jnp.inf)


def snapkv(
    q: jax.Array, k: jax.Array, budget: Budget, *, window: int = 64, kernel: int = 5, sinks: int = 0
) -> TokenSet:
    """The keys that SnapKV keeps: the best of each key head, the last `window`, and the first `sinks`.

    Args:
        q: as in `snapkv_scores`.
        k: likewise.
        budget: how many keys besides the window and the sinks, such as `TopK(960)`.
        window: likewise.
        kernel: likewise.
        sinks: so many first keys are kept in any case.

    Returns:
        A set [B, Hk, capacity]. Compress with `tokens.gather(k)` and `tokens.gather(v)`, attend with `tokens.attend`.

    Example:
        >>> from sparsejax.attention import Causal, TopK
        >>> q, k = (jax.random.normal(jax.random.key(i), (1, 32, h, 8)) for i, h in enumerate((4, 2)))
        >>> tokens = snapkv(q, k, TopK(4), window=8)
        >>> tokens.idx.shape, tokens.idx[0, 0, -8:].tolist()
        ((1, 2, 12), [24, 25, 26, 27, 28, 29, 30, 31])
        >>> out = tokens.attend(q[:, -1:], tokens.gather(k), tokens.gather(k), Causal(), q_positions=jnp.array([31]))
        >>> out.shape
        (1, 1, 4, 8)
    """
    scores = snapkv_scores(q, k, window=window, kernel=kernel)
    length = k.shape[1]
    forced = _forced(length, window, sinks)
    capacity = min(length, budget.width(length) + window + sinks)
    return top_tokens(scores, budget, forced=forced, capacity=capacity)


def ada_snapkv(
    q: jax.Array,
    k: jax.Array,
    keys: int,
    *,
    window: int = 64,
    kernel: int = 5,
    sinks: int = 0,
    floor: float = 0.2,
    capacity: int | None = None,
) -> TokenSet:
    """As `snapkv`, but the heads of a layer share their budget: heads that spread their attention keep more keys.

    Each key head keeps its best `floor * keys`, window and sinks counted (at least these); what is left of
    `Hk * keys` goes to the best of all heads together.

    Args:
        q: as in `snapkv_scores`.
        k: likewise.
        keys: how many keys a head keeps on average, window and sinks counted.
        window: likewise.
        kernel: likewise.
        sinks: likewise.
        floor: share of `keys` that each head is sure of.
        capacity: places of each head; None: as many as a head could need. Of a head that needs more the last keys fall
            out, and `overflow` tells.

    Returns:
        A set [B, Hk, capacity] that holds `Hk * keys` tokens of each example.

    Raises:
        ValueError: `keys` is less than window and sinks, or more than there are.
    """
    length, kv_heads = k.shape[1], k.shape[2]
    if not window + sinks <= keys <= length:
        raise ValueError(f"keys={keys} must be at least window + sinks = {window + sinks} and at most {length}")
    scores = snapkv_scores(q, k, window=window, kernel=kernel, group_reduce=jnp.max, query_reduce=jnp.max)
    scores = jnp.where(_forced(length, window, sinks), jnp.inf, scores)
    least = max(int(floor * keys), window + sinks)
    kept = _best(scores, least)
    shared = jnp.where(kept, -jnp.inf, scores).reshape(scores.shape[0], -1)
    kept = kept | _best(shared, kv_heads * (keys - least)).reshape(scores.shape)
    most = min(length, least + kv_heads * (keys - least))
    return tokens_where(kept, most if capacity is None else capacity)


def _forced(length: int, window: int, sinks: int) -> jax.Array:
    at = jnp.arange(length)
    return (at >= length - window) | (at < sinks)


def _best(scores: jax.Array, count: int) -> jax.Array:
    """The `count` highest along the last axis, as marks; ties go to the lower index."""
    _, at = jax.lax.top_k(scores, count)
    lead = jnp.ix_(*(jnp.arange(n) for n in scores.shape[:-1]))
    return jnp.zeros(scores.shape, bool).at[(*(axis[..., None] for axis in lead), at)].set(True)
