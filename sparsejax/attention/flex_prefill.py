"""FlexPrefill: heads whose pooled scores are good guesses choose single tiles, the others columns and diagonals.

Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference", ICLR 2025,
arXiv 2502.20766; rules as in the authors' code.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sparsejax.attention.choose import from_dense_blocks
from sparsejax.attention.last_queries import last_query_weights, slash_sums
from sparsejax.attention.mask import Mask
from sparsejax.attention.patterns import Causal
from sparsejax.attention.selectors import _NO_CONTEXT, Context, block_mean, pooled_scores
from sparsejax.masks.select import select_top


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlexPrefill:
    """Selector for prefill with a share of attention to reach, and no number of blocks to set.

    Every head asks its last `block` queries. Their attention, summed over blocks of keys and over blocks of distances,
    gives the columns and diagonals of tiles that are visited: as many as hold the share `gamma` (counted in tokens),
    always the first column and the main diagonal. Where the mean query's softmax over mean keys is close to that sum
    (root of the Jensen-Shannon divergence below `tau`), the head keeps only `min_blocks` of each and adds the best
    tiles of the whole map until their pooled softmax holds the share `gamma`.

    Attributes:
        gamma: share of attention, 0 < gamma <= 1; may be traced (0.9 in the paper).
        tau: threshold of the divergence; 0: never tile by tile; may be traced (0.1 in the paper).
        block: tokens in a block, of queries and keys alike.
        min_blocks: least number of columns and of diagonals.
        max_blocks: greatest number of columns and of diagonals; None: no bound.

    Example:
        >>> q, k = (jax.random.normal(jax.random.key(i), (1, 64, h, 8)) for i, h in enumerate((4, 2)))
        >>> mask, _, divergence = FlexPrefill(gamma=0.5, block=8)(q, k)
        >>> mask.lists.idx.shape[:3], divergence.shape
        ((1, 4, 8), (1, 4))
    """

    gamma: float | jax.Array = 0.9
    tau: float | jax.Array = 0.1
    block: int = dataclasses.field(default=128, metadata={"static": True})
    min_blocks: int = dataclasses.field(default=1, metadata={"static": True})
    max_blocks: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __call__(self, q, k, *, base: Mask | None = None, state=None, context: Context = _NO_CONTEXT):
        """Chooses tiles for q [B, S, H, D] and k [B, S, Hk, D]; `aux` is the divergence of each head [B, H].

        Args:
            q: the queries.
            k: the keys.
            base: what may be seen besides no key after the query; None: everything.
            state: passes through.
            context: positions must be left out: distances are counted by index.

        Returns:
            The mask, the state and the divergence. Lists are nk wide, for the number of tiles is not known.
        """
        if q.shape[1] != k.shape[1] or context.q_positions is not None or context.kv_positions is not None:
            raise ValueError("FlexPrefill is for prefill: as many queries as keys, and positions left out")
        length = q.shape[1]
        grid, divergence = self._tiles(q, k)
        base = Causal() if base is None else Causal() & base
        mask = from_dense_blocks(grid, base, q_len=length, kv_len=length, bq=self.block, bk=self.block)
        return mask, state, divergence

    def _tiles(self, q, k):
        blocks = math.ceil(q.shape[1] / self.block)
        weights = last_query_weights(q, k, self.block)
        shares = jnp.mean(weights, axis=2), slash_sums(weights) / weights.shape[2]
        columns, diagonals = (self._pooled(share) for share in shares)
        q, k = (jax.lax.stop_gradient(x) for x in (q, k))
        pooled_k = jnp.repeat(block_mean(k, self.block), q.shape[2] // k.shape[2], axis=2)
        mean_q = jnp.mean(q[:, -self.block :].astype(jnp.float32), axis=1)
        guess = jax.nn.softmax(jnp.einsum("bhd,bjhd->bhj", mean_q, pooled_k) / math.sqrt(q.shape[-1]), axis=-1)
        divergence = _root_divergence(guess, columns)
        by_tile = divergence < self.tau

        kept = []
        for share, pooled in zip(shares, (columns, diagonals), strict=True):
            wanted = jnp.where(by_tile, self.min_blocks, self._count(share))
            # The first column and the main diagonal come first whatever their share.
            kept.append(_best(pooled.at[..., 0].set(jnp.inf), wanted))
        row, column = jnp.arange(blocks)[:, None], jnp.arange(blocks)
        causal = column <= row
        lines = kept[0][:, :, None] | kept[1][..., jnp.maximum(row - column, 0)]

        logits = jnp.where(causal, pooled_scores(self.block, self.block)(q, k, None), -jnp.inf)
        share = jax.nn.softmax(logits, axis=-1).reshape(*logits.shape[:2], -1)
        best = _best(share, _held(share, self.gamma * blocks)).reshape(logits.shape)
        return (lines | (best & by_tile[..., None, None])) & causal, divergence

    def _pooled(self, share: jax.Array) -> jax.Array:
        padded = jnp.pad(share, ((0, 0), (0, 0), (0, -share.shape[-1] % self.block)))
        return padded.reshape(*share.shape[:2], -1, self.block).sum(-1)

    def _count(self, share: jax.Array) -> jax.Array:
        """Blocks that as many tokens fill as hold the share `gamma`, best tokens first; int32 [B, H]."""
        tokens = _held(share, self.gamma) + 1
        blocks = math.ceil(share.shape[-1] / self.block)
        most = blocks if self.max_blocks is None else min(self.max_blocks, blocks)
        return jnp.clip(tokens // self.block + 1, min(self.min_blocks, most), most)


def _held(share: jax.Array, most: jax.Array) -> jax.Array:
    """How many of the best entries of the last axis hold no more than `most` together."""
    return jnp.sum(jnp.cumsum(-jnp.sort(-share, axis=-1), axis=-1) <= most, axis=-1)


def _best(share: jax.Array, count: jax.Array) -> jax.Array:
    """Marks the `count` [B, H] best entries of the last axis, at ties the first ones."""
    return jax.vmap(jax.vmap(select_top))(share, count)


def _root_divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """Square root of the Jensen-Shannon divergence along the last axis, in nats."""
    middle = (p + q) / 2
    terms = [jnp.where(x > 0, x * jnp.log(jnp.where(x > 0, x, 1) / jnp.where(x > 0, middle, 1)), 0) for x in (p, q)]
    return jnp.sqrt(jnp.maximum(jnp.sum(terms[0] + terms[1], axis=-1) / 2, 0))
