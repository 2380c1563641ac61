"""Vertical-slash attention: a few keys for every query, and a few distances from every query.

MInference: Jiang et al., "MInference 1.0", NeurIPS 2024, arXiv 2407.02490. With `Coverage` budgets it is the variant of
FlexPrefill (arXiv 2502.20766) that the Sparse Frontier (arXiv 2504.17768) compares.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sparsejax.attention.attend import sparse_attention
from sparsejax.attention.block_mask import BlockMask
from sparsejax.attention.budgets import Budget
from sparsejax.attention.choose import from_dense_blocks
from sparsejax.attention.data_patterns import Tokens
from sparsejax.attention.last_queries import last_query_weights, slash_sums
from sparsejax.attention.mask import Mask
from sparsejax.attention.merge import merge_states
from sparsejax.attention.patterns import Causal
from sparsejax.attention.selectors import _NO_CONTEXT, Context
from sparsejax.attention.token_sets import TokenSet, top_tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VerticalSlash:
    """Selector for prefill: the keys and the distances at which the last queries look most.

    A key's score is the sum of the last queries' attention weights on it; a distance's score is the sum along its
    diagonal. Called as a selector, it visits every tile that holds a chosen key or distance. A lone key costs a whole
    tile then; `attend` gathers the chosen keys instead, at the price of a second pass.

    Attributes:
        vertical: how many keys, such as `TopK(1000)`, or by mass, `Coverage(0.9, min_blocks=512)`.
        slash: how many distances, likewise.
        last: how many of the last queries are asked.
        sinks: so many first keys are chosen in any case.
        near: so many smallest distances are chosen in any case.
        bq: queries in a tile.
        bk: keys in a tile.

    Example:
        >>> from sparsejax.attention import TopK
        >>> q, k = (jax.random.normal(jax.random.key(i), (1, 64, h, 8)) for i, h in enumerate((4, 2)))
        >>> select = VerticalSlash(TopK(2), TopK(1), last=16, sinks=1, near=4, bq=8, bk=8)
        >>> mask, _, (keys, distances) = select(q, k)
        >>> mask.lists.idx.shape[:3], keys.idx.shape, distances.idx[0, 0, :4].tolist()
        ((1, 4, 8), (1, 4, 3), [0, 1, 2, 3])
        >>> select.attend(q, k, k).shape
        (1, 64, 4, 8)
    """

    vertical: Budget
    slash: Budget
    last: int = dataclasses.field(default=64, metadata={"static": True})
    sinks: int = dataclasses.field(default=30, metadata={"static": True})
    near: int = dataclasses.field(default=100, metadata={"static": True})
    bq: int = dataclasses.field(default=128, metadata={"static": True})
    bk: int = dataclasses.field(default=128, metadata={"static": True})

    def __call__(self, q, k, *, base: Mask | None = None, state=None, context: Context = _NO_CONTEXT):
        """Chooses tiles for q [B, S, H, D] and k [B, S, Hk, D]; `aux` are the keys and the distances, as TokenSets.

        Args:
            q: the queries.
            k: the keys.
            base: what may be seen besides no key after the query; None: everything.
            state: passes through.
            context: positions must be left out: distances are counted by index.

        Returns:
            The mask, the state, and two TokenSets [B, H, ...].
        """
        if context.q_positions is not None or context.kv_positions is not None:
            raise ValueError("VerticalSlash counts distances by index: leave positions out")
        keys, distances = self.choose(q, k)
        grid = self._slash_tiles(distances, q.shape[1]) | self._key_tiles(keys, q.shape[1])
        return self._mask(grid, Causal() if base is None else Causal() & base, q.shape[1]), state, (keys, distances)

    def choose(self, q: jax.Array, k: jax.Array) -> tuple[TokenSet, TokenSet]:
        """The chosen keys and the chosen distances of each query head, TokenSets [B, H, ...]."""
        if q.shape[1] != k.shape[1]:
            raise ValueError(f"VerticalSlash is for prefill, as many queries as keys: {q.shape[1]} and {k.shape[1]}")
        weights = last_query_weights(q, k, self.last)
        index = jnp.arange(k.shape[1])
        chosen = []
        for scores, budget, forced in (
            (jnp.mean(weights, axis=2), self.vertical, self.sinks),
            (slash_sums(weights) / weights.shape[2], self.slash, self.near),
        ):
            places = min(k.shape[1], budget.width(k.shape[1]) + forced)
            chosen.append(top_tokens(scores, budget, forced=index < forced, capacity=places))
        return chosen[0], chosen[1]

    def attend(self, q, k, v, *, return_lse: bool = False, **options):
        """Attention over the tiles of the chosen distances, joined with attention over the chosen keys.

        A pair that is in both is counted once. Gradients reach q, k and v, not the choice.

        Args:
            q: [B, S, H, D].
            k: [B, S, Hk, D].
            v: [B, S, Hk, Dv].
            return_lse: also return the `lse` [B, H, S].
            **options: of `sparse_attention`, such as `scale` or `implementation`.

        Returns:
            [B, S, H, Dv].
        """
        batch, length, heads, _ = q.shape
        keys, distances = self.choose(q, k)
        k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
        columns = keys.attend(q, keys.gather(k), keys.gather(v), Causal(), bk=self.bk, return_lse=True, **options)
        # Heads as examples: which keys are left to the columns differs between them.
        folded = [jnp.swapaxes(x, 1, 2).reshape(batch * heads, length, 1, -1) for x in (q, k, v)]
        left = jnp.ones((batch, heads, length), bool)
        at = jnp.where(keys.valid, keys.idx, length)
        left = jax.vmap(jax.vmap(lambda marks, where: marks.at[where].set(False, mode="drop")))(left, at)
        grid = self._slash_tiles(distances, length)
        base = Causal() & Tokens(kv=left.reshape(batch * heads, length))
        mask = self._mask(grid.reshape(batch * heads, 1, *grid.shape[2:]), base, length)
        o, aux = sparse_attention(*folded, mask, return_lse=True, **options)
        o = jnp.swapaxes(o.reshape(batch, heads, length, -1), 1, 2)
        o, lse = merge_states([(o, aux.lse.reshape(batch, heads, length)), (columns[0], columns[1].lse)])
        return (o, lse) if return_lse else o

    def _mask(self, grid, base: Mask, length: int) -> BlockMask:
        return from_dense_blocks(grid, base, q_len=length, kv_len=length, bq=self.bq, bk=self.bk)

    def _slash_tiles(self, distances: TokenSet, length: int) -> jax.Array:
        """bool [B, H, nq, nk]: tiles that hold a pair at one of the distances."""
        marks = _marks(distances, length)
        before = jnp.cumsum(jnp.pad(marks, ((0, 0), (0, 0), (1, 0))), axis=-1)
        q_low, k_low = (jnp.arange(0, length, block) for block in (self.bq, self.bk))
        q_high, k_high = (jnp.minimum(low + b, length) - 1 for low, b in ((q_low, self.bq), (k_low, self.bk)))
        least = jnp.clip(q_low[:, None] - k_high, 0, length)
        most = jnp.clip(q_high[:, None] - k_low, -1, length - 1)
        return before[..., jnp.maximum(most + 1, least)] > before[..., least]

    def _key_tiles(self, keys: TokenSet, length: int) -> jax.Array:
        """bool [B, H, 1, nk]: blocks that hold one of the keys."""
        marks = jnp.pad(_marks(keys, length), ((0, 0), (0, 0), (0, -length % self.bk)))
        return (marks.reshape(*marks.shape[:2], math.ceil(length / self.bk), self.bk).max(-1) > 0)[:, :, None]


def _marks(tokens: TokenSet, length: int) -> jax.Array:
    """int32 [B, H, length]: 1 for the chosen."""
    at = jnp.where(tokens.valid, tokens.idx, length)
    return jax.vmap(jax.vmap(lambda where: jnp.zeros(length, jnp.int32).at[where].set(1, mode="drop")))(at)
