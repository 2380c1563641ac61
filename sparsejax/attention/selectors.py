"""Selectors: what looks at queries and keys and says which blocks attention visits."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from sparsejax.attention.block_mask import BlockMask
from sparsejax.attention.budgets import Budget, Forced
from sparsejax.attention.choose import from_scores
from sparsejax.attention.mask import Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a selector may know besides queries and keys; every field is optional.

    Attributes:
        q_positions: int [Sq] or [B, Sq].
        kv_positions: int [Sk] or [B, Sk].
        kv_lengths: int [B], keys in use.
        new_keys: [B, T, Hk, D], those of the keys that are new since the state was made.
        lse: [B, H, Sq], of an earlier pass.
        step: int scalar, of a denoising or decoding loop.
        layer: which layer asks.
    """

    q_positions: Any = None
    kv_positions: Any = None
    kv_lengths: Any = None
    new_keys: Any = None
    lse: Any = None
    step: Any = None
    layer: int | None = dataclasses.field(default=None, metadata={"static": True})


_NO_CONTEXT = Context()
_NOTHING = Forced()


class Selector(Protocol):
    """Chooses blocks. A frozen dataclass or an `nnx.Module` with this call; `SparseAttention` takes one.

    A selector that keeps something between calls (bounds of pages, a pattern that is used again) gets it as `state` and
    returns the new one; None stands for the first call. If it has a method `init_state(batch, length, kv_heads,
    head_dim, dtype)`, `SparseAttention` makes a state with its cache and passes it on from step to step of decoding.
    `aux` is whatever is worth looking at, such as the scores.
    """

    def __call__(
        self, q: jax.Array, k: jax.Array, *, base: Mask | None = None, state=None, context: Context = _NO_CONTEXT
    ) -> tuple[BlockMask, Any, Any]:
        """Chooses blocks for queries [B, Sq, H, D] and keys [B, Sk, Hk, D]: (mask, state, aux)."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoreSelector:
    """Blocks by a score function and a budget.

    Attributes:
        budget: how many blocks each row gets.
        score: `score(q, k, context) -> [B, H or Hk, nq, nk]`; `nq` and `nk` for the blocks below.
        bq: queries in a block.
        bk: keys in a block.
        forced: blocks that are visited besides.
        group_reduce: joins the scores of the query heads of one key head, `group_reduce(scores, axis=...)`, such as
            `jnp.mean` or `jnp.max`, so that they share their blocks; None: every query head chooses on its own.

    Example:
        >>> from sparsejax.attention import Causal, TopK, pooled_scores
        >>> q = k = jax.random.normal(jax.random.key(0), (1, 64, 2, 8))
        >>> select = ScoreSelector(TopK(1), pooled_scores(16, 16), bq=16, bk=16, forced=Forced(diagonal=True))
        >>> mask, _, scores = select(q, k, base=Causal())
        >>> mask.lists.n_tot[0, 0].tolist(), scores.shape
        ([1, 2, 2, 2], (1, 2, 4, 4))
    """

    budget: Budget
    score: Callable = dataclasses.field(metadata={"static": True})
    bq: int = dataclasses.field(default=128, metadata={"static": True})
    bk: int = dataclasses.field(default=128, metadata={"static": True})
    forced: Forced = dataclasses.field(default=_NOTHING, metadata={"static": True})
    group_reduce: Callable | None = dataclasses.field(default=None, metadata={"static": True})

    def __call__(self, q, k, *, base: Mask | None = None, state=None, context: Context = _NO_CONTEXT):
        """Chooses blocks; `aux` are the scores, `state` passes through."""
        scores = jax.lax.stop_gradient(self.score(q, k, context))
        if self.group_reduce is not None and scores.shape[1] > k.shape[2]:
            grouped = scores.reshape(scores.shape[0], k.shape[2], -1, *scores.shape[2:])
            scores = self.group_reduce(grouped, axis=2)
        mask = from_scores(
            scores,
            self.budget,
            base,
            q_len=q.shape[1],
            kv_len=k.shape[1],
            bq=self.bq,
            bk=self.bk,
            q_positions=context.q_positions,
            kv_positions=context.kv_positions,
            forced=self.forced,
        )
        return mask, state, scores


@dataclasses.dataclass(frozen=True)
class _PooledScores:
    bq: int
    bk: int

    def __call__(self, q, k, context):
        pooled_q, pooled_k = block_mean(q, self.bq), block_mean(k, self.bk)
        pooled_k = jnp.repeat(pooled_k, q.shape[2] // k.shape[2], axis=2)
        return jnp.einsum("bihd,bjhd->bhij", pooled_q, pooled_k) / math.sqrt(q.shape[-1])


def pooled_scores(bq: int = 128, bk: int = 128) -> Callable:
    """Scores for `ScoreSelector`: mean queries times mean keys (MInference's block-sparse heads, arXiv 2407.02490).

    Args:
        bq: queries in a block.
        bk: keys in a block.

    Returns:
        A score function; two with the same blocks are equal, so nothing compiles anew.
    """
    return _PooledScores(bq, bk)


def block_mean(x: jax.Array, block: int) -> jax.Array:
    """Mean over blocks of tokens, of the last block over those that there are: [B, S, H, D] -> float32 [B, n, H, D]."""
    length = x.shape[1]
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -length % block), (0, 0), (0, 0)))
    total = padded.reshape(x.shape[0], -1, block, *x.shape[2:]).sum(2)
    return total / jnp.minimum(block, length - block * jnp.arange(total.shape[1]))[:, None, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reuse:
    """Chooses blocks in some steps and uses them again in the others (SparseD, arXiv 2509.24014).

    Attributes:
        selector: what chooses; without a state of its own.
        every: steps from one choice to the next; None: only the first.

    Example:
        >>> from sparsejax.attention import TopK, pooled_scores
        >>> select = Reuse(ScoreSelector(TopK(1), pooled_scores(8, 8), bq=8, bk=8), every=10)
        >>> q = k = jax.random.normal(jax.random.key(0), (1, 16, 1, 4))
        >>> mask, state, _ = select(q, k)
        >>> same, state, _ = select(-q, k, state=state)
        >>> bool((same.lists.idx == mask.lists.idx).all()), int(state[0])
        (True, 2)
    """

    selector: Any
    every: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __call__(self, q, k, *, base: Mask | None = None, state=None, context: Context = _NO_CONTEXT):
        """Chooses or repeats; `state` is (steps so far, the mask)."""

        def choose():
            return self.selector(q, k, base=base, context=context)[0]

        if state is None:
            mask = choose()
            return mask, (jnp.ones((), jnp.int32), mask), None
        step, old = state
        due = jnp.zeros((), bool) if self.every is None else step % self.every == 0
        mask = jax.lax.cond(due, choose, lambda: jax.tree.map(jnp.asarray, old))
        return mask, (step + 1, mask), None


def stats_grid(mask: BlockMask, stats: jax.Array) -> jax.Array:
    """Block statistics of `sparse_attention` as a grid of tiles.

    Args:
        mask: the mask of the call.
        stats: [B, H, nq, W], `Aux.block_stats`.

    Returns:
        [B, H, nq, nk], 0 where a tile was not visited.

    Example:
        >>> from sparsejax.attention import Causal, compile_mask, sparse_attention
        >>> q = k = v = jnp.ones((1, 4, 1, 8))
        >>> mask = compile_mask(Causal(), 4, 4, bq=2, bk=2)
        >>> _, aux = sparse_attention(q, k, v, mask, block_stats="sum")
        >>> stats_grid(mask, aux.block_stats)[0, 0].round(2).tolist()
        [[2.0, 0.0], [1.1699999570846558, 0.8299999833106995]]
    """
    lists = mask.lists
    batch, heads = stats.shape[:2]
    repeat = heads // lists.idx.shape[1]
    idx, total = (jnp.repeat(jnp.asarray(a), repeat, axis=1) for a in (lists.idx, lists.n_tot))
    idx = jnp.broadcast_to(idx, (batch, *idx.shape[1:]))
    kept = jnp.broadcast_to(jnp.arange(lists.idx.shape[-1]) < total[..., None], idx.shape)
    lead = jnp.ogrid[:batch, :heads, : lists.nq]
    grid = jnp.zeros((batch, heads, lists.nq, lists.nk), stats.dtype)
    return grid.at[(*(axis[..., None] for axis in lead), idx)].add(jnp.where(kept, stats, 0))
