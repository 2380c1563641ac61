"""Quest: decoding that reads only the pages of the cache whose keys could matter for the query at hand.

Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", ICML 2024, arXiv 2406.10774.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sparsejax.attention.block_mask import BlockMask
from sparsejax.attention.budgets import Budget, Forced, TopK
from sparsejax.attention.choose import from_scores
from sparsejax.attention.mask import Mask
from sparsejax.attention.patterns import Causal
from sparsejax.attention.selectors import _NO_CONTEXT, Context


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageBounds:
    """The least and the greatest value of each channel of the keys in each page.

    Attributes:
        low: [B, pages, Hk, D]; +inf in pages without keys.
        high: [B, pages, Hk, D]; -inf in pages without keys.
        lengths: int32 [B], keys so far.
        page_size: keys in a page.
    """

    low: jax.Array
    high: jax.Array
    lengths: jax.Array
    page_size: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, batch: int, pages: int, kv_heads: int, head_dim: int, page_size: int, dtype=jnp.float32):
        """Bounds of a cache that holds nothing yet."""
        shape = (batch, pages, kv_heads, head_dim)
        low, high = jnp.full(shape, jnp.inf, dtype), jnp.full(shape, -jnp.inf, dtype)
        return cls(low, high, jnp.zeros(batch, jnp.int32), page_size)

    @classmethod
    def of_cache(cls, k: jax.Array, lengths: jax.Array, page_size: int):
        """Bounds of a filled cache: k [B, Sk, Hk, D], of which the first `lengths` [B] keys are in use."""
        empty = cls.empty(k.shape[0], math.ceil(k.shape[1] / page_size), *k.shape[2:], page_size, k.dtype)
        return dataclasses.replace(empty.append(k, lengths), lengths=jnp.asarray(lengths, jnp.int32))

    def append(self, k: jax.Array, counts: jax.Array | None = None) -> "PageBounds":
        """The bounds after more keys.

        Args:
            k: [B, T, Hk, D], the next keys of each example.
            counts: int [B], how many of the T are real; None: all.

        Returns:
            The new bounds; keys past the last page are left out.
        """
        step = jnp.arange(k.shape[1], dtype=jnp.int32)
        counts = jnp.full(k.shape[0], k.shape[1], jnp.int32) if counts is None else jnp.asarray(counts, jnp.int32)
        page = (self.lengths[:, None] + step) // self.page_size
        page = jnp.where(step < counts[:, None], page, self.low.shape[1])
        low = jax.vmap(lambda bound, at, x: bound.at[at].min(x, mode="drop"))(self.low, page, k)
        high = jax.vmap(lambda bound, at, x: bound.at[at].max(x, mode="drop"))(self.high, page, k)
        return PageBounds(low, high, self.lengths + counts, self.page_size)


def quest_scores(q: jax.Array, bounds: PageBounds) -> jax.Array:
    """An upper bound of q . k over the keys of each page: `sum_d max(q_d low_d, q_d high_d)`, summed over a group.

    Args:
        q: [B, Sq, H, D]; bounds of several queries are summed, too.
        bounds: of the cache, Hk heads.

    Returns:
        float32 [B, Hk, pages]; -inf for pages without keys.

    Example:
        >>> k = jnp.array([[[[1.0, 0.0]], [[0.0, 2.0]], [[-1.0, 1.0]]]])
        >>> bounds = PageBounds.of_cache(k, jnp.array([3]), page_size=2)
        >>> quest_scores(jnp.array([[[[1.0, 1.0]]]]), bounds).tolist()
        [[[3.0, 0.0]]]
    """
    batch, queries, heads, dim = q.shape
    kv_heads = bounds.low.shape[2]
    grouped = q.astype(jnp.float32).reshape(batch, queries, kv_heads, heads // kv_heads, dim)
    used = bounds.low[..., :1] <= bounds.high[..., :1]
    # max(q low, q high) is q high where q is positive and q low where it is not, so sums over queries come first.
    above, below = (jnp.sum(part(grouped, 0), axis=(1, 3))[:, None] for part in (jnp.maximum, jnp.minimum))
    products = above * bounds.high.astype(jnp.float32) + below * bounds.low.astype(jnp.float32)
    scores = jnp.sum(jnp.where(used, products, 0), axis=-1)
    return jnp.where(jnp.swapaxes(used[..., 0], 1, 2), jnp.swapaxes(scores, 1, 2), -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quest:
    """Selector for decoding: the pages of the highest bound, and always the newest one.

    The original skips the first two layers, which stay dense, and keeps at least three pages.

    Attributes:
        budget: pages besides the newest; as a share or a number, see `sparsejax.attention.budgets`.
        page_size: keys in a page (16 in the paper).

    Example:
        >>> k = jax.random.normal(jax.random.key(0), (1, 64, 2, 8))
        >>> state = PageBounds.of_cache(k, jnp.array([50]), page_size=8)
        >>> q = jax.random.normal(jax.random.key(1), (1, 1, 4, 8))
        >>> mask, state, scores = Quest(TopK(2), page_size=8)(q, k, state=state)
        >>> mask.lists.idx.shape, mask.lists.n_tot.ravel().tolist()
        ((1, 2, 1, 3), [3, 3])
    """

    budget: Budget
    page_size: int = dataclasses.field(default=16, metadata={"static": True})

    def init_state(self, batch: int, length: int, kv_heads: int, head_dim: int, dtype=jnp.float32) -> PageBounds:
        """The state of an empty cache with room for `length` keys."""
        return PageBounds.empty(batch, math.ceil(length / self.page_size), kv_heads, head_dim, self.page_size, dtype)

    def __call__(self, q, k, *, base: Mask | None = None, state=None, context: Context = _NO_CONTEXT):
        """Chooses pages of a cache for its last Sq tokens.

        Args:
            q: [B, Sq, H, D], the queries of the last tokens; they share their pages.
            k: [B, Sk, Hk, D], the cache, new keys included; only its length is read if there is a state.
            base: what may be seen besides no key after the query; None: everything.
            state: `PageBounds`; None: computed from `k` and `context.kv_lengths`.
            context: `new_keys`, if the state lacks them; `kv_lengths`, if there is no state.

        Returns:
            The mask with blocks of Sq queries and `page_size` keys, the state, and the scores [B, Hk, pages].
        """
        if state is None:
            if context.kv_lengths is None:
                raise ValueError("Quest needs a state (PageBounds), or context.kv_lengths to compute it from the cache")
            state = PageBounds.of_cache(k, context.kv_lengths, self.page_size)
        elif context.new_keys is not None:
            state = state.append(context.new_keys)
        return quest_mask(q, state, self.budget, kv_len=k.shape[1], base=base)


def quest_mask(q, bounds: PageBounds, budget: Budget, *, kv_len: int, base: Mask | None = None):
    """As `Quest`, where no array has the shape of the whole cache, as with pages in a pool.

    Args:
        q: [B, Sq, H, D].
        bounds: of the cache, the new keys appended.
        budget: pages besides the newest.
        kv_len: room for keys in the cache.
        base: what may be seen besides no key after the query; None: everything.

    Returns:
        The mask, the bounds, and the scores [B, Hk, pages].
    """
    scores = quest_scores(q, bounds)
    queries = q.shape[1]
    positions = bounds.lengths[:, None] - queries + jnp.arange(queries, dtype=jnp.int32)
    mask: BlockMask = from_scores(
        scores[:, :, None],
        budget,
        Causal() if base is None else Causal() & base,
        q_len=queries,
        kv_len=kv_len,
        bq=queries,
        bk=bounds.page_size,
        q_positions=positions,
        forced=Forced(diagonal=True),
    )
    return mask, bounds, scores


def quest_budget(tokens: int, page_size: int, *, min_pages: int = 3) -> TopK:
    """The budget of a number of tokens: `tokens / page_size` pages, at least `min_pages`, the newest one included.

    Example:
        >>> quest_budget(256, 16)
        TopK(k=15, max_blocks=15)
    """
    return TopK(max(min_pages, tokens // page_size) - 1)
