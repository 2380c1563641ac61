"""Chosen tokens, in a fixed number of places: pruned tokens, compressed caches, subsampled sources."""

import dataclasses

import jax
import jax.numpy as jnp

from sparsejax.attention.attend import sparse_attention
from sparsejax.attention.data_patterns import Tokens
from sparsejax.attention.mask import Mask
from sparsejax.attention.patterns import Full


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenSet:
    """Some tokens of each example (or of each example and key head), in their order, in `capacity` places.

    Attributes:
        idx: int32 [B, capacity] or [B, Hk, capacity], indices of tokens, rising; from `count` on the last repeats.
        count: int32 [B] or [B, Hk], how many places hold a token.
        wanted: int32 like `count`, how many tokens were chosen; more than `count` where the places did not suffice.

    Example:
        >>> tokens = tokens_where(jnp.array([[True, False, True, True]]), capacity=3)
        >>> tokens.idx.tolist(), tokens.count.tolist()
        ([[0, 2, 3]], [3])
        >>> tokens.gather(jnp.array([[10.0, 11.0, 12.0, 13.0]])).tolist()
        [[10.0, 12.0, 13.0]]
    """

    idx: jax.Array
    count: jax.Array
    wanted: jax.Array

    @property
    def capacity(self) -> int:
        """Number of places."""
        return self.idx.shape[-1]

    @property
    def valid(self) -> jax.Array:
        """Which places hold a token: bool, as `idx`."""
        return jnp.arange(self.capacity) < self.count[..., None]

    @property
    def overflow(self) -> jax.Array:
        """Tokens that were chosen and have no place: int32 scalar."""
        return jnp.sum(self.wanted - self.count)

    def gather(self, x: jax.Array) -> jax.Array:
        """The chosen tokens.

        Args:
            x: [B, S, ...], or [B, S, Hk, ...] where the set has heads.

        Returns:
            [B, capacity, ...], or [B, capacity, Hk, ...]; empty places repeat the last token, or token 0.
        """
        if self.idx.ndim == 2:
            return jax.vmap(lambda tokens, at: tokens[at])(x, self.idx)
        return jax.vmap(jax.vmap(lambda tokens, at: tokens[at], in_axes=(1, 0), out_axes=1))(x, self.idx)

    def scatter(self, values: jax.Array, onto: jax.Array) -> jax.Array:
        """Writes the places back to where their tokens stood.

        Args:
            values: [B, capacity, ...]; empty places are not written.
            onto: [B, S, ...], what the other tokens keep.

        Returns:
            `onto` with the chosen tokens replaced.
        """
        if self.idx.ndim != 2:
            raise ValueError("scatter is for sets [B, capacity]; this one differs by head")
        at = jnp.where(self.valid, self.idx, onto.shape[1])
        return jax.vmap(lambda x, where, v: x.at[where].set(v, mode="drop"))(onto, at, values.astype(onto.dtype))

    def mask(self) -> Mask:
        """Keys that hold a token. With `kv_positions=tokens.idx`, masks by position go on to mean what they mean."""
        if self.idx.ndim != 2:
            raise ValueError("mask is for sets [B, capacity]; for one that differs by head, see `attend`")
        return Tokens(kv=self.valid)

    def attend(self, q, k, v, mask: Mask | None = None, *, q_positions=None, **options):
        """Attention to the chosen tokens, whose positions are their indices in the sequence.

        Args:
            q: [B, Sq, H, D].
            k: [B, capacity, Hk, D], gathered (a cache that was compressed once serves many calls); a set with heads
                needs its own Hk.
            v: [B, capacity, Hk, Dv], likewise.
            mask: what may be seen by position, such as `Causal()`; without arrays of its own. None: all that is there.
            q_positions: int [Sq] or [B, Sq]; None counts from 0.
            **options: of `sparse_attention`.

        Returns:
            [B, Sq, H, Dv]; with `return_lse=True` also an `Aux` whose `lse` is [B, H, Sq].

        Raises:
            ValueError: the mask has arrays, or the heads do not fit.
        """
        mask = Full() if mask is None else mask
        if any(not name.startswith("scalar_") for name in mask.arrays):
            raise ValueError(f"{mask}: attend takes masks by position, without arrays for each token, example or head")
        q_positions = jnp.arange(q.shape[1]) if q_positions is None else jnp.asarray(q_positions)
        options["bq"] = min(options.get("bq") or 128, q.shape[1])
        if self.idx.ndim == 2:
            seen = mask & self.mask()
            return sparse_attention(q, k, v, seen, q_positions=q_positions, kv_positions=self.idx, **options)
        batch, sets = self.idx.shape[:2]
        if k.shape[2] != sets or q.shape[2] % sets:
            raise ValueError(
                f"a set of {sets} heads needs keys with as many, not {k.shape[2]}, for {q.shape[2]} queries'"
            )
        # Heads as examples: positions may differ between examples only.
        grouped = jnp.moveaxis(q.reshape(*q.shape[:2], sets, -1, q.shape[3]), 2, 1).reshape(
            batch * sets, q.shape[1], -1, q.shape[3]
        )
        k, v = (jnp.swapaxes(x, 1, 2).reshape(batch * sets, x.shape[1], 1, x.shape[3]) for x in (k, v))
        if q_positions.ndim == 2:
            q_positions = jnp.repeat(jnp.broadcast_to(q_positions, (batch, q.shape[1])), sets, axis=0)
        out = sparse_attention(
            grouped,
            k,
            v,
            mask & Tokens(kv=self.valid.reshape(batch * sets, -1)),
            q_positions=q_positions,
            kv_positions=self.idx.reshape(batch * sets, -1),
            **options,
        )
        o, aux = out if isinstance(out, tuple) else (out, None)
        o = jnp.moveaxis(o.reshape(batch, sets, *o.shape[1:]), 1, 2).reshape(*q.shape[:3], -1)
        if aux is None:
            return o
        heads = (batch, q.shape[2])
        return o, type(aux)(*(None if part is None else part.reshape(*heads, *part.shape[2:]) for part in aux))


def tokens_where(kept: jax.Array, capacity: int) -> TokenSet:
    """The tokens that are True; of more than `capacity`, the first ones.

    Args:
        kept: bool [B, S] or [B, Hk, S].
        capacity: number of places, static.

    Returns:
        The set.
    """
    length = kept.shape[-1]
    order = jnp.sort(jnp.where(kept, jnp.arange(length, dtype=jnp.int32), length), axis=-1)[..., :capacity]
    order = jnp.pad(order, [(0, 0)] * (order.ndim - 1) + [(0, capacity - order.shape[-1])], constant_values=length)
    wanted = jnp.sum(kept, axis=-1, dtype=jnp.int32)
    count = jnp.minimum(wanted, capacity)
    last = jnp.minimum(jnp.arange(capacity), jnp.maximum(count, 1)[..., None] - 1)
    idx = jnp.take_along_axis(order, last, axis=-1)
    return TokenSet(jnp.where(count[..., None] > 0, idx, 0).astype(jnp.int32), count, wanted)


def top_tokens(scores: jax.Array, budget, *, forced: jax.Array | None = None, capacity: int | None = None) -> TokenSet:
    """The tokens of the highest scores.

    Args:
        scores: float [B, S] or [B, Hk, S]; -inf and NaN are never chosen. Ties go to the earlier token.
        budget: how many, see `sparsejax.attention.budgets`.
        forced: bool, as `scores`: tokens that are taken besides (sinks, the last tokens, text).
        capacity: number of places; None: the budget's bound, and as many as `forced` could add.

    Returns:
        The set. SnapKV (arXiv 2404.14469) is the last queries' attention, pooled, under `TopK`, its window forced.

    Example:
        >>> from sparsejax.attention import TopK
        >>> top_tokens(jnp.array([[0.1, 0.9, 0.5, 0.9]]), TopK(2)).idx.tolist()
        [[1, 3]]
    """
    length = scores.shape[-1]
    must = jnp.zeros(scores.shape, bool) if forced is None else jnp.broadcast_to(forced, scores.shape)
    free = jnp.where(must | jnp.isnan(scores), -jnp.inf, jnp.minimum(scores, jnp.finfo(scores.dtype).max))
    wanted = budget.count(free)
    ranked = budget.rank(free) if hasattr(budget, "rank") else free
    width = max(1, budget.width(length))
    _, best = jax.lax.top_k(ranked, width)
    at = jnp.where(jnp.arange(width) < wanted[..., None], best, length)
    lead = jnp.ix_(*(jnp.arange(n) for n in scores.shape[:-1]))
    kept = must.at[(*(axis[..., None] for axis in lead), at)].set(True, mode="drop")
    if capacity is None:
        capacity = length if forced is not None else width
    tokens = tokens_where(kept, capacity)
    return dataclasses.replace(tokens, wanted=wanted + jnp.sum(must, axis=-1, dtype=jnp.int32))


def elbow(scores: jax.Array) -> jax.Array:
    """Tokens above the elbow of the sorted scores: the point farthest from the line between the first and the last.

    The rule by which CoreMatching (arXiv 2505.19235) keeps core tokens. Where all scores are equal there is no elbow,
    and all tokens are kept.

    Args:
        scores: float [..., S], finite.

    Returns:
        bool [..., S]. Scaling the scores by a positive number changes nothing.

    Example:
        >>> elbow(jnp.array([9.0, 1.0, 8.0, 1.5, 0.5])).tolist()
        [True, False, True, False, False]
    """
    ranked = -jnp.sort(-scores, axis=-1)
    steps = ranked.shape[-1] - 1
    along = jnp.arange(steps + 1) / max(1, steps)
    first, last = ranked[..., :1], ranked[..., -1:]
    # The distance to the chord is the difference in height but for a factor that all points share.
    drop = jnp.abs(ranked - (first + (last - first) * along))
    value = jnp.take_along_axis(ranked, jnp.argmax(drop, axis=-1, keepdims=True), axis=-1)
    return (scores > value) | (first == last)
