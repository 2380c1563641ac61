"""Groups of tokens that attend among themselves; a token may be in several groups, or in none."""

import dataclasses
import math

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenGroups:
    """For each example and head, groups of tokens of one size.

    Where groups overlap, a token's result is the mean of several softmaxes, which no mask can describe.

    Attributes:
        idx: int32 [B, H, groups, size], indices of tokens, rising within a group.
    """

    idx: jax.Array

    def gather(self, x: jax.Array) -> jax.Array:
        """[B, S, H, D] -> [B, H, groups, size, D]."""
        return jax.vmap(jax.vmap(lambda tokens, at: tokens[at], in_axes=(1, 0)))(x, self.idx)

    def memberships(self, length: int) -> jax.Array:
        """In how many groups each token is: int32 [B, H, length]."""
        flat = self.idx.reshape(*self.idx.shape[:2], -1)
        return jax.vmap(jax.vmap(lambda at: jnp.zeros(length, jnp.int32).at[at].add(1)))(flat)

    def scatter_mean(self, values: jax.Array, length: int) -> jax.Array:
        """The mean over a token's groups, 0 for a token in none: [B, H, groups, size, D] -> [B, S, H, D]."""
        flat = self.idx.reshape(*self.idx.shape[:2], -1)
        values = values.reshape(*flat.shape, values.shape[-1])

        def add(at, v):
            return jnp.zeros((length, v.shape[-1]), v.dtype).at[at].add(v)

        total = jax.vmap(jax.vmap(add))(flat, values)
        count = jnp.maximum(self.memberships(length), 1)[..., None]
        return jnp.swapaxes(total / count.astype(total.dtype), 1, 2)

    def attend(self, q, k, v, *, causal: bool = True, scale: float | None = None) -> jax.Array:
        """Attention inside each group, and the mean over groups.

        Args:
            q: [B, S, H, D].
            k: [B, S, H, D].
            v: [B, S, H, Dv].
            causal: compare the indices of tokens, so that none sees a later one.
            scale: factor on the logits; None: 1 / sqrt(D).

        Returns:
            [B, S, H, Dv]; 0 for a token in no group.
        """
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        wide = jnp.promote_types(q.dtype, jnp.float32)
        gq, gk, gv = (self.gather(x).astype(wide) for x in (q, k, v))
        logits = jnp.einsum("bhcqd,bhckd->bhcqk", gq, gk) * scale
        if causal:
            logits = jnp.where(self.idx[..., None, :] <= self.idx[..., :, None], logits, -jnp.inf)
        o = jnp.einsum("bhcqk,bhckd->bhcqd", jax.nn.softmax(logits, axis=-1), gv)
        return self.scatter_mean(o, q.shape[1]).astype(q.dtype)


def group_by_scores(scores: jax.Array, size: int) -> TokenGroups:
    """Each group takes the tokens that score highest for it (Routing Transformer, arXiv 2003.05997).

    Which tokens a group takes depends on the whole sequence: with `causal=True` no token attends to a later one, but a
    later token may still crowd an earlier one out of a group.

    Args:
        scores: float [B, H, S, groups], for example the similarity of normalised tokens with centroids.
        size: tokens in a group.

    Returns:
        The groups. Ties go to the earlier token.

    Example:
        >>> scores = jnp.array([[[[3.0, 0.0], [1.0, 2.0], [2.0, 5.0]]]])
        >>> group_by_scores(scores, 2).idx.tolist()
        [[[[0, 2], [1, 2]]]]
    """
    _, best = jax.lax.top_k(jnp.swapaxes(scores, 2, 3), size)
    return TokenGroups(jnp.sort(best, axis=-1).astype(jnp.int32))
